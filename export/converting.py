"""A bundle in, the same bundle with more precisions out; each proven before it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import ExportError
from recallseg.engines.golden import GoldenTensors, run_case
from recallseg.engines.specs import GRAPHS
from recallseg.engines.verification import compare_with_golden
from recallseg.export.emulation import EmulatedEngine
from recallseg.export.precision import CONVERTED, convert_graph

__all__ = ["convert_bundle"]

Report = Callable[[str], None]

_LARGEST = 1_800_000_000  # an ONNX file is a protobuf message, which ends at 2 GiB


def convert_bundle(
    source: Bundle,
    output: Path,
    precisions: Sequence[str],
    *,
    overwrite: bool = False,
    report: Report = lambda step: None,
) -> Bundle:
    """Copy a bundle and add its graphs in other precisions.

    The graphs of variant ``tensorrt`` are converted where the bundle has them, else the portable
    ones. Each precision then runs the golden case on the CPU, rounding as its types do, and has to
    stay within its tolerance for every tensor and within the Dice tolerance for the masks.

    Parameters
    ----------
    source : the bundle; it is only read.
    output : the new bundle's folder.
    precisions : of ``fp16``, ``bf16``, ``mixed``.
    overwrite : replace an existing folder.
    report : is told the name of every step as it begins.

    Raises
    ------
    ExportError
        If ``output`` exists, a precision is unknown, or a graph cannot be converted.
    VerificationError
        If a precision fails its gate, naming tensor and error. Nothing is written.
    """
    unknown = [name for name in precisions if name not in CONVERTED]
    if unknown or not precisions:
        raise ExportError(
            f"precisions must be of {', '.join(CONVERTED)}; got {', '.join(precisions) or 'none'}."
        )
    if output.exists() and not overwrite:
        raise ExportError(f"{output} exists. Choose another folder, or allow it to be overwritten.")
    variant = "tensorrt" if "tensorrt" in source.precisions else "portable"
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copytree(source.path, work)
        manifest: dict[str, Any] = json.loads((work / "manifest.json").read_text(encoding="utf-8"))
        golden = GoldenTensors.load(source.golden_file)
        measured = [
            entry
            for entry in manifest.get("parity", [])
            if entry["variant"] not in {f"{variant}/{name}" for name in precisions}
        ]
        for precision in precisions:
            engines = {}
            for graph in GRAPHS:
                report(f"convert {graph} to {precision}")
                path, _ = source.graph_file(graph, (variant,), "fp32")
                converted = convert_graph(onnx.load(path), precision, graph)
                file = work / "graphs" / variant / precision / f"{graph}.onnx"
                file.parent.mkdir(parents=True, exist_ok=True)
                manifest["graphs"][f"{variant}/{precision}/{graph}"] = _save(work, file, converted)
                engines[graph] = EmulatedEngine(source.specs[graph], file)
            report(f"compare {precision} with fp32")
            found = run_case(
                golden.case,
                Composition(engines),
                source.geometry,
                source.normalisation,
                source.memory,
            )
            result = compare_with_golden(source, golden, found, "emulated", precision)
            k, n = golden.case.masks.shape[:2]
            measured += [
                {
                    "graph": "end to end",
                    "variant": f"{variant}/{precision}",
                    "inputs": "image-like",
                    "tensor": check.tensor,
                    "n": n,
                    "k": k,
                    "error": check.error,
                    "tolerance": check.tolerance,
                }
                for check in result.checks
            ]
        manifest["parity"] = measured
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        (work / "manifest.json").write_text(text + "\n", encoding="utf-8")
        Bundle.open(work)
        if output.exists():
            shutil.rmtree(output)
        work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Bundle.open(output)


def _save(work: Path, file: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """Write a graph (weights too large for it go beside it) and return its manifest entry."""
    data = file.with_name(file.name + ".data")
    if model.ByteSize() > _LARGEST:
        onnx.save(model, file, save_as_external_data=True, location=data.name)
    else:
        onnx.save(model, file)

    def entry(path: Path) -> dict[str, Any]:
        return {
            "file": path.relative_to(work).as_posix(),
            "sha256": digest_file(path),
            "bytes": path.stat().st_size,
        }

    return {**entry(file), "data": entry(data)} if data.exists() else entry(file)
