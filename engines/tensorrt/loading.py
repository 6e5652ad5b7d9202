"""Plans from the cache to engines: which ones fit here, and only those that were proven here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from recallseg.engines.device import DeviceFacts, open_device
from recallseg.engines.engine import Engine, EngineOptions
from recallseg.engines.errors import EngineUnavailableError, VerificationError
from recallseg.engines.proof import prove
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.building import VARIANTS
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import Plan, PlanCache
from recallseg.engines.tensorrt.profile import Profile

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.tensorrt.engine import TensorRt

__all__ = ["find_plans", "load_verified"]


def load_verified(
    kind: type[TensorRt],
    bundle: Bundle,
    precision: str,
    options: EngineOptions,
    graphs: tuple[str, ...],
    cache: PlanCache | None = None,
) -> dict[str, Engine]:
    """Return engines of plans that reproduced the bundle's golden tensors on this GPU.

    Plans that nobody verified here yet are verified now, all five together, and the outcome is
    stored beside them.

    Raises
    ------
    EngineUnavailableError
        If TensorRT, the GPU or a complete set of plans is missing.
    PlanError
        If a plan is damaged or not taken by this TensorRT.
    VerificationError
        If a plan was refused, now or before; with the tensor and its error.
    """
    flavour = FLAVOURS[kind.name]
    version = str(flavour.load().__version__)
    gpu = options.device or open_device()
    device = gpu.facts
    plans = find_plans(bundle, kind.name, precision, version, device, cache or PlanCache())

    def make(wanted: tuple[str, ...]) -> dict[str, TensorRt]:
        made = {}
        for graph in wanted:
            path, _ = bundle.graph_file(graph, VARIANTS, precision)
            made[graph] = kind(bundle.specs[graph], plans[graph], gpu, path, options)
            made[graph].graph_digest = plans[graph].key.graph_digest
        return made

    known = {
        graph: plan.verdicts.find(str(device), bundle.golden_digest)
        for graph, plan in plans.items()
    }
    for graph in graphs:
        verdict = known[graph]
        if verdict is not None and not verdict.passed:
            raise VerificationError(
                f"the {kind.name} plan of graph '{graph}' in {precision} was refused on {device}: "
                f"{verdict.reason}. Choose another precision, or build it again: recallseg build "
                "--rebuild."
            )
    proven = all(verdict is not None for graph, verdict in known.items() if graph in graphs)
    # What a plan does when it is recorded and replayed is asked at every start: it takes as long as
    # one query, and is in no record.
    if proven and not options.cuda_graphs:
        return dict(make(graphs))
    engines = make(GRAPHS)
    most = Profile.from_json(plans["attend"].key.profile).k.most
    verdicts = prove(bundle, engines, precision, str(device), most=most)
    for _ in range(2 if options.cuda_graphs else 0):
        if all(verdict.passed for verdict in verdicts.values()):
            verdicts = prove(bundle, engines, precision, str(device), most=most)
    for graph, verdict in verdicts.items():
        plans[graph].verdicts.record(verdict)
    refused = [verdict for verdict in verdicts.values() if not verdict.passed]
    if refused:
        raise VerificationError(
            f"engine '{kind.name}' in {precision} is not used on {device}: {refused[0].reason}. "
            "Choose another precision, or build it again: recallseg build --rebuild."
        )
    return {graph: engines[graph] for graph in graphs}


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
    digests = {}
    for graph in GRAPHS:
        _, variant = bundle.graph_file(graph, VARIANTS, precision)
        digests[graph] = bundle.graph_digest(graph, variant, precision)
    sets: dict[str, dict[str, Plan]] = {}
    others: set[str] = set()
    for plan in cache.entries():  # oldest first: a newer one replaces it in its set
        key = plan.key
        if key.engine != engine or key.graph_digest != digests.get(key.graph):
            continue
        if key.precision != precision:
            continue
        if not _runs(key.version, version, key.target, device):
            others.add(f"{key.version} for {key.target}")
            continue
        name = f"{key.target} {key.profile} {key.options} {key.version}"
        sets.setdefault(name, {})[key.graph] = plan
    whole = [plans for plans in sets.values() if set(plans) == set(GRAPHS)]
    if not whole:
        found = f"; there are plans of {', '.join(sorted(others))}" if others else ""
        raise EngineUnavailableError(
            f"there is no complete set of {engine} {version} plans of bundle {bundle.name} in "
            f"{precision} for {device}{found}. Build it: recallseg build {bundle.path} "
            f"--engine {engine} --precision {precision}."
        )

    def rank(plans: Mapping[str, Plan]) -> tuple[bool, int, int, str]:
        profile = Profile.from_json(plans["attend"].key.profile)
        states = {plan.verdicts.states.get(str(device)) for plan in plans.values()}
        newest = max(str(plan.made.get("time", "")) for plan in plans.values())
        return "refused" not in states, profile.k.most, profile.n.most, newest

    return max(whole, key=rank)


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
