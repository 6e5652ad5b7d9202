"""Writes the repository: a bundle's graphs, and the two models that compose them.

::

    REPO/recallseg_embed/config.pbtxt        platform onnxruntime_onnx or tensorrt_plan
                        /1/model.onnx        or model.plan
        /recallseg_encode ... _decode        and _correct, if the bundle has it
        /recallseg/config.pbtxt              backend python: image and memories in, logits out
                  /1/model.py
        /recallseg_remember                  image and masks in, what a library stores out

The library stays with the client: it sends the memories that it recalled, or none, and perhaps
points of one structure (see :class:`recallseg.engines.composition.Prompts`). Weights that a bundle
stores once for several graphs lie beside each graph, as the server needs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import ExportError, InputError
from recallseg.engines.precisions import find_precision
from recallseg.engines.reading import is_there
from recallseg.engines.registry import engine_class
from recallseg.engines.specs import GraphSpec, TensorSpec
from recallseg.engines.tensorrt.building import VARIANTS
from recallseg.engines.tensorrt.plans import Plan, PlanCache
from recallseg.export.writing import write_folder

__all__ = ["export_triton"]

COMPOSITION = Path(__file__).with_name("composition.py")
ENGINES = ("onnxruntime", "tensorrt")
DEVICES = {"gpu": "onnxruntime-cuda", "cpu": "onnxruntime-cpu"}
"""Where models run, and the engine of ours that likes the same graphs there."""
_TYPES = {
    "float32": "TYPE_FP32",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
    "object": "TYPE_STRING",
}


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
    device : where the models of graphs run.
    prefix : of the models' names.
    cache : the user's by default.

    Raises
    ------
    InputError
        For an unknown engine or device, plans on a CPU, or a precision that needs operators of our
        own, which a server does not have.
    ExportError
        If ``output`` exists or cannot be written, or no verified plan is there.
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
    if find_precision(precision).native:
        raise InputError(
            f"{precision} needs operators of our own, which a Triton server does not have. Choose "
            "another precision."
        )
    if is_there(output):
        raise ExportError(f"{output} exists. Choose another folder, or remove it.")
    variants = VARIANTS if engine == "tensorrt" else engine_class(DEVICES[device]).variants
    with write_folder(output, "repository") as work:
        graphs = bundle.graphs_for(variants, precision)
        for graph in graphs:
            folder = work / f"{prefix}_{graph}" / "1"
            folder.mkdir(parents=True)
            notes = {"bundle": bundle.identity, "precision": precision, "notice": bundle.notice}
            if engine == "tensorrt":
                plan = _verified_plan(bundle, graph, precision, cache or PlanCache())
                (folder / "model.plan").write_bytes(plan.read())
                notes |= {"tensorrt": plan.key.version, "target": plan.key.target}
            else:
                notes["variant"] = _copy_graph(bundle, graph, variants, precision, folder)
            spec = bundle.specs[graph]
            kind = f'platform: "{"tensorrt_plan" if engine == "tensorrt" else "onnxruntime_onnx"}"'
            text = _configuration(
                folder.parent.name, kind, spec.inputs, spec.outputs, notes, device
            )
            (folder.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        parameters = {
            "prefix": prefix,
            "engine": engine,
            "pointer_time": repr(bundle.memory.pointer_time),
            "object_pointers": str(bundle.memory.object_pointers).lower(),
            "no_memory": json.dumps(bundle.no_memory or []),
            "logit_size": str(bundle.geometry.logit_size),
            "bundle": bundle.identity,
            "former_bundles": json.dumps(bundle.former_identities),
            "notice": bundle.notice,
        }
        specs = {graph: bundle.specs[graph] for graph in graphs}
        _write_composition(work / prefix, parameters, "segment", *_segment(bundle, specs))
        _write_composition(work / f"{prefix}_remember", parameters, "remember", *_remember(specs))
    return output


_Optional = frozenset[str]


def _segment(
    bundle: Bundle, specs: Mapping[str, GraphSpec]
) -> tuple[list[TensorSpec], list[TensorSpec], _Optional]:
    """Return inputs and outputs of the model that segments, and which may be left out."""
    image, *_ = specs["encode"].inputs
    recalled = [t for t in specs["attend"].inputs if t.name in ("memories", "pointers")]
    prompts = []
    if "correct" in specs:
        names = ("points", "point_labels", "prior")
        prompts = [t for t in specs["correct"].inputs if t.name in names]
    optional = {t.name for t in prompts}
    if bundle.no_memory is not None:  # bundles of format 1 do not say what stands for nothing
        optional |= {t.name for t in recalled}
    return [image, *recalled, *prompts], [*specs["decode"].outputs], frozenset(optional)


def _remember(
    specs: Mapping[str, GraphSpec],
) -> tuple[list[TensorSpec], list[TensorSpec], _Optional]:
    """Return inputs and outputs of the model that makes what a library stores."""
    (small,), (image,) = specs["embed"].inputs, specs["encode"].inputs
    masks = next(t for t in specs["memorize"].inputs if t.name == "masks")
    made = [*specs["embed"].outputs, *specs["memorize"].outputs]
    return [replace(small, name="embed_image"), image, masks], made, frozenset()


def _write_composition(
    folder: Path,
    parameters: Mapping[str, str],
    role: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    optional: _Optional,
) -> None:
    text = _configuration(
        folder.name,
        'backend: "python"',
        inputs,
        (*outputs, TensorSpec("notice", "object", (1,))),
        {**parameters, "role": role},
        "cpu",  # it computes nothing itself
        optional,
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
    optional: _Optional = frozenset(),
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
            may = " optional: true" if tensor.name in optional and role == "input" else ""
            about = f'name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]{may}'
            lines.append(f"{role} {{ {about} }}")
    lines.append(f"instance_group {{ count: 1 kind: KIND_{device.upper()} }}")
    for key, value in parameters.items():
        quoted = json.dumps(value)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {quoted} }} }}')
    return "\n".join(lines) + "\n"


def _copy_graph(
    bundle: Bundle, graph: str, variants: Sequence[str], precision: str, folder: Path
) -> str:
    """Copy a graph and the files with its weights; return its variant."""
    path, variant = bundle.graph_file(graph, variants, precision)
    shutil.copyfile(path, folder / "model.onnx")
    for data in bundle.weights_files(graph, variant, precision):  # the graph names them
        target = folder / data.relative_to(path.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, target)
    return variant


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
