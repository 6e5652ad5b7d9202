"""``recallseg verify``: whether an engine reproduces the bundle's golden tensors here."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ThreadsOption,
    emit_json,
    say,
    say_notice,
)
from recallseg.engines import defaults

__all__ = ["verify"]


def verify(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or the name of a shipped one."),
    ],
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    most_memory: Annotated[
        Optional[str],
        typer.Option(
            "--most-memory",
            metavar="SIZE",
            help="Memory that graphs may take, like 8GiB; on the CPU only.",
            show_default="the machine's, at most 16GiB",
        ),
    ] = None,
    most_seconds: Annotated[
        float, typer.Option("--most-seconds", help="Time that it may take, in seconds.")
    ] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Compare an engine with a bundle's golden tensors, on this machine.

    The graphs run in a process of its own, which is ended when it takes too much memory or time.
    """
    from recallseg.engines.bounded import verify_bounded
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.engine import EngineOptions
    from recallseg.engines.limits import parse_bytes
    from recallseg.runtime.library.own import remember_bundle

    opened = Bundle.open(bundle)
    memory = parse_bytes(most_memory, "--most-memory") if most_memory else None
    say_notice(opened.notice)
    result = verify_bounded(
        opened,
        engine,
        precision,
        EngineOptions(threads),
        most_memory=memory,
        most_seconds=most_seconds,
    )
    if result.passed:
        for identity in (opened.identity, *opened.former_identities):
            remember_bundle(identity, opened.path)
    if as_json:
        checks = [{**vars(check), "passed": check.passed} for check in result.checks]
        emit_json(
            {
                "schema": "recallseg-verification/1",
                "bundle": opened.name,
                "identity": opened.identity,
                "engine": result.engine,
                "precision": result.precision,
                "passed": result.passed,
                "checks": [
                    {**c, "error": c["error"] if c["error"] < 1e308 else None} for c in checks
                ],
            }
        )
    else:
        say(repr(opened))
        for check in result.checks:
            word = "ok" if check.passed else "WRONG"
            say(f"  {check.tensor:<17} {check.error:.1e} of {check.tolerance:.0e}  {word}")
        say(
            f"{engine} in {precision} "
            f"{'reproduces' if result.passed else 'DOES NOT reproduce'} the golden tensors"
        )
    if not result.passed:
        raise typer.Exit(1)
