"""``recallseg build``: a bundle's graphs as TensorRT plans, in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from recallseg.commands.common import (
    JsonOption,
    PrecisionOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say,
    say_notice,
    split_list,
)
from recallseg.engines import defaults

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["build"]


def build(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or the name of a shipped one."),
    ],
    engine: Annotated[str, typer.Option("--engine", help="tensorrt-rtx or tensorrt.")],
    precision: PrecisionOption = defaults.PRECISION,
    target: Annotated[
        Optional[str],
        typer.Option(
            "--target",
            help="What may load the plans, comma-separated. tensorrt-rtx: sm75 (fp16), "
            "sm80, sm86, sm89, sm120, sm121. tensorrt: current, ampere+, same-capability, version.",
            show_default="sm86,sm89,sm120 or current",
        ),
    ] = None,
    k: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Memories that are usual; made fastest.",
            show_default=f"{defaults.K}, or --max-k where that is less",
        ),
    ] = None,
    max_k: Annotated[int, typer.Option(min=1, help="Most memories of one call.")] = 16,
    n: Annotated[int, typer.Option(min=1, help="Structures that are usual.")] = 1,
    max_n: Annotated[int, typer.Option(min=1, help="Most structures of one call.")] = 4,
    workspace: Annotated[
        Optional[int],
        typer.Option(min=1, help="Most scratch memory in MiB.", show_default="TensorRT's choice"),
    ] = None,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Plans without weights; put back when loaded."),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what the cache has.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a bundle's TensorRT plans into the cache."""
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.tensorrt.builder import BuildRequest
    from recallseg.engines.tensorrt.building import VARIANTS, build_bundle
    from recallseg.engines.tensorrt.flavour import flavour_named
    from recallseg.engines.tensorrt.profile import Profile, Range
    from recallseg.engines.tensorrt.targets import Target

    opened = Bundle.open(bundle)
    flavour = parsed(flavour_named, engine, "--engine")
    names = tuple(parsed(split_list, target, "--target")) if target else None
    checked = parsed(lambda _: Target.parse(names, flavour), target or "", "--target")
    for name, value, most in (("k", k, max_k), ("n", n, max_n)):
        if value is not None and value > most:
            raise typer.BadParameter(
                f"{value} is more than --max-{name} {most}, the most of one call.",
                param_hint=f"--{name}",
            )
    usual = Profile(Range(1, n, max_n), Range(1, k or min(defaults.K, max_k), max_k))
    request = BuildRequest(
        flavour,
        precision,
        usual,
        checked,
        strip_weights,
        None if workspace is None else workspace << 20,
    )
    say_notice(opened.notice)
    found: list[dict[str, Any]] = []
    with progress_bar("build", len(opened.graphs_for(VARIANTS, precision))) as advance:
        seen: set[tuple[str, str]] = set()

        def report(graph: str, step: str) -> None:
            if (graph, step) not in seen:  # the builder repeats its phases
                seen.add((graph, step))
                advance(f"{graph}: {step}", 0)

        for item in build_bundle(opened, request, rebuild=rebuild, report=report):
            advance(item.graph)
            made = item.plan.made
            found.append(
                {
                    "graph": item.graph,
                    "variant": item.variant,
                    "fresh": item.fresh,
                    "seconds": made["seconds"],
                    "bytes": item.plan.size,
                    "layers": made["layers"],
                    "messages": made["messages"],
                    "plan": str(item.plan.folder),
                    "states": item.plan.verdicts.states,
                }
            )
            for message in made["messages"] if item.fresh else ():
                note(f"{item.graph}: {message}")
    verified, said = _verify(opened, engine, precision)
    if as_json:
        version = item.plan.key.version
        emit_json(
            {
                "bundle": opened.name,
                "identity": opened.identity,
                "engine": engine,
                "version": version,
                "precision": precision,
                "target": item.plan.key.target,
                "profile": usual.to_json(),
                "plans": found,
                "verified": verified,
                "verification": said,
            }
        )
        return
    for entry in found:
        how = f"built in {entry['seconds']:.1f} s" if entry["fresh"] else "was in the cache"
        say(f"  {entry['graph']:<9} {entry['variant']:<9} {entry['bytes'] / 1e6:6.1f} MB  {how}")
    say(f"{engine} {item.plan.key.version}, {precision}, {item.plan.key.target}, {usual}")
    say(said)


def _verify(bundle: Bundle, engine: str, precision: str) -> tuple[bool, str]:
    """Verify the plans where they can run; a refusal is an error, no GPU is not."""
    from recallseg.engines.errors import EngineUnavailableError
    from recallseg.engines.registry import load_engines
    from recallseg.engines.tensorrt.building import VARIANTS

    try:
        load_engines(bundle, engine, precision, graphs=bundle.graphs_for(VARIANTS, precision))
    except EngineUnavailableError as error:
        return False, f"Built, not verified: that is done on the GPU that will run it. {error}"
    return True, "Verified on this GPU: golden tensors and masks are reproduced."
