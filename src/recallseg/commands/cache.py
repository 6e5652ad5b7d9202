"""``recallseg cache``: the plans that were built, and whether they may be used."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from recallseg.commands.common import JsonOption, emit_json, parsed, say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List or remove compiled plans.")


@app.command("list")
def list_plans(as_json: JsonOption = False) -> None:
    """List the plans: graph, engine, precision, target, profile, state."""
    from recallseg.engines.tensorrt.plans import PlanCache

    cache = PlanCache()
    entries: list[dict[str, Any]] = [
        {
            "plan": plan.folder.name,
            "graph": plan.key.graph,
            "engine": plan.key.engine,
            "version": plan.key.version,
            "precision": plan.key.precision,
            "target": plan.key.target,
            "profile": dict(plan.key.profile),
            "options": dict(plan.key.options),
            "bytes": plan.size,
            "sha256": plan.sha256,
            "bundle": plan.made.get("bundle"),
            "time": plan.made.get("time"),
            "states": plan.verdicts.states,
        }
        for plan in cache.entries()
    ]
    if as_json:
        emit_json({"folder": str(cache.folder), "plans": entries})
        return
    say(str(cache.folder))
    for entry in entries:
        states = (
            ", ".join(f"{state} on {device}" for device, state in entry["states"].items())
            or "built"
        )
        profile = " ".join(f"{s}={r[0]}..{r[2]}" for s, r in entry["profile"].items())
        say(
            f"  {entry['plan'][:8]} {entry['graph']:<9}{entry['engine']} {entry['version']} "
            f"{entry['precision']} {entry['target']} {profile} {entry['bytes'] / 1e6:.1f} MB, "
            f"{entry['bundle']}: {states}"
        )
    say(f"{len(entries)} plans, {sum(e['bytes'] for e in entries) / 1e6:.1f} MB")


@app.command("clear")
def clear(
    engine: Annotated[
        Optional[str], typer.Option("--engine", help="Only plans of this engine.")
    ] = None,
    stale: Annotated[
        bool,
        typer.Option("--stale", help="Only what another version of TensorRT than this one built."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove plans; they can be built again."""
    from recallseg.engines.tensorrt.flavour import flavour_named
    from recallseg.engines.tensorrt.plans import PlanCache

    version = None
    if engine is not None:
        flavour = parsed(flavour_named, engine, "--engine")
        version = str(flavour.load().__version__) if stale else None
    elif stale:
        raise typer.BadParameter("needs --engine too: each has a version of its own", param_hint=[])
    count, freed = PlanCache().clear(engine=engine, stale_for=version)
    if as_json:
        emit_json({"plans": count, "bytes": freed})
    else:
        say(f"removed {count} plans, {freed / 1e6:.1f} MB")
