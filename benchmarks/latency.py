"""``bench latency``: a query's time by stage at every k and n, beside PyTorch, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from recallseg.benchmarks.energy import EnergyMeter, find_meter
from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.interleave import Recording, measure, ratios
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.probe import probe
from recallseg.benchmarks.schema import (
    ColdStart,
    Energy,
    Memory,
    Quality,
    Ratio,
    Report,
    Run,
)
from recallseg.benchmarks.subjects import (
    RuntimeChoice,
    RuntimeSubject,
    Subject,
    open_segmenter,
    portable_only,
)
from recallseg.benchmarks.workload import (
    DESCRIPTION,
    SPARE,
    fill_library,
    query_images,
    structure_names,
)
from recallseg.engines.bundle import Bundle
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import InputError
from recallseg.engines.precisions import find_precision
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import relative_error, verify_engines
from recallseg.runtime.library import Library

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BASELINES", "LatencyPlan", "run_latency"]

PORTABLE = "portable"
BASELINES = (
    "torch-cached", "torch-paper", "torch-compile", "torch-cached-fp16", "torch-compile-fp16",
    "torch-graphs-fp16", PORTABLE,
)  # fmt: skip
DIFFERENCE_TOLERANCE = 1e-2
"""Largest relative difference of a baseline's logits to the runtime's before a report warns: both
compute the same thing; memories rounded to fp16 give about 5e-4."""

MOST_IMAGES = 64
"""Different queries; longer runs show them again. A thousand would fill the memory of a Jetson."""

Step = Callable[[str], None]


@dataclass(frozen=True)
class LatencyPlan:
    """What to measure.

    Attributes
    ----------
    choices : configurations of the runtime; ratios are computed for each.
    ks, ns : numbers of recalled exemplars and of structures.
    queries : rounds of each combination.
    baselines : names among :data:`BASELINES`.
    seconds : for one baseline at one (k, n); slow ones run in fewer rounds.
    threads : CPU threads of everything.
    side : of the queries in pixels.
    dice : by precision, from an evaluation made elsewhere.
    sam2, dinov2 : checkpoints of pretrained bundles, for the baselines.
    torch_device : where PyTorch's baselines run, ``cpu`` or ``cuda``.
    cold_starts : measure cold start and resident memory, in processes of their own.
    most_seconds : for all queries of one combination; None for no limit.
    """

    choices: tuple[RuntimeChoice, ...]
    ks: tuple[int, ...]
    ns: tuple[int, ...]
    queries: int = 20
    baselines: tuple[str, ...] = ()
    seconds: float = 120.0
    threads: int = 1
    side: int = 512
    dice: Mapping[str, float] = field(default_factory=dict)
    sam2: str | None = None
    dinov2: str | None = None
    torch_device: str = "cpu"
    cold_starts: bool = True
    most_seconds: float | None = None

    def check(self, bundle: Bundle) -> None:
        """Raise InputError if this bundle cannot be measured so."""
        g = bundle.geometry
        if max(self.ks) > g.max_k or max(self.ns) > g.max_n:
            raise InputError(
                f"bundle {bundle.name} takes at most k = {g.max_k} and {g.max_n} structures, asked "
                f"for {max(self.ks)} and {max(self.ns)}. Ask for fewer."
            )
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise InputError(f"there is no baseline '{unknown[0]}'; choose {', '.join(BASELINES)}.")
        if PORTABLE in self.baselines and self.choices[0].variant(bundle) == PORTABLE:
            raise InputError(
                f"bundle {bundle.name} has no other graphs for {self.choices[0].name} than the "
                "portable ones: there is nothing to compare them with. Leave that baseline out."
            )
        if self.queries < 1:
            raise InputError(f"queries must be at least 1, got {self.queries}.")

    @property
    def torch_baselines(self) -> tuple[str, ...]:
        """The baselines that need PyTorch."""
        return tuple(name for name in self.baselines if name != PORTABLE)

    @property
    def measured(self) -> tuple[RuntimeChoice, ...]:
        """Every configuration of the runtime that is run: the choices, then the portable one."""
        extra = (replace(self.choices[0], portable=True),) if PORTABLE in self.baselines else ()
        return (*self.choices, *extra)

    def to_json(self) -> dict[str, Any]:
        """Return the settings for the report."""
        return {
            "runtimes": [choice.name for choice in self.choices],
            "k": list(self.ks),
            "structures": list(self.ns),
            "queries": self.queries,
            "baselines": list(self.baselines),
            "seconds_per_baseline": self.seconds,
            "threads": self.threads,
            "query_size": [self.side, self.side],
            "queries_are": DESCRIPTION,
            "order": "all in turns, the order reversed in every other round",
        }


def run_latency(bundle: Bundle, plan: LatencyPlan, step: Step = lambda what: None) -> Report:
    """Measure a bundle.

    Parameters
    ----------
    bundle, plan : what to measure.
    step : told what begins.

    Raises
    ------
    InputError
        If the plan does not fit the bundle, or a baseline's weights are not the bundle's.
    ModuleNotFoundError
        If a PyTorch baseline is asked for and torch is not installed.
    EngineUnavailableError, EngineRunError, VerificationError, BundleError
    """
    plan.check(bundle)
    conditions, watch = describe_conditions(), Watch()
    modules = None
    if plan.torch_baselines:
        step("load the bundle's weights into PyTorch")
        from recallseg.benchmarks.torch_baseline import load_modules

        modules = load_modules(bundle, plan.sam2, plan.dinov2)
    known = {choice.name: _examine(bundle, choice, plan, step) for choice in plan.measured}
    runs: list[Run] = []
    found: list[Ratio] = []
    meter = find_meter()
    with TemporaryDirectory(prefix="recallseg-bench-") as folder:
        library = Path(folder) / "library"
        first = plan.choices[0]
        fill_library(
            library,
            bundle,
            exemplars=max(plan.ks) + SPARE,
            structures=max(plan.ns),
            side=plan.side,
            engine=first.engine,
            precision=first.precision,
            threads=plan.threads,
            progress=lambda key: step(f"add {key}"),
        )
        bench = _Bench(bundle, plan, library, modules, meter, known, step)
        for k in plan.ks:
            more, compared = bench.configurations(k)
            runs += more
            found += compared
    if meter is not None:
        meter.close()
    conditions |= watch.stop()
    return Report(
        kind="latency",
        **head(conditions),
        settings=plan.to_json(),
        bundle=bundle_facts(bundle),
        runs=tuple(runs),
        ratios=tuple(found),
    )


class _Bench:
    """What all combinations of k and n share."""

    def __init__(
        self,
        bundle: Bundle,
        plan: LatencyPlan,
        library: Path,
        modules: Mapping[str, nn.Module] | None,
        meter: EnergyMeter | None,
        known: Mapping[str, _Known],
        step: Step,
    ) -> None:
        self.bundle, self.plan, self.library = bundle, plan, library
        self.modules, self.meter, self.known, self.step = modules, meter, known, step
        self.images = query_images(min(plan.queries, MOST_IMAGES), plan.side)

    def configurations(self, k: int) -> tuple[list[Run], list[Ratio]]:
        """Measure one k with every number of structures, all in turns."""
        plan = self.plan
        probed = {}
        for n in plan.ns if plan.cold_starts else ():
            for choice in plan.measured:
                self.step(f"k = {k}, n = {n}: cold start and memory, {choice.name}")
                probed[n, choice.name] = probe(
                    self.library, self.bundle.path, choice.to_json(),
                    k=k, structures=structure_names(n), side=plan.side,
                )  # fmt: skip
        self.step(f"k = {k}: prepare")
        subjects = {n: self._subjects(k, structure_names(n)) for n in plan.ns}
        recorded = measure(
            [subject for each in subjects.values() for subject in each],
            self.images,
            rounds=plan.queries,
            seconds=plan.seconds,
            most_seconds=plan.most_seconds,
            meter=self.meter,
            progress=lambda name: self.step(f"k = {k}: {name}"),
        )
        runs: list[Run] = []
        compared: list[Ratio] = []
        own = len(plan.choices)
        for n, each in subjects.items():
            recordings, recorded = recorded[: len(each)], recorded[len(each) :]
            runs += [
                self._run(subject, recording, recordings[0], k, n, probed.get((n, subject.name)))
                for subject, recording in zip(each, recordings, strict=True)
            ]
            for subject, recording in zip(each[:own], recordings[:own], strict=True):
                for baseline, other in zip(each[own:], recordings[own:], strict=True):
                    compared += ratios(subject.name, recording, baseline.name, other, k=k, n=n)
        return runs, compared

    def _subjects(self, k: int, names: Sequence[str]) -> list[Subject]:
        subjects: list[Subject] = [
            RuntimeSubject(
                choice, open_segmenter(self.library, self.bundle, choice, k=k, structures=names)
            )
            for choice in self.plan.measured
        ]
        if self.modules is not None:
            from recallseg.benchmarks.torch_baseline import TorchBaseline

            with Library.open(self.library, self.bundle) as library:
                for name in self.plan.torch_baselines:
                    subjects.append(
                        TorchBaseline(
                            name,
                            self.modules,
                            library,
                            k=k,
                            structures=names,
                            threads=self.plan.threads,
                            device=self.plan.torch_device,
                        )
                    )
        return subjects

    def _run(
        self,
        subject: Subject,
        recording: Recording,
        reference: Recording,
        k: int,
        n: int,
        probed: Mapping[str, Any] | None,
    ) -> Run:
        choice = {choice.name: choice for choice in self.plan.measured}.get(subject.name)
        elsewhere = _Known(Quality(), self.plan.torch_device, None, None)
        known = self.known.get(subject.name, elsewhere)
        stages = recording.distributions()
        remarks = list(subject.remarks)
        precision = choice.precision if choice else getattr(subject, "precision", "fp32")
        difference = relative_error(recording.logits[:n], reference.logits[:n])
        limit = max(DIFFERENCE_TOLERANCE, find_precision(precision).tolerance)
        if not difference <= limit:
            remarks.append(
                f"its logits differ from those of {self.plan.choices[0].name} by {difference:.1e} "
                f"(relative, at most {limit:g} is expected): these are not the same computation"
            )
        energy = None
        if self.meter is not None and recording.joules:
            energy = Energy(round(median(recording.joules), 4), self.meter.source)
        return Run(
            subject=subject.name,
            role=subject.role,
            engine=choice.engine if choice else "torch",
            precision=precision,
            variant=known.variant,
            device=known.device,
            cuda_graph=known.cuda_graph,
            threads=self.plan.threads,
            k=k,
            n=n,
            image_size=self.bundle.geometry.image_size,
            rounds=tuple(recording.rounds),
            stages=stages,
            throughput=round(1e3 / stages["total"].mean, 4),
            memory=_memory(probed),
            cold_start=_cold_start(probed),
            device_use=subject.device_use if isinstance(subject, RuntimeSubject) else None,
            energy=energy,
            quality=replace(
                known.quality,
                logit_difference=_digits(difference) if isfinite(difference) else None,
            ),
            remarks=tuple(remarks),
        )


@dataclass(frozen=True)
class _Known:
    """What is known of a runtime before it is timed."""

    quality: Quality
    device: str
    cuda_graph: bool | None
    variant: str | None


def _examine(bundle: Bundle, choice: RuntimeChoice, plan: LatencyPlan, step: Step) -> _Known:
    step(f"verify {choice.name} against the golden tensors")
    shown = portable_only(bundle) if choice.portable else bundle
    engines = load_engines(
        shown,
        choice.engine,
        choice.precision,
        options=EngineOptions(choice.threads, cuda_graphs=choice.cuda_graphs),
    )
    verified = verify_engines(shown, engines, choice.precision)
    *tensors, masks = verified.checks
    parity = [
        float(entry["error"])
        for entry in bundle.manifest.get("parity", ())
        if entry.get("precision", "fp32") == choice.precision
    ]
    told = engines["attend"].describe()
    return _Known(
        Quality(
            parity_error=_digits(max(parity)) if parity else None,
            golden_error=_digits(max(check.error for check in tensors)),
            golden_dice=round(1.0 - masks.error, 5),
            dice=plan.dice.get(choice.precision),
        ),
        device=str(told.get("device", "cpu")),
        cuda_graph=told.get("cuda_graph"),
        variant=choice.variant(bundle),
    )


def _digits(value: float) -> float:
    """Return an error with the three digits that it is worth."""
    return float(f"{value:.3g}")


def _memory(probed: Mapping[str, Any] | None) -> Memory | None:
    if probed is None:
        return None
    return Memory(probed["resident_peak"], probed["resident_growth"], probed["workspace"])


def _cold_start(probed: Mapping[str, Any] | None) -> ColdStart | None:
    if probed is None:
        return None
    return ColdStart(probed["imported_s"], probed["ready_s"], probed["first_result_s"])
