"""``recallseg doctor``: whether it can run here, and if not, what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from recallseg.runtime.commands.common import JsonOption, emit_json

__all__ = ["doctor"]


def doctor(
    self_test: Annotated[
        bool,
        typer.Option("--self-test/--no-self-test", help="Run the shipped bundles' golden cases."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, which engines can run, and what is missing."""
    from recallseg.runtime.doctor import diagnose

    diagnosis = diagnose(self_test=self_test)
    if as_json:
        emit_json(diagnosis.to_json())
    else:
        machine = diagnosis.machine
        size = machine["memory_bytes"]
        memory = f"{size / 2**30:.1f} GiB memory" if size else "memory unknown"
        typer.echo(f"machine   {machine['processor']} ({machine['architecture']})")
        typer.echo(
            f"          {machine['usable_cores']} of {machine['cores']} cores usable, "
            f"{memory}, {machine['system']}"
        )
        typer.echo(f"python    {machine['python']}")
        versions = ", ".join(f"{name} {version}" for name, version in diagnosis.packages.items())
        typer.echo(f"packages  {versions or 'none of those that matter'}")
        typer.echo(f"cache     {diagnosis.cache}")
        typer.echo(f"bundles   {', '.join(diagnosis.bundles) or 'none shipped'}")
        typer.echo("engines")
        for engine in diagnosis.engines:
            typer.echo(
                f"  {'yes' if engine.available else 'no ':<4}{engine.name:<22}{engine.detail}"
            )
        for test in diagnosis.self_tests:
            word = "passed" if test.passed else "FAILED"
            typer.echo(
                f"self test {word}: bundle {test.bundle}, {test.engine}, {test.seconds:.1f} s: "
                f"{test.detail}"
            )
        typer.echo(
            "ready" if diagnosis.healthy else "NOT READY: no engine can run, or a test failed"
        )
    if not diagnosis.healthy:
        raise typer.Exit(1)
