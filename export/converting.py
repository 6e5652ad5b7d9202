"""A bundle in, the same bundle with more precisions out; each proven before it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from recallseg.engines.bundle import FORMAT_VERSION, Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.engine import Engine, EngineOptions, Tensor
from recallseg.engines.errors import ExportError
from recallseg.engines.golden import GoldenTensors, golden_prompts, network_images, run_case
from recallseg.engines.manifest import MANIFEST
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.operators import require_operators
from recallseg.engines.precisions import PRECISIONS
from recallseg.engines.reading import read_text
from recallseg.engines.registry import load_engines
from recallseg.engines.signing import SIGNATURE
from recallseg.engines.specs import GRAPHS
from recallseg.engines.verification import compare_with_golden
from recallseg.export.emulation import EmulatedEngine
from recallseg.export.native import use_half_linear, use_native_operators
from recallseg.export.precision import convert_graph
from recallseg.export.quantization import quantize_graph, sensitive_layers
from recallseg.export.reading import read_graph
from recallseg.export.sharing import share_weights
from recallseg.export.writing import (
    check_output,
    entry,
    graph_file,
    write_bundle,
    write_manifest,
)

__all__ = ["CONVERTED", "convert_bundle"]

CONVERTED = tuple(name for name, precision in PRECISIONS.items() if precision.made_by != "export")
"""Precisions that a bundle can be given after its export."""

HALF_NATIVE = "fp16-native"

Report = Callable[[str], None]
Made = dict[str, dict[str, Engine]]
_Measurements = list[tuple[Any, bool, Mapping[str, Tensor], frozenset[str]]]
"""A graph's entry in the manifest, whether with native operators, its inputs, layers to keep."""

_LARGEST = 1_800_000_000  # an ONNX file is a protobuf message, which ends at 2 GiB


def convert_bundle(
    source: Bundle,
    output: Path,
    precisions: Sequence[str],
    *,
    overwrite: bool = False,
    report: Report = lambda step: None,
) -> Bundle:
    """Copy a bundle and add its graphs in other precisions; weights are stored once.

    For ``fp16``, ``bf16`` and ``mixed`` the graphs of variant ``tensorrt`` are converted where the
    bundle has them, else the portable ones, and beside them those of ``ort-cuda`` (or of
    ``ort-cpu``, where there are no others); they run on the CPU, rounding as their types do.
    ``fp16-native`` is ``fp16`` with a native operator for CUDA. For ``fp32-native``, ``int8``,
    ``int8-native`` and ``int8-pooled`` those of ``ort-cpu`` are; they run as they will be run.
    ``memorize`` stays as it is there: memories outlive the precision of a query.
    Each precision has to stay within its tolerance for every tensor of the golden case, and within
    the Dice tolerance for the masks.

    Parameters
    ----------
    source : the bundle; it is only read.
    output : the new bundle's folder.
    precisions : of :data:`CONVERTED`; none only stores the weights of an older bundle once.
    overwrite : replace an existing folder.
    report : is told the name of every step as it begins.

    Raises
    ------
    BundleError
        If a file of the bundle is not what its manifest says.
    ExportError
        If ``output`` exists, a precision is unknown, or a graph cannot be converted.
    EngineUnavailableError
        If a precision needs native operators that were not built.
    VerificationError
        If a precision fails its gate, naming tensor and error. Nothing is written.
    """
    unknown = [name for name in precisions if name not in CONVERTED]
    if unknown:
        raise ExportError(
            f"precisions must be of {', '.join(CONVERTED)}; got {', '.join(unknown)}."
        )
    check_output(output, overwrite=overwrite)
    source.check_files()
    for precision in precisions:
        if precision == HALF_NATIVE:
            _check_for_cuda(source)
        elif PRECISIONS[precision].made_by != "floating":
            _check_for_cpu(source, precision)
    with write_bundle(output, overwrite=overwrite) as work:
        _copy(source.path, work)
        (work / SIGNATURE).unlink(missing_ok=True)  # of the manifest before
        manifest: dict[str, Any] = json.loads(read_text(work / MANIFEST))
        golden = GoldenTensors.load(source.golden_file)
        measured = list(manifest.get("parity", []))
        measurements: _Measurements = []
        for precision in precisions:
            floating = PRECISIONS[precision].made_by == "floating"
            make = _converted if floating else partial(_made_for_cpu, measurements)
            for variant, engines in make(source, work, manifest, golden, precision, report).items():
                report(f"compare {variant} in {precision} with fp32")
                key = f"{variant}/{precision}"
                measured = [entry for entry in measured if entry["variant"] != key]
                measured += _compare(source, golden, key, precision, engines)
        manifest["parity"] = measured
        if "no_memory" in manifest:  # format 1 has none, and stays what it is
            report("share weights")
            share_weights(work, manifest["graphs"])
            manifest["version"] = FORMAT_VERSION
        write_manifest(work, manifest)
        Bundle.open(work).check_files()
    return Bundle.open(output)


def _copy(source: Path, target: Path) -> None:
    """Copy a bundle's files; ExportError with the first that could not be."""
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except shutil.Error as error:  # its text is a list of tuples
        failed = error.args[0]
        path, _, why = failed[0]
        more = f" (and {len(failed) - 1} more files)" if len(failed) > 1 else ""
        raise ExportError(
            f"{path} cannot be copied: {why}{more}. Free some space, or see that it can be read."
        ) from error


def _compare(
    source: Bundle,
    golden: GoldenTensors,
    variant: str,
    precision: str,
    engines: Mapping[str, Engine],
) -> list[dict[str, Any]]:
    """Run the golden case; return entries of the manifest, or raise VerificationError."""
    composition = Composition(engines)
    found = run_case(golden.case, composition, source.geometry, source.normalisation, source.memory)
    name = engines["attend"].name
    result = compare_with_golden(source, golden, found, name, precision)
    k, n = golden.case.masks.shape[:2]
    return [
        {
            "graph": "end to end",
            "variant": variant,
            "inputs": "image-like",
            "tensor": check.tensor,
            "n": n,
            "k": k,
            "error": check.error,
            "tolerance": check.tolerance,
        }
        for check in result.checks
    ]


def _converted(
    source: Bundle,
    work: Path,
    manifest: dict[str, Any],
    golden: GoldenTensors,
    precision: str,
    report: Report,
) -> Made:
    """Write graphs in other floating types; return engines that emulate them, by variant.

    Beside all five for TensorRT, those with ONNX Runtime's own operators become ``ort-cuda``; where
    it has none, the others serve it as well.
    """
    variant = "tensorrt" if "tensorrt" in source.precisions else "portable"
    sources = {variant: variant}
    kind = "fp16" if precision == HALF_NATIVE else precision
    fused = [v for v in ("ort-cuda", "ort-cpu") if "fp32" in source.precisions.get(v, ())]
    if fused:
        sources["ort-cuda"] = fused[0]
    made: Made = {}
    for variant, base in sources.items():
        engines: dict[str, Engine] = dict(next(iter(made.values()), {}))
        for graph in (*GRAPHS, *source.optional_graphs):
            if f"{base}/fp32/{graph}" not in manifest["graphs"]:
                continue
            report(f"convert {graph} of {base} to {precision}")
            path, _ = source.graph_file(graph, (base,), "fp32")
            file = graph_file(work, variant, precision, graph)
            converted = convert_graph(read_graph(path), kind, graph)
            if precision == HALF_NATIVE and variant == "ort-cuda":
                converted = use_half_linear(converted)
            entry = _save(work, file, converted)
            manifest["graphs"][f"{variant}/{precision}/{graph}"] = entry
            engines[graph] = EmulatedEngine(source.specs[graph], file)
        made[variant] = engines
    return made


def _check_for_cuda(source: Bundle) -> None:
    if "fp32" not in source.precisions.get("ort-cuda", ()):
        raise ExportError(
            f"{HALF_NATIVE} is made from the fp32 graphs of variant ort-cuda, which bundle "
            f"{source.name} lacks: it has {source.precisions}. Export it with --variants "
            "portable,ort-cuda."
        )


def _check_for_cpu(source: Bundle, precision: str) -> None:
    if PRECISIONS[precision].native:
        require_operators(f"precision {precision}")
    wanted = PRECISIONS[precision].made_from
    if wanted not in source.precisions.get("ort-cpu", ()):
        how = " --pooled" if wanted == "pooled" else ""
        raise ExportError(
            f"{precision} is made from the {wanted} graphs of variant ort-cpu, which bundle "
            f"{source.name} lacks: it has {source.precisions}. Export it with --variants "
            f"portable,ort-cpu{how}."
        )


def _made_for_cpu(
    measurements: _Measurements,
    source: Bundle,
    work: Path,
    manifest: dict[str, Any],
    golden: GoldenTensors,
    precision: str,
    report: Report,
) -> Made:
    """Write all graphs for the CPU but ``memorize``; return the engines by variant.

    What was measured of a layer holds for every precision that has the same graph and inputs.
    """
    made_as = PRECISIONS[precision]
    variant, base, native = "ort-cpu", made_as.made_from, made_as.native
    every = source.graphs_for((variant, "portable"), base)
    exact = load_engines(source, "onnxruntime-cpu", base, graphs=every)
    measured = made_as.made_by == "quantized"
    inputs = _image_like(source, golden, exact) if measured else {}
    engines: dict[str, Engine] = {}
    kept: dict[str, list[str]] = {}
    for graph in every:
        spec = source.specs[graph]
        path, found = source.graph_file(graph, (variant, "portable"), base)
        if graph == "memorize":
            manifest["graphs"][f"{variant}/{precision}/{graph}"] = manifest["graphs"][
                f"{found}/{base}/{graph}"
            ]
            engines[graph] = exact[graph]
            continue
        model = read_graph(path)
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}"
        if measured:
            report(f"measure the layers of {graph}")
            content = manifest["graphs"][f"{found}/{base}/{graph}"]
            keep = _known(measurements, content, native, inputs[graph])
            if keep is None:
                keep, _ = sensitive_layers(model, spec, inputs[graph], native=native)
                measurements.append((content, native, inputs[graph], keep))
            kept[graph] = sorted(keep)
            report(f"quantize {graph}")
            made = quantize_graph(model, keep, native=native)
        else:
            report(f"rewrite {graph}")
            made = use_native_operators(model)
        file = graph_file(work, variant, precision, graph)
        manifest["graphs"][f"{variant}/{precision}/{graph}"] = _save(work, file, made)
        engines[graph] = OnnxRuntimeCpu(spec, file, EngineOptions())
    if kept:
        manifest.setdefault("kept_in_fp32", {})[precision] = kept
    return {variant: engines}


def _known(
    measurements: _Measurements, content: Any, native: bool, inputs: Mapping[str, Tensor]
) -> frozenset[str] | None:
    """Return which layers to keep, if that was measured on the same graph and inputs."""
    for of, how, given, keep in measurements:
        same = (of, how, given.keys()) == (content, native, inputs.keys())
        if same and all(np.array_equal(given[name], inputs[name]) for name in inputs):
            return keep
    return None


def _image_like(
    source: Bundle, golden: GoldenTensors, engines: dict[str, Engine]
) -> dict[str, dict[str, Tensor]]:
    """Return what every graph gets in the golden case."""
    case, g = golden.case, source.geometry
    tensors = run_case(case, Composition(engines), g, source.normalisation, source.memory)
    images = {
        "embed": network_images(case, g.embed_size, source.normalisation["embed"])[-1],
        "encode": network_images(case, g.image_size, source.normalisation["encode"])[-1],
    }
    k, n = case.masks.shape[:2]
    tensors["pointer_time"] = np.full((n, k), source.memory.pointer_time, np.float32)
    said = {"conditioned": tensors["conditioned"][:1], **vars(golden_prompts(tensors["logits"][0]))}
    own = {**{name: {"image": image} for name, image in images.items()}, "correct": tensors | said}
    return {graph: own.get(graph, tensors) for graph in engines if graph != "memorize"}


def _save(work: Path, file: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """Write a graph (weights too large for it go beside it) and return its manifest entry."""
    data = file.with_name(file.name + ".data")
    if model.ByteSize() > _LARGEST:
        onnx.save(model, file, save_as_external_data=True, location=data.name)
    else:
        onnx.save(model, file)
    return entry(work, file)
