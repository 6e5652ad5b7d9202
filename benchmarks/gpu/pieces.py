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
from recallseg.benchmarks.gpu.in_flight import IN_FLIGHT, measure_in_flight
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
from recallseg.runtime.reports.machine import describe_machine, package_versions
from recallseg.runtime.services.doctor import diagnose

__all__ = ["GpuPlan", "Outcome", "Piece", "pieces_of", "run_pieces"]

Step = Callable[[str], None]

TESTS_TIMEOUT_S = 540
"""For the tests marked gpu: a piece ends within ten minutes."""
USUAL_K = 4
OVERHEAD_MINUTES = 2.0
"""To load engines three times, prove them once, make a library and start a process."""
COMPILE_MINUTES = 3.0
"""For torch.compile, of four graphs."""
SCHEMA = "recallseg-gpu-piece/1"
CUT_OFF = "the process ended while this was measured; remove {file} to measure it again"


@dataclass(frozen=True)
class GpuPlan:
    """What to measure.

    Attributes
    ----------
    bundles : folders; one for each image size.
    engines, precisions, ks, ns : every combination is measured, with CUDA graphs and without.
    queries : of each combination; at least 1,000 for figures of the tail.
    most_seconds : for the queries of one combination; slow ones get fewer, and say so.
    baselines : PyTorch's, each beside the first engine that runs here in the first precision.
    sam2, dinov2 : checkpoints of pretrained bundles, for them.
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
    most_seconds: float = 120.0
    baselines: tuple[str, ...] = ()
    sam2: str | None = None
    dinov2: str | None = None
    torch_device: str = "cuda"
    seconds: float = 60.0
    tests: Path | None = None


@dataclass(frozen=True)
class Piece:
    """A file to be made: its name without ``.json``, and what makes its contents.

    ``minutes`` is what it may take: none is begun that would end too late.
    """

    name: str
    measure: Callable[[Step], Any]
    minutes: float = 1.0


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
    """Yield all pieces, in the order in which they are worth a GPU's time.

    First what says whether the rest makes sense; then, for the usual k, every engine and what
    PyTorch does, which is all that most goals need; then the other k, several queries in flight,
    and last each graph alone.
    """
    yield Piece("machine", lambda step: _machine())
    if plan.tests is not None:
        tests = plan.tests
        yield Piece("tests", lambda step: _tests(tests), TESTS_TIMEOUT_S / 60.0)
    yield Piece("kernels", measure_kernels, 2.0)
    choices = [
        RuntimeChoice(engine, precision, None, cuda_graphs=cuda_graphs)
        for engine in plan.engines
        for precision in plan.precisions
        for cuda_graphs in ((False, True) if _on_gpu(engine) else (False,))
    ]
    for k in sorted(plan.ks, key=lambda k: (k != USUAL_K, k)):
        for folder in plan.bundles:
            for choice in choices:
                yield _of_queries(plan, folder, choice, k)
        for folder in plan.bundles:
            for baseline in plan.baselines:
                for n in plan.ns:
                    yield _of_baseline(plan, folder, baseline, k, n)
    on_gpu = [choice for choice in choices if _on_gpu(choice.engine)]
    for of in (_of_flights, _of_graphs):
        for folder in plan.bundles:
            for choice in on_gpu:
                yield of(plan, folder, choice)


def _on_gpu(engine: str) -> bool:
    return engine_class(engine).place == "device"


def _stem(folder: Path, choice: RuntimeChoice) -> str:
    return f"{folder.name}-{choice.name.replace(' ', '-')}"


def _of_queries(plan: GpuPlan, folder: Path, choice: RuntimeChoice, k: int) -> Piece:
    latency = LatencyPlan(
        choices=(choice,),
        ks=(k,),
        ns=plan.ns,
        queries=plan.queries,
        most_seconds=plan.most_seconds,
        # It takes a process for each n, and depends on neither.
        cold_starts=k == USUAL_K or USUAL_K not in plan.ks,
    )
    minutes = OVERHEAD_MINUTES + len(plan.ns) * plan.most_seconds / 60.0
    return Piece(f"queries-{_stem(folder, choice)}-k{k}", _latency(folder, latency), minutes)


def _of_baseline(plan: GpuPlan, folder: Path, baseline: str, k: int, n: int) -> Piece:
    def measure(step: Step) -> Any:
        why = EngineUnavailableError("no engine was asked for.")
        for engine in plan.engines:
            latency = LatencyPlan(
                choices=(RuntimeChoice(engine, plan.precisions[0], None),),
                ks=(k,),
                ns=(n,),
                queries=plan.queries,
                most_seconds=plan.most_seconds,
                baselines=(baseline,),
                seconds=plan.seconds,
                sam2=plan.sam2,
                dinov2=plan.dinov2,
                torch_device=plan.torch_device,
                cold_starts=False,
            )
            try:
                return _latency(folder, latency)(step)
            except EngineUnavailableError as error:
                why = error
        raise why

    minutes = OVERHEAD_MINUTES + COMPILE_MINUTES + (plan.most_seconds + plan.seconds) / 60.0
    return Piece(f"baseline-{folder.name}-{baseline}-k{k}-n{n}", measure, minutes)


def _of_graphs(plan: GpuPlan, folder: Path, choice: RuntimeChoice) -> Piece:
    combinations = 2 + 2 * len(plan.ks) * len(plan.ns)
    seconds = plan.most_seconds * 2 / combinations
    return Piece(
        f"graphs-{_stem(folder, choice)}",
        lambda step: measure_graphs(
            _bundle(folder, choice), choice, plan.ks, plan.ns,
            rounds=plan.queries, seconds=seconds, step=step,
        ),
        OVERHEAD_MINUTES + 2 * plan.most_seconds / 60.0,
    )  # fmt: skip


def _of_flights(plan: GpuPlan, folder: Path, choice: RuntimeChoice) -> Piece:
    seconds = plan.most_seconds / (len(IN_FLIGHT) * len(plan.ns))
    k = USUAL_K if USUAL_K in plan.ks else plan.ks[0]
    return Piece(
        f"flights-{_stem(folder, choice)}",
        lambda step: measure_in_flight(
            _bundle(folder, choice), choice, plan.ns,
            k=k, queries=plan.queries, seconds=seconds, step=step,
        ),
        OVERHEAD_MINUTES + plan.most_seconds / 60.0,
    )  # fmt: skip


def _bundle(folder: Path, choice: RuntimeChoice) -> Bundle:
    """Open a bundle; EngineUnavailableError if it or the engine lacks the precision."""
    bundle = Bundle.open(folder)
    offered = getattr(engine_class(choice.engine), "precisions", (choice.precision,))
    if choice.precision not in offered:
        raise EngineUnavailableError(f"'{choice.engine}' offers {', '.join(offered)} only.")
    try:
        choice.variant(bundle)
    except BundleError as error:
        raise EngineUnavailableError(str(error)) from error
    return bundle


def _latency(folder: Path, latency: LatencyPlan) -> Callable[[Step], Any]:
    def measure(step: Step) -> Any:
        bundle = _bundle(folder, latency.choices[0])
        try:
            return run_latency(bundle, latency, step).to_json()
        except ModuleNotFoundError as error:
            raise EngineUnavailableError(
                f"PyTorch's baselines need {error.name}, which is not installed: pip install torch "
                "transformers, torch with the CUDA of this driver."
            ) from error

    return measure


def run_pieces(
    pieces: Sequence[Piece], output: Path, *, minutes: float, step: Step
) -> list[Outcome]:
    """Do the pieces that have no file yet, as far as they end within so many minutes.

    The first one is begun in any case. Every piece is written as soon as it is done, so that a call
    that was cut off loses one at most; that one is known by its file, and not tried for ever.

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
    begun = False
    lost = False
    for piece in pieces:
        file = output / f"{piece.name}.json"
        if file.is_file():
            outcomes.append(_read(file))
            continue
        if lost or (begun and monotonic() + 60.0 * piece.minutes > until):
            continue
        begun = True
        step(piece.name)
        _write(file, Outcome(piece.name, "failed", CUT_OFF.format(file=file.name)))
        try:
            outcome = Outcome(piece.name, "measured", found=piece.measure(step))
        except EngineUnavailableError as error:
            outcome = Outcome(piece.name, "empty", str(error))
        except RecallSegError as error:
            outcome = Outcome(piece.name, "failed", str(error))
            lost = isinstance(error, DeviceLostError)
        except Exception as error:  # of PyTorch, say, which may be out of memory at k = 16
            outcome = Outcome(piece.name, "failed", f"{type(error).__name__}: {error}")
        except BaseException:
            file.unlink()  # interrupted: it was no failure of the piece
            raise
        _write(file, outcome)
        outcomes.append(outcome)
    return outcomes


def _write(file: Path, outcome: Outcome) -> None:
    told = {"schema": SCHEMA, **asdict(outcome)}
    replace_file(file, json.dumps(told, indent=1, allow_nan=False).encode())


def _read(file: Path) -> Outcome:
    try:
        told = json.loads(file.read_bytes())
        if told.pop("schema") != SCHEMA:
            raise ValueError(f"it does not say that it is {SCHEMA}")
        return Outcome(**told)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
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
