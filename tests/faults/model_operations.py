"""Operations of a model: what it fits and is corrected to, and how a bundle and its plans are made.

What takes minutes and writes nothing (PyTorch's own answers) is done once, before faults are
injected, and its results are used again. Networks of a few nodes stand in for those that PyTorch
would trace: how many nodes and constants there are says how often the same is written, not how.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support.fake_bundle import make_fake_bundle
from support.tiny_bundle import GRAPHS, tiny_graphs

from faults.operation import Operation, command
from recallseg.engines.bundle import Bundle
from recallseg.engines.manifest import MANIFEST
from recallseg.engines.reading import read_text
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["MODEL_OPERATIONS"]


def _disc(number: int) -> tuple[Any, Any]:
    image = np.random.default_rng(number).integers(0, 60, (24, 20)).astype(np.uint8)
    mask = np.zeros(image.shape, bool)
    mask[4 + number : 14 + number, 5:14] = True
    image[mask] += 120
    return image, mask


def _with_discs(root: Path) -> None:
    bundle = make_fake_bundle(root / "bundle", correct=True)
    with Library.create(root / "library", bundle, engine="fake") as library:
        for number in range(4):
            image, mask = _disc(number)
            library.add(image, {"disc": mask}, key=f"disc {number}")


def _library_with_head(root: Path) -> Any:
    with Library.open(root / "library") as library:
        report = library.verify()
        if not report.ok:
            raise AssertionError(f"verify found: {report}")
        head = library.head
        shown = None if head is None else (head.structures, sorted(head.fold_of), len(head.units))
        return sorted((one.key, one.content) for one in library), shown


def _accept(root: Path) -> None:
    """A person corrects a proposal and accepts it; done again, it is there already."""
    image, _ = _disc(5)
    # Others of this identity, which need not have the graph, may be known from other operations.
    with Library.open(root / "library", root / "bundle", mode="write") as library:
        if "corrected" in library:
            return
        session = Segmenter(library, k=2, engine="fake").correct(image)
        session.click("disc", 12, 12)
        session.box("lesion", 2, 2, 8, 9)
        session.accept(library, key="corrected", tags={"by": "a person"})


def _bundle_state(name: str) -> Callable[[Path], Any]:
    def state(root: Path) -> Any:
        if not (root / name).exists():
            return None
        bundle = Bundle.open(root / name)
        for variant, precisions in bundle.precisions.items():
            for precision in precisions:
                for graph in bundle.graphs_for((variant, "portable"), precision):
                    bundle.graph_file(graph, (variant, "portable"), precision)  # by its digest
        return bundle.identity, read_text(bundle.path / MANIFEST)

    return state


def _answered(module: Any, name: str) -> None:
    """Let a function always give the answer that it gives when it is called first."""
    real, answers = getattr(module, name), []

    def first(*values: Any, **named: Any) -> Any:
        if not answers:
            found = real(*values, **named)
            answers.append([*found] if isinstance(found, Iterator) else found)
        return answers[0]

    setattr(module, name, first)


_MODELS: list[Any] = []


def _with_models(root: Path) -> None:
    """Load random weights, and export once so that PyTorch's part is known."""
    import torch

    from recallseg.engines import golden
    from recallseg.export import bundling
    from recallseg.export.checkpoints import load_dinov2, load_sam2

    torch.set_num_threads(1)  # a process with more cannot be forked
    golden.CASE_SIDE, golden.SAMPLE = 64, 256  # of an archive, not what is in it
    _MODELS[:] = [load_sam2("random:demo", image_size=256), load_dinov2("random:demo")]
    torch.onnx.export = _traced(torch.onnx.ONNXProgram)
    bundling.check_graph = lambda *_, **__: iter(())  # they compute something else
    for name in ("read_geometry", "make_case", "run_case", "_versions"):
        _answered(bundling, name)
    for name in ("check_definition", "check_corrections"):
        _answered(bundling, name)
    _export(root / "once")
    shutil.rmtree(root / "once")


def _traced(program: Any) -> Callable[..., Any]:
    """Return what answers for PyTorch's tracing: a graph of these inputs and outputs."""
    import onnx_ir

    from recallseg.export.graphs import read_geometry

    geometry = read_geometry(*(loaded.model for loaded in _MODELS), embed_size=224)
    graphs = {
        tuple(value.name for value in (*graph.graph.input, *graph.graph.output)): program(
            onnx_ir.from_proto(graph), None
        )
        for graph in tiny_graphs(geometry, _NETWORKS).values()
    }

    def export(*_: Any, input_names: list[str], output_names: list[str], **__: Any) -> Any:
        return graphs[(*input_names, *output_names)]

    return export


_MIXED = "mixed = Conv(conditioned, shared_CxCx1x1)"
"""What decode and correct have in common: their constants go into one file."""
_NETWORKS = {
    **GRAPHS,
    "embed": """
        cells = Conv<strides = [7, 7]>(image, w_3x3x7x7)
        flat = Flatten(cells)
        embedding = MatMul(flat, w_ExD)
    """,
    **{
        name: _MIXED + GRAPHS[name].replace("(conditioned", "(mixed")
        for name in ("decode", "correct")
    },
}


def _export(root: Path) -> None:
    from recallseg.export.bundling import export_bundle

    output = root / "bundle"
    # As the command does it with --overwrite: what is there stays until the new one stands.
    export_bundle(*_MODELS, output, variants=["portable"], overwrite=True)


def _with_bundle(root: Path) -> None:
    """Export a bundle to convert, and put another where the result goes, to be overwritten.

    Its graphs compute what its golden tensors say.
    """
    from recallseg.export import bundling, converting

    _with_models(root)
    _export(root)
    shutil.copytree(root / "bundle", root / "converted")
    converting.run_case = bundling.run_case


_CONVERT = command(
    *("convert", "{root}/bundle", "--output", "{root}/converted"),
    *("--precisions", "fp16", "--overwrite"),
)


def _with_stand_in(root: Path) -> None:
    """Put the stand-in for TensorRT where the real one would be: its plans run on the CPU."""
    from support.fake_tensorrt import HostGpu, make_tensorrt

    from recallseg.engines.tensorrt import building, loading

    sys.modules["tensorrt"] = make_tensorrt("10.3.0")
    building.open_device = loading.open_device = HostGpu.open  # type: ignore[assignment]


def _build(root: Path) -> None:
    os.environ["RECALLSEG_CACHE"] = str(root / "cache")
    command("build", "demo", "--engine", "tensorrt", "--max-k", "8")(root)


def _plans(root: Path) -> Any:
    """The plans of the cache, by graph, each compared with its digest; and whether it may run."""
    found = {}
    for plan in PlanCache(root / "cache" / "plans").entries():
        plan.read()
        found[plan.key.graph] = tuple(plan.verdicts.states.values())
    return found


def _some_plans(state: Any, after: Any) -> bool:
    return set(state) <= set(after) and all(one in ((), after[g]) for g, one in state.items())


MODEL_OPERATIONS = (
    Operation(
        "fit",
        _with_discs,
        command("library", "fit", "{root}/library", "--engine", "fake"),
        _library_with_head,
    ),
    Operation("accept", _with_discs, _accept, _library_with_head),
    Operation("export", _with_models, _export, _bundle_state("bundle"), seconds=900),
    Operation("convert", _with_bundle, _CONVERT, _bundle_state("converted"), seconds=900),
    Operation("build", _with_stand_in, _build, _plans, _some_plans, seconds=900),
)
