"""Plans from the cache to engines: which ones fit here, and only those that were proven here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from recallseg.engines.device import DeviceFacts, open_device
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.proof import Candidate
from recallseg.engines.tensorrt.building import VARIANTS
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import Plan, PlanCache, PlanKey
from recallseg.engines.tensorrt.profile import Profile

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.tensorrt.engine import TensorRt

__all__ = ["Plans", "RecordedPlans", "find_plans", "has_plans", "recorded_plans"]


@dataclass(frozen=True)
class RecordedPlans:
    """What a set of plans says of itself: nothing of it was measured.

    Attributes
    ----------
    version, target : of TensorRT, and what they were built for.
    n, k : the most that they take.
    works_in : bytes that each graph's plan works in, whatever is asked of it.
    """

    version: str
    target: str
    n: int
    k: int
    works_in: Mapping[str, int]


class Plans(Candidate):
    """The best set of plans for this GPU, each with a record beside it.

    Parameters
    ----------
    kind, bundle, precision : what runs them, and of what.
    options : see :class:`Candidate`; without a device, the first GPU is opened.

    Raises
    ------
    EngineUnavailableError
        If TensorRT, the GPU or a complete set of plans is missing.
    """

    again = "build it again: recallseg build --rebuild"

    def __init__(
        self, kind: type[TensorRt], bundle: Bundle, precision: str, options: EngineOptions
    ) -> None:
        version = str(FLAVOURS[kind.name].load().__version__)
        self._kind, self._gpu = kind, options.device or open_device()
        super().__init__(kind.name, bundle, precision, replace(options, device=self._gpu))
        facts = self._gpu.facts
        self._plans = find_plans(bundle, kind.name, precision, version, facts, PlanCache())
        self.graphs = bundle.graphs_for(VARIANTS, precision)
        self.records = {(graph,): self._plans[graph].verdicts for graph in self.graphs}
        self.most = Profile.from_json(self._plans["attend"].key.profile).k.most
        # What a plan does when it is recorded and replayed is asked at every start: it takes as
        # long as one query, and is in no record.
        self.always = options.cuda_graphs
        self._made: dict[str, TensorRt] = {}

    def make(self, graphs: tuple[str, ...]) -> Mapping[str, TensorRt]:
        """Return engines; those that were proven are used."""
        for graph in graphs:
            if graph not in self._made:
                path, _ = self.bundle.graph_file(graph, VARIANTS, self.precision)
                plan, spec = self._plans[graph], self.bundle.specs[graph]
                self._made[graph] = self._kind(spec, plan, self._gpu, path, self.options)
                self._made[graph].graph_digest = plan.key.graph_digest
        return {graph: self._made[graph] for graph in graphs}


def find_plans(
    bundle: Bundle, engine: str, precision: str, version: str, device: DeviceFacts, cache: PlanCache
) -> Mapping[str, Plan]:
    """Return the best complete set of plans for this device.

    A set has one target, profile and options. Sets with a refused plan come last; then the larger
    profile and the newer set are preferred.

    Raises
    ------
    EngineUnavailableError
        If there is none, saying what was found instead.
    BundleError
        If the bundle has no graphs in this precision.
    """
    others: set[str] = set()

    def runs(key: PlanKey) -> bool:
        if _runs(key.version, version, key.target, device):
            return True
        others.add(f"{key.version} for {key.target}")
        return False

    whole = _whole_sets(bundle, engine, precision, cache, runs)
    if not whole:
        found = f"; there are plans of {', '.join(sorted(others))}" if others else ""
        raise EngineUnavailableError(
            f"there is no complete set of {engine} {version} plans of bundle {bundle.name} in "
            f"{precision} for {device}{found}. Build it: recallseg build {bundle.path} "
            f"--engine {engine} --precision {precision}."
        )

    def rank(plans: Mapping[str, Plan]) -> tuple[bool, int, int, str]:
        states = {plan.verdicts.states.get(str(device)) for plan in plans.values()}
        return "refused" not in states, *_reach(plans)

    return max(whole, key=rank)


def recorded_plans(
    bundle: Bundle, engine: str, precision: str, cache: PlanCache | None = None
) -> RecordedPlans | None:
    """Return what the plans that lie in the cache say they work in; None if they say nothing.

    Of several whole sets that of the largest profile, then the newest, as one of them is chosen
    where they run. Nothing but their records is read.

    Raises
    ------
    BundleError
        If the bundle has no graphs in this precision.
    """
    found = _whole_sets(bundle, engine, precision, cache or PlanCache(), lambda key: True)
    said = [
        plans
        for plans in found
        if all(isinstance(plan.made.get("activation_bytes"), int) for plan in plans.values())
    ]
    if not said:
        return None
    plans = max(said, key=_reach)
    key = plans["attend"].key
    profile = Profile.from_json(key.profile)
    works_in = {graph: int(plan.made["activation_bytes"]) for graph, plan in plans.items()}
    return RecordedPlans(key.version, key.target, profile.n.most, profile.k.most, works_in)


def has_plans(bundle: Bundle, engine: str, precision: str) -> bool:
    """Whether a whole set of plans lies in the cache, for whatever GPU."""
    return bool(_whole_sets(bundle, engine, precision, PlanCache(), lambda key: True))


def _reach(plans: Mapping[str, Plan]) -> tuple[int, int, str]:
    profile = Profile.from_json(plans["attend"].key.profile)
    newest = max(str(plan.made.get("time", "")) for plan in plans.values())
    return profile.k.most, profile.n.most, newest


def _whole_sets(
    bundle: Bundle, engine: str, precision: str, cache: PlanCache, fits: Callable[[PlanKey], bool]
) -> list[Mapping[str, Plan]]:
    """Return the sets that have a plan of each of the bundle's graphs."""
    digests = {}
    graphs = bundle.graphs_for(VARIANTS, precision)
    for graph in graphs:
        _, variant = bundle.graph_file(graph, VARIANTS, precision)
        digests[graph] = bundle.graph_digest(graph, variant, precision)
    sets: dict[str, dict[str, Plan]] = {}
    for plan in cache.entries():  # oldest first: a newer one replaces it in its set
        key = plan.key
        if key.engine != engine or key.graph_digest != digests.get(key.graph):
            continue
        if key.precision == precision and fits(key):
            name = f"{key.target} {key.profile} {key.options} {key.version}"
            sets.setdefault(name, {})[key.graph] = plan
    return [plans for plans in sets.values() if set(plans) == set(graphs)]


def _runs(made: str, here: str, target: str, device: DeviceFacts) -> bool:
    """Whether a plan of version ``made`` for ``target`` may be loaded by version ``here``."""
    names, _, gpu = target.partition(" on ")
    targets = names.split(",")
    if made != here:
        newer = [int(part) for part in here.split(".")] >= [int(part) for part in made.split(".")]
        if not ("version" in targets and newer and made.split(".")[0] == here.split(".")[0]):
            return False
    if "ampere+" in targets:
        return device.capability >= 80
    if "same-capability" in targets:
        return gpu.split(" ")[0] == f"sm{device.capability}"
    if gpu:
        return gpu == device.gpu
    return f"sm{device.capability}" in targets
