"""The pieces of ``bench gpu``, and how they are done one after the other, over several calls."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from xml.etree import ElementTree

from recallseg.benchmarks.gpu.graphs import measure_graphs
from recallseg.benchmarks.gpu.kernels import measure_kernels
from recallseg.benchmarks.latency import LatencyPlan, run_latency
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.engines.bundle import Bundle
from recallseg.engines.device import open_device
from recallseg.engines.device.device import PROVIDERS
from recallseg.engines.durable import replace_file
from recallseg.engines.errors import (
    BundleError,
    DeviceLostError,
    EngineUnavailableError,
    InputError,
    RecallSegError,
)
from recallseg.engines.registry import engine_class
from recallseg.runtime.doctor import diagnose
from recallseg.runtime.machine import describe_machine, package_versions

__all__ = ["GpuPlan", "Outcome", "Piece", "pieces_of", "run_pieces"]

Step = Callable[[str], None]

TESTS_TIMEOUT_S = 540
"""For the tests marked gpu: a piece ends within ten minutes."""


@dataclass(frozen=True)
class GpuPlan:
    """What to measure.

    Attributes
    ----------
    bundles : folders; one for each image size.
    engines, precisions, ks, ns : every combination is measured, with CUDA graphs and without.
    queries : of each combination; at least 1,000 for figures of the tail.
    baselines : PyTorch's, beside each first precision without CUDA graphs.
    torch_device : where they run.
    seconds : for one baseline at one (k, n).
    tests : the repository's folder of tests, or None where there is none.
    """

    bundles: tuple[Path, ...]
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    ks: tuple[int, ...] = (1, 4, 16)
    ns: tuple[int, ...] = (1, 3)
    queries: int = 1000
    baselines: tuple[str, ...] = ()
    torch_device: str = "cuda"
    seconds: float = 60.0
    tests: Path | None = None


@dataclass(frozen=True)
class Piece:
    """A file to be made: its name without ``.json``, and what makes its contents."""

    name: str
    measure: Callable[[Step], Any]


@dataclass(frozen=True)
class Outcome:
    """A piece that was done, or why not.

    ``state`` is ``measured``; ``empty`` where this machine cannot run it; ``failed`` where it
    should have run. ``reason`` says why, ``found`` holds the figures.
    """

    piece: str
    state: str
    reason: str = ""
    found: Any = None


def pieces_of(plan: GpuPlan) -> Iterator[Piece]:
    """Yield all pieces, the cheap ones that say whether the rest makes sense first."""
    yield Piece("machine", lambda step: _machine())
    if plan.tests is not None:
        tests = plan.tests
        yield Piece("tests", lambda step: _tests(tests))
    yield Piece("kernels", measure_kernels)
    for folder in plan.bundles:
        for engine in plan.engines:
            graphs = (False, True) if engine_class(engine).place == "device" else (False,)
            for precision in plan.precisions:
                for cuda_graphs in graphs:
                    choice = RuntimeChoice(engine, precision, None, cuda_graphs=cuda_graphs)
                    yield from _of_choice(plan, folder, choice)


def _of_choice(plan: GpuPlan, folder: Path, choice: RuntimeChoice) -> Iterator[Piece]:
    stem = f"{folder.name}-{choice.name.replace(' ', '-')}"
    if engine_class(choice.engine).place == "device":
        yield Piece(
            f"graphs-{stem}",
            lambda step: measure_graphs(
                Bundle.open(folder), choice, plan.ks, plan.ns, rounds=plan.queries, step=step
            ),
        )
    first = choice.precision == plan.precisions[0] and not choice.cuda_graphs
    for k in plan.ks:
        latency = LatencyPlan(
            choices=(choice,),
            ks=(k,),
            ns=plan.ns,
            queries=plan.queries,
            baselines=plan.baselines if first else (),
            seconds=plan.seconds,
            torch_device=plan.torch_device,
        )
        yield Piece(f"queries-{stem}-k{k}", _latency(folder, latency))


def _latency(folder: Path, latency: LatencyPlan) -> Callable[[Step], Any]:
    def measure(step: Step) -> Any:
        bundle = Bundle.open(folder)
        choice = latency.choices[0]
        try:
            choice.variant(bundle)
        except BundleError as error:
            raise EngineUnavailableError(str(error)) from error
        return run_latency(bundle, latency, step).to_json()

    return measure


def run_pieces(
    pieces: Sequence[Piece], output: Path, *, minutes: float, step: Step
) -> list[Outcome]:
    """Do the pieces that have no file yet, and begin none after so many minutes.

    Every piece is written as soon as it is done, so that a call that was cut off loses one at most.

    Returns
    -------
    outcomes : of all pieces that have a file now, in order.

    Raises
    ------
    InputError
        If a file is not what this wrote.
    """
    output.mkdir(parents=True, exist_ok=True)
    until = monotonic() + 60.0 * minutes
    outcomes = []
    lost = ""
    for piece in pieces:
        file = output / f"{piece.name}.json"
        if file.is_file():
            outcomes.append(_read(file))
            continue
        if lost or monotonic() > until:
            continue
        step(piece.name)
        try:
            outcome = Outcome(piece.name, "measured", found=piece.measure(step))
        except EngineUnavailableError as error:
            outcome = Outcome(piece.name, "empty", str(error))
        except RecallSegError as error:
            outcome = Outcome(piece.name, "failed", str(error))
            lost = str(error) if isinstance(error, DeviceLostError) else ""
        replace_file(file, json.dumps(asdict(outcome), indent=1, allow_nan=False).encode())
        outcomes.append(outcome)
    return outcomes


def _read(file: Path) -> Outcome:
    try:
        return Outcome(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file} is no piece of 'bench gpu': {error}. Remove it to measure it again."
        ) from error


def _machine() -> dict[str, Any]:
    providers = {}
    for name in PROVIDERS:
        try:
            providers[name] = str(open_device(name).facts)  # type: ignore[arg-type]
        except RecallSegError as error:
            providers[name] = str(error)
    return {
        "python": platform.python_version(),
        "machine": describe_machine(),
        "versions": package_versions(),
        "providers": providers,
        "engines": {e.name: [e.available, e.detail] for e in diagnose(self_test=False).engines},
    }


def _tests(folder: Path) -> dict[str, Any]:
    """Run the tests marked gpu and return how many passed, failed and were skipped, and why."""
    if not folder.is_dir():
        raise EngineUnavailableError(f"there are no tests at {folder}.")
    report = folder / ".gpu-tests.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *(f"--junitxml={report}", str(folder)),
    ]
    try:
        done = subprocess.run(  # noqa: S603  (this interpreter, pytest)
            command, cwd=folder.parent, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S,
            check=False,
        )  # fmt: skip
        root = ElementTree.parse(report).getroot()  # noqa: S314  (written by pytest just now)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        raise InputError(f"the tests marked gpu left no report: {error}.") from error
    finally:
        report.unlink(missing_ok=True)
    states: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in root.iter("testcase"):
        marks = {child.tag: child.get("message", "") for child in case}
        state = "failed" if {"failure", "error"} & marks.keys() else "passed"
        state = "skipped" if "skipped" in marks else state
        why = next(iter(marks.values()), "")
        states[state].append(
            f"{case.get('classname')}.{case.get('name')}" + (f": {why}" if why else "")
        )
    return {"status": done.returncode, **states}
