"""``recallseg doctor``: whether it can run here, and if not, what is missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.common import JsonOption, emit_json, say

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.tensorrt.loading import RecordedPlans

__all__ = ["doctor"]


def doctor(
    self_test: Annotated[
        bool,
        typer.Option("--self-test/--no-self-test", help="Run the shipped bundles' golden cases."),
    ] = True,
    budget: Annotated[
        bool, typer.Option("--budget", help="Say how much memory k, n and S need, and stop.")
    ] = False,
    bundle: Annotated[
        str, typer.Option("--bundle", help="For --budget: folder or shipped name.")
    ] = "demo",
    precision: Annotated[str, typer.Option("--precision", help="For --budget.")] = "mixed",
    engine: Annotated[
        str, typer.Option("--engine", help="For --budget: what runs the graphs.")
    ] = "tensorrt",
    gib: Annotated[
        Optional[float],
        typer.Option(
            "--memory",
            min=0.1,
            max=2**20,
            help="For --budget: GiB to fit in.",
            show_default="this machine's",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, which engines can run, and what is missing."""
    if budget:
        _show_budget(bundle, precision, engine, gib, as_json)
        return
    from recallseg.runtime.services.doctor import diagnose

    diagnosis = diagnose(self_test=self_test)
    if as_json:
        emit_json(diagnosis.to_json())
    else:
        machine = diagnosis.machine
        size = machine["memory_bytes"]
        installed = f"{size / 2**30:.1f} GiB memory" if size else "memory unknown"
        say(f"machine   {machine['processor']} ({machine['architecture']})")
        say(
            f"          {machine['usable_cores']} of {machine['cores']} cores usable, "
            f"{installed}, {machine['system']}"
        )
        say(f"python    {machine['python']}")
        versions = ", ".join(f"{name} {version}" for name, version in diagnosis.packages.items())
        say(f"packages  {versions or 'none of those that matter'}")
        say(f"cache     {diagnosis.cache}")
        say(f"bundles   {', '.join(diagnosis.bundles) or 'none shipped'}")
        say(f"pixels    {diagnosis.pixels}")
        say(f"operators {diagnosis.operators}")
        say("engines")
        for found in diagnosis.engines:
            say(f"  {'yes' if found.available else 'no ':<4}{found.name:<22}{found.detail}")
        for test in diagnosis.self_tests:
            word = "passed" if test.passed else "FAILED"
            say(
                f"self test {word}: bundle {test.bundle}, {test.engine}, {test.seconds:.1f} s: "
                f"{test.detail}"
            )
        say("ready" if diagnosis.healthy else "NOT READY: no engine can run, or a test failed")
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _recorded(opened: Bundle, engine: str, precision: str) -> RecordedPlans | None:
    """Return what plans in the cache say, if the engine has plans and the bundle the precision."""
    from recallseg.engines.errors import BundleError
    from recallseg.engines.tensorrt.flavour import FLAVOURS
    from recallseg.engines.tensorrt.loading import recorded_plans

    if engine not in FLAVOURS:
        return None
    try:
        return recorded_plans(opened, engine, precision)
    except BundleError:  # a budget may be asked for of a precision that is to be made
        return None


def _show_budget(
    source: str, precision: str, engine: str, gib: float | None, as_json: bool
) -> None:
    from recallseg.engines.budget import PRESETS, largest_k, memory_budget
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.registry import engine_class
    from recallseg.runtime.reports.machine import describe_machine

    opened = Bundle.open(source)
    plans = _recorded(opened, engine, precision)
    limit = int(gib * 2**30) if gib else int(describe_machine()["memory_bytes"] or 0)
    sizes = sorted({opened.geometry.image_size, 512, 768, 1024})
    settings = [(side, n, k) for side in sizes for n in (1, 2, 4) for k in (1, 4, 8, 16)]
    budgets = [
        memory_budget(
            opened, k=k, n=n, precision=precision, engine=engine, image_size=side, plans=plans
        )
        for side, n, k in settings
    ]
    largest = {
        side: {
            n: largest_k(
                opened, limit, n=n, precision=precision, engine=engine, image_size=side, plans=plans
            )
            for n in (1, 2, 4)
        }
        for side in sizes
    }
    if as_json:
        emit_json(
            {
                "schema": "recallseg-budget/1",
                "bundle": opened.name,
                "engine": engine,
                "limit": limit,
                "measured": False,
                "plans": None if plans is None else asdict(plans),
                "budgets": [b.to_json() for b in budgets],
                "largest_k": largest,
                "bundle_max_k": opened.geometry.max_k,
                "presets": {name: vars(preset) for name, preset in PRESETS.items()},
            }
        )
        return
    host = engine_class(engine).place == "host"
    where = "on the CPU" if host else "CPU and GPU sharing it"
    say(f"memory for {opened.name} in {precision} by {engine}, {where}, in MiB")
    say("computed from the graphs, not measured" + ("\n" if host else " on a GPU\n"))
    if plans is not None:
        say(
            f"activations at S = {opened.geometry.image_size}, n up to {plans.n}, k up to "
            f"{plans.k}: as the plans of {engine} {plans.version} for {plans.target} say\n"
        )
    say("    S   n   k   fused  not fused   of which  weights  buffers  activations   scores")
    for b in budgets:
        sizes_of = {line.name: line.size >> 20 for line in b.lines}
        weights = sizes_of["weights"] + sizes_of.get("the same, repacked", 0)
        copied = sizes_of.get("recalled memories", 0) + sizes_of.get("the same for the CPU", 0)
        held = sizes_of["buffers of the graphs"] + copied
        mark = "" if b.worst <= limit else "  fits if fused" if b.total <= limit else "  too large"
        parts = f"{weights:>9}{held:>9}{sizes_of['activations']:>13}{b.scores >> 20:>9}"
        say(
            f"{b.image_size:>5} {b.n:>3} {b.k:>3} {b.total >> 20:>7} {b.worst >> 20:>10}{'':11}"
            f"{parts}{mark}"
        )
    say(f"\nlargest k in {limit / 2**30:.1f} GiB, if attention is not fused (0: does not fit)")
    cap = opened.geometry.max_k
    for side, by_n in largest.items():
        cells = (f"n={n}: {k}{'*' if k == cap else ''}" for n, k in by_n.items())
        say(f"  S={side:<5}" + "   ".join(cells))
    if any(k == cap for by_n in largest.values() for k in by_n.values()):
        say(f"  * the bundle's own limit ({cap}); the memory would take that or more")
    say("\npresets")
    for preset in PRESETS.values():
        say(
            f"  {preset.name:<12} S={preset.image_size} k={preset.k} n={preset.n} "
            f"{preset.precision}, in {preset.memory >> 30} GiB"
        )
