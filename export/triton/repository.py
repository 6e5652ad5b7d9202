"""Writes the repository: five graphs, and the model that composes them.

::

    REPO/recallseg_embed/config.pbtxt        platform onnxruntime_onnx or tensorrt_plan
                        /1/model.onnx        or model.plan
        /recallseg_encode ... _decode
        /recallseg/config.pbtxt              backend python: image and memories in, logits out
                  /1/model.py

The library stays with the client: it sends the memories that it recalled. To add an exemplar it
asks ``recallseg_embed``, ``recallseg_encode`` and ``recallseg_memorize``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from recallseg.engines.bundle import Bundle
from recallseg.engines.durable import replace_folder
from recallseg.engines.errors import ExportError, InputError
from recallseg.engines.specs import GRAPHS, TensorSpec
from recallseg.engines.tensorrt.building import VARIANTS
from recallseg.engines.tensorrt.plans import Plan, PlanCache

__all__ = ["export_triton"]

COMPOSITION = Path(__file__).with_name("composition.py")
ENGINES = ("onnxruntime", "tensorrt")
DEVICES = ("gpu", "cpu")


def export_triton(
    bundle: Bundle,
    output: Path,
    *,
    engine: str = "onnxruntime",
    precision: str = "fp32",
    device: str = "gpu",
    prefix: str = "recallseg",
    cache: PlanCache | None = None,
) -> Path:
    """Write a Triton model repository and return its folder.

    Parameters
    ----------
    bundle : whose graphs.
    output : the repository's folder; it must not exist.
    engine : ``onnxruntime`` takes the graphs, ``tensorrt`` verified plans from the cache. A plan
        runs in a server with the same TensorRT only; its version is in the configuration.
    precision : of the graphs or plans.
    device : where the five models run.
    prefix : of the models' names.
    cache : the user's by default.

    Raises
    ------
    InputError
        For an unknown engine or device, or plans on a CPU.
    ExportError
        If ``output`` exists, or no verified plan is there.
    BundleError
        If the bundle lacks the precision, or a file was changed.
    """
    if engine not in ENGINES or device not in DEVICES or (engine, device) == ("tensorrt", "cpu"):
        raise InputError(
            f"a repository takes engine {' or '.join(ENGINES)} on {' or '.join(DEVICES)}, and "
            f"tensorrt on gpu only; got {engine} on {device}."
        )
    if not prefix.isidentifier():
        raise InputError(f"a prefix must be a plain name, got '{prefix}'.")
    if output.exists():
        raise ExportError(f"{output} exists. Choose another folder, or remove it.")
    with replace_folder(output) as work:
        for graph in GRAPHS:
            folder = work / f"{prefix}_{graph}" / "1"
            folder.mkdir(parents=True)
            notes = {"bundle": bundle.identity, "precision": precision, "notice": bundle.notice}
            if engine == "tensorrt":
                plan = _verified_plan(bundle, graph, precision, cache or PlanCache())
                (folder / "model.plan").write_bytes(plan.read())
                notes |= {"tensorrt": plan.key.version, "target": plan.key.target}
            else:
                _copy_graph(bundle, graph, precision, folder)
            spec = bundle.specs[graph]
            kind = f'platform: "{"tensorrt_plan" if engine == "tensorrt" else "onnxruntime_onnx"}"'
            text = _configuration(
                folder.parent.name, kind, spec.inputs, spec.outputs, notes, device
            )
            (folder.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        _write_composition(bundle, work / prefix, prefix, engine)
    return output


def _write_composition(bundle: Bundle, folder: Path, prefix: str, engine: str) -> None:
    image, *_ = bundle.specs["encode"].inputs
    _, *recalled = (t for t in bundle.specs["attend"].inputs if t.name != "pointer_time")
    parameters = {
        "prefix": prefix,
        "engine": engine,
        "pointer_time": repr(bundle.memory.pointer_time),
        "object_pointers": str(bundle.memory.object_pointers).lower(),
        "bundle": bundle.identity,
        "notice": bundle.notice,
    }
    text = _configuration(
        folder.name,
        'backend: "python"',
        (image, *recalled),
        (*bundle.specs["decode"].outputs, TensorSpec("notice", "object", (1,))),
        parameters,
        "cpu",  # it computes nothing itself
    )
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    shutil.copyfile(COMPOSITION, folder / "1" / "model.py")


def _configuration(
    name: str,
    kind: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    parameters: Mapping[str, str],
    device: str,
) -> str:
    """Return a ``ModelConfig`` in protobuf's text form; strings are quoted as JSON quotes them."""
    lines = [
        f'name: "{name}"',
        kind,
        # n and k are axes of their own: requests of different n cannot be stacked.
        "max_batch_size: 0",
    ]
    for role, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            dims = ", ".join(str(-1 if isinstance(d, str) else d) for d in tensor.shape)
            data_type = "TYPE_STRING" if tensor.dtype == "object" else "TYPE_FP32"
            lines.append(
                f'{role} {{ name: "{tensor.name}" data_type: {data_type} dims: [ {dims} ] }}'
            )
    lines.append(f"instance_group {{ count: 1 kind: KIND_{device.upper()} }}")
    for key, value in parameters.items():
        quoted = json.dumps(value)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {quoted} }} }}')
    return "\n".join(lines) + "\n"


def _copy_graph(bundle: Bundle, graph: str, precision: str, folder: Path) -> None:
    path, variant = bundle.graph_file(graph, VARIANTS, precision)
    shutil.copyfile(path, folder / "model.onnx")
    for weights in bundle.weights_files(graph, variant, precision):
        shutil.copyfile(weights, folder / weights.name)  # the graph names it, so it keeps its name


def _verified_plan(bundle: Bundle, graph: str, precision: str, cache: PlanCache) -> Plan:
    """Return the newest plan of a graph that was verified on some GPU and refused on none."""
    _, variant = bundle.graph_file(graph, VARIANTS, precision)
    digest = bundle.graph_digest(graph, variant, precision)
    plans = [
        plan
        for plan in cache.entries()
        if plan.key.engine == "tensorrt"
        and plan.key.graph_digest == digest
        and plan.key.precision == precision
        and set(plan.verdicts.states.values()) == {"verified"}
    ]
    if not plans:
        raise ExportError(
            f"there is no verified tensorrt plan of graph '{graph}' in {precision}. Build it on "
            f"the GPU that will run it: recallseg build {bundle.path} --engine tensorrt "
            f"--precision {precision}."
        )
    return plans[-1]
