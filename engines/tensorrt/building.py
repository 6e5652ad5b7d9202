"""A bundle's graphs as plans in the cache: builds what is missing, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from recallseg.engines.bundle import Bundle
from recallseg.engines.device import open_device
from recallseg.engines.errors import InputError
from recallseg.engines.golden import GoldenTensors
from recallseg.engines.tensorrt.builder import BuildRequest, build_plan
from recallseg.engines.tensorrt.plans import Plan, PlanCache, PlanKey

__all__ = ["VARIANTS", "BuiltGraph", "build_bundle", "plan_key"]

VARIANTS = ("tensorrt", "portable")
"""Graph variants that TensorRT takes, best first."""

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class BuiltGraph:
    """One graph's plan; ``fresh`` when it was built just now and not found in the cache."""

    graph: str
    variant: str
    plan: Plan
    fresh: bool


def plan_key(
    bundle: Bundle, graph: str, request: BuildRequest, version: str
) -> tuple[PlanKey, Path, str]:
    """Return the key of one graph's plan, the graph's checked file, and its variant.

    Raises
    ------
    BundleError
        If the bundle has no such graph in the request's precision, or the file was changed.
    """
    path, variant = bundle.graph_file(graph, VARIANTS, request.precision)
    key = PlanKey(
        graph,
        bundle.graph_digest(graph, variant, request.precision),
        request.flavour.name,
        version,
        request.precision,
        str(request.target),
        request.profile.to_json(),
        {"stripped": request.strip_weights, "workspace": request.workspace_bytes},
    )
    return key, path, variant


def build_bundle(
    bundle: Bundle,
    request: BuildRequest,
    *,
    graphs: tuple[str, ...] | None = None,
    cache: PlanCache | None = None,
    rebuild: bool = False,
    report: Report = lambda graph, step: None,
) -> Iterator[BuiltGraph]:
    """Yield the plan of each graph as soon as it is there.

    Parameters
    ----------
    bundle : whose graphs; each file is compared with its digest.
    request : what to build; a target that follows the GPU gets this machine's.
    graphs : which; None for all that the bundle has in this precision.
    cache : the user's by default.
    rebuild : build again what is there already.
    report : is told the graph and what happens to it.

    Raises
    ------
    InputError
        If the profile is larger than the graphs, or smaller than the golden case.
    BundleError, EngineUnavailableError, EngineRunError
        From the bundle and the builder; plans that were built before stay.
    PlanError
        If the cache cannot be written.
    """
    cache = cache or PlanCache()
    request.profile.check(bundle.geometry)
    exemplars, structures = GoldenTensors.load(bundle.golden_file).case.masks.shape[:2]
    if exemplars not in request.profile.k or structures not in request.profile.n:
        raise InputError(
            f"the profile ({request.profile}) does not hold the bundle's golden case, with which "
            f"plans are verified: n = {structures}, k = {exemplars}. Ask for at least that."
        )
    version = str(request.flavour.load().__version__)
    if not request.flavour.is_rtx and request.target.follows_gpu:
        target = replace(request.target, gpu=open_device().facts.gpu)
        request = replace(request, target=target)
    for graph in graphs or bundle.graphs_for(VARIANTS, request.precision):
        key, path, variant = plan_key(bundle, graph, request, version)
        report(graph, "look in the cache")
        with cache.building(key):
            plan = None if rebuild else cache.find(key)
            fresh = plan is None
            if plan is None:
                built = build_plan(path, bundle.specs[graph], request, partial(report, graph))
                made = {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "seconds": round(built.seconds, 3),
                    "layers": built.layers,
                    "kernels": built.kernels,
                    "activation_bytes": built.activation_bytes,
                    "messages": list(built.messages),
                    "bundle": bundle.name,
                    "identity": bundle.identity,
                    "variant": variant,
                }
                plan = cache.store(key, built.plan, made)
        yield BuiltGraph(graph, variant, plan, fresh)
