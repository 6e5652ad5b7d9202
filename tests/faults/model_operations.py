"""Operations of a model: what it fits and is corrected to, and how a bundle and its plans are made.

What takes minutes and writes nothing (PyTorch's tracing and its own answers) is done once, before
faults are injected, and its results are used again.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.fake_bundle import make_fake_bundle

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


def _remembered(module: Any, name: str) -> None:
    """Let a function answer as it did when it was called for the same time in a run."""
    real, answers, called = getattr(module, name), [], [0]

    def again(*values: Any, **named: Any) -> Any:
        if len(answers) <= called[0]:
            answers.append(real(*values, **named))
        called[0] += 1
        return answers[called[0] - 1]

    setattr(module, name, again)
    _STARTS.append(lambda: called.__setitem__(0, 0))


_STARTS: list[Callable[[], None]] = []
_MODELS: list[Any] = []


def _with_models(root: Path) -> None:
    """Load random weights, and export once so that PyTorch's part is known."""
    import torch

    from recallseg.export import bundling
    from recallseg.export.checkpoints import load_dinov2, load_sam2

    torch.set_num_threads(1)  # a process with more cannot be forked
    _MODELS[:] = [load_sam2("random:demo", image_size=256), load_dinov2("random:demo")]
    _remembered(torch.onnx, "export")
    for name in ("run_case", "check_definition", "check_corrections", "check_graph"):
        _remembered(bundling, name)
    _export(root / "once")
    shutil.rmtree(root / "once")


def _export(root: Path) -> None:
    from recallseg.export.bundling import export_bundle

    for start in _STARTS:
        start()
    output = root / "bundle"
    # As the command does it with --overwrite: what is there stays until the new one stands.
    export_bundle(*_MODELS, output, variants=["portable"], overwrite=True)


def _with_bundle(root: Path) -> None:
    """Export a bundle to convert, and convert once so that what its graphs compute is known."""
    from recallseg.export import converting

    _with_models(root)
    _export(root)
    _remembered(converting, "run_case")
    _convert(root)
    shutil.rmtree(root / "converted")


def _convert(root: Path) -> None:
    for start in _STARTS:
        start()
    command(
        *("convert", "{root}/bundle", "--output", "{root}/converted"),
        *("--precisions", "fp16", "--overwrite"),
    )(root)


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
    Operation("convert", _with_bundle, _convert, _bundle_state("converted"), seconds=900),
    Operation("build", _with_stand_in, _build, _plans, _some_plans, seconds=900),
)
