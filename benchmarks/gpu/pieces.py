"""The pieces of ``bench gpu``, in the order of their worth."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from recallseg.benchmarks.gpu.adding import measure_adding
from recallseg.benchmarks.gpu.device_tests import files_of, run_tests
from recallseg.benchmarks.gpu.graphs import measure_graphs
from recallseg.benchmarks.gpu.in_flight import IN_FLIGHT, measure_in_flight
from recallseg.benchmarks.gpu.kernels import measure_kernels
from recallseg.benchmarks.latency import LatencyPlan, run_latency
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.engines.bundle import Bundle
from recallseg.engines.device import open_device
from recallseg.engines.device.device import PROVIDERS
from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.errors import (
    BundleError,
    EngineUnavailableError,
    InputError,
    RecallSegError,
)
from recallseg.engines.registry import engine_class
from recallseg.engines.tensorrt.builder import BuildRequest
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.loading import has_plans
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.tensorrt.targets import Target
from recallseg.runtime.reports.machine import describe_machine, package_versions
from recallseg.runtime.services.doctor import diagnose

__all__ = ["GpuPlan", "Piece", "pieces_of"]

Step = Callable[[str], None]

TESTS_MINUTES = 3.0
"""For one file of tests marked gpu."""
ADDING_SECONDS = 45.0
PLANS_MINUTES = 4.0
"""For a bundle's six plans, which take seconds each on an idle machine."""
USUAL_K = 4
OVERHEAD_MINUTES = 2.0
"""To load engines three times, prove them once, make a library and start a process."""
COMPILE_MINUTES = 3.0
"""For torch.compile, of four graphs."""


@dataclass(frozen=True)
class GpuPlan:
    """What to measure.

    Attributes
    ----------
    bundles : folders; one for each image size.
    engines, precisions, ks, ns : every combination is measured, with CUDA graphs and without; best
        first.
    queries : of each combination; at least 1,000 for figures of the tail.
    most_seconds : for the queries of one combination; slow ones get fewer, and say so.
    baselines : PyTorch's, each beside the first engine and precision that run here, with CUDA
        graphs where there are any.
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

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        told = asdict(self)
        tests = None if self.tests is None else str(self.tests)
        return {**told, "bundles": [str(path) for path in self.bundles], "tests": tests}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> GpuPlan:
        """Return what :meth:`to_json` made it of."""
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        paths = {
            "bundles": tuple(map(Path, told["bundles"])),
            "tests": None if told["tests"] is None else Path(told["tests"]),
        }
        return cls(**{**told, **lists, **paths})


@dataclass(frozen=True)
class Piece:
    """A file to be made: its name without ``.json``, and what makes its contents.

    ``minutes`` is what it may take. ``check`` raises EngineUnavailableError if it needs no process
    to say that this machine or the bundle lacks what it wants.
    """

    name: str
    measure: Callable[[Step], Any]
    minutes: float = 1.0
    check: Callable[[], object] = lambda: None


def pieces_of(plan: GpuPlan) -> Iterator[Piece]:
    """Yield all pieces, in the order in which they are worth a GPU's time.

    First what says whether the rest makes sense, and whether the process survives; then, for the
    first precision, recorded where that can be, and the usual k: whole queries, the tests, what
    PyTorch does, kernels, several queries in flight, and the other k, which is what the goals need.
    Then the same of all else, and last each graph alone.
    """
    yield Piece("machine", lambda step: _machine())
    yield _of_adding(plan, plan.bundles[-1])
    choices = [
        RuntimeChoice(engine, precision, None, cuda_graphs=cuda_graphs)
        for cuda_graphs in (True, False)
        for precision in plan.precisions
        for engine in plan.engines
        if not cuda_graphs or _on_gpu(engine)
    ]
    usual = _usual(plan)
    others = sorted({*plan.ks} - {usual})
    first = [c for c in choices if c.precision == plan.precisions[0] and _is_best(c)]
    yield from _of_choices(plan, first, [usual])
    yield from _of_tests(plan)
    yield from _of_baselines(plan, usual)
    yield Piece("kernels", measure_kernels, 2.0)
    yield from _of_choices(plan, first, others, flights=True)
    rest = [choice for choice in choices if choice not in first]
    yield from _of_choices(plan, rest, [usual, *others], flights=True)
    for k in others:
        yield from _of_baselines(plan, k)
    for folder in plan.bundles:
        for choice in choices:
            if _on_gpu(choice.engine):
                yield _of_graphs(plan, folder, choice)


def _usual(plan: GpuPlan) -> int:
    return USUAL_K if USUAL_K in plan.ks else min(plan.ks)


def _is_best(choice: RuntimeChoice) -> bool:
    """Whether nothing is left out that makes its engine faster."""
    return choice.cuda_graphs or not _on_gpu(choice.engine)


def _of_choices(
    plan: GpuPlan, choices: Sequence[RuntimeChoice], ks: Sequence[int], *, flights: bool = False
) -> Iterator[Piece]:
    """Yield whole queries at every k, plans before they are asked, and queries in flight."""
    for choice in choices:
        for folder in plan.bundles:
            for k in ks:
                if choice.engine in FLAVOURS and choice.cuda_graphs and k == _usual(plan):
                    yield _of_plans(folder, choice)
                yield _of_queries(plan, folder, choice, k)
            if flights and _on_gpu(choice.engine):
                yield _of_flights(plan, folder, choice)


def _of_baselines(plan: GpuPlan, k: int) -> Iterator[Piece]:
    for folder in plan.bundles:
        for baseline in plan.baselines:
            for n in plan.ns:
                yield _of_baseline(plan, folder, baseline, k, n)


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
        cold_starts=k == _usual(plan),
    )
    minutes = OVERHEAD_MINUTES + len(plan.ns) * plan.most_seconds / 60.0
    name = f"queries-{_stem(folder, choice)}-k{k}"
    return Piece(name, _latency(folder, latency), minutes, lambda: _ready(folder, choice))


def _of_baseline(plan: GpuPlan, folder: Path, baseline: str, k: int, n: int) -> Piece:
    def measure(choice: RuntimeChoice, step: Step) -> Any:
        latency = LatencyPlan(
            choices=(choice,),
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
        return _latency(folder, latency)(step)

    minutes = OVERHEAD_MINUTES + COMPILE_MINUTES + (plan.most_seconds + plan.seconds) / 60.0
    name = f"baseline-{folder.name}-{baseline}-k{k}-n{n}"
    return Piece(name, partial(_with_the_first, plan, folder, True, measure), minutes)


def _of_adding(plan: GpuPlan, folder: Path) -> Piece:
    def measure(choice: RuntimeChoice, step: Step) -> Any:
        return measure_adding(_bundle(folder, choice), choice, seconds=ADDING_SECONDS, step=step)

    minutes = OVERHEAD_MINUTES + ADDING_SECONDS / 60.0
    name = f"adding-{folder.name}"
    return Piece(name, partial(_with_the_first, plan, folder, False, measure), minutes)


def _with_the_first(
    plan: GpuPlan,
    folder: Path,
    cuda_graphs: bool,
    measure: Callable[[RuntimeChoice, Step], Any],
    step: Step,
) -> Any:
    """Measure with the first engine, in the first precision, that this machine and bundle have."""
    why = EngineUnavailableError("no engine was asked for.")
    for engine, precision in product(plan.engines, plan.precisions):
        recorded = cuda_graphs and _on_gpu(engine)
        choice = RuntimeChoice(engine, precision, None, cuda_graphs=recorded)
        try:
            _ready(folder, choice)
            return measure(choice, step)
        except EngineUnavailableError as error:
            why = error
    raise why


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
        lambda: _ready(folder, choice),
    )  # fmt: skip


def _of_flights(plan: GpuPlan, folder: Path, choice: RuntimeChoice) -> Piece:
    seconds = plan.most_seconds / (len(IN_FLIGHT) * len(plan.ns))
    k = _usual(plan)
    return Piece(
        f"flights-{_stem(folder, choice)}",
        lambda step: measure_in_flight(
            _bundle(folder, choice), choice, plan.ns,
            k=k, queries=plan.queries, seconds=seconds, step=step,
        ),
        OVERHEAD_MINUTES + plan.most_seconds / 60.0,
        lambda: _ready(folder, choice),
    )  # fmt: skip


def _of_plans(folder: Path, choice: RuntimeChoice) -> Piece:
    """Build the plans that the pieces behind it need, for this very GPU."""

    def build(step: Step) -> dict[str, Any]:
        flavour = FLAVOURS[choice.engine]
        gpu = f"sm{open_device().facts.capability}"
        try:
            target = Target.parse((gpu,) if flavour.is_rtx else None, flavour)
        except InputError as error:  # of a GPU that it does not know
            raise EngineUnavailableError(str(error)) from error
        request = BuildRequest(flavour, choice.precision, Profile(), target)
        return {
            built.graph: {"fresh": built.fresh, "bytes": built.plan.size, **built.plan.made}
            for built in build_bundle(
                _bundle(folder, choice), request, report=lambda *words: step(": ".join(words))
            )
        }

    name = f"plans-{folder.name}-{choice.engine}-{choice.precision}"
    return Piece(name, build, PLANS_MINUTES, lambda: _bundle(folder, choice))


def _of_tests(plan: GpuPlan) -> Iterator[Piece]:
    folder = plan.tests
    if folder is None:
        return
    if not folder.is_dir():
        raise InputError(f"there are no tests at {folder}.")
    for file in files_of(folder):
        name = "-".join(file.relative_to(folder).with_suffix("").parts)
        yield Piece(
            f"tests-{name}",
            partial(_run_tests, file, folder),
            TESTS_MINUTES + 1.0,
        )


def _run_tests(file: Path, folder: Path, step: Step) -> Any:
    return run_tests(file, folder, 60.0 * TESTS_MINUTES)


def _bundle(folder: Path, choice: RuntimeChoice) -> Bundle:
    """Open a bundle; EngineUnavailableError if it, the engine or this machine lacks something."""
    bundle = Bundle.open(folder)
    kind = engine_class(choice.engine)
    if issubclass(kind, DeviceEngine):
        kind.require_library()
    offered = getattr(kind, "precisions", (choice.precision,))
    if choice.precision not in offered:
        raise EngineUnavailableError(f"'{choice.engine}' offers {', '.join(offered)} only.")
    try:
        choice.variant(bundle)
    except BundleError as error:
        raise EngineUnavailableError(str(error)) from error
    return bundle


def _ready(folder: Path, choice: RuntimeChoice) -> None:
    """Raise EngineUnavailableError where it needs no GPU to tell that something is missing."""
    bundle = _bundle(folder, choice)
    if choice.engine in FLAVOURS and not has_plans(bundle, choice.engine, choice.precision):
        raise EngineUnavailableError(
            f"there are no plans of bundle {bundle.name} for '{choice.engine}' in "
            f"{choice.precision}: see the piece 'plans-...'."
        )


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
