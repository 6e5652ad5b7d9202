"""``recallseg config``: the configuration of services."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recallseg.commands.common import JsonOption, emit_json, note, say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check the configuration of services; print examples.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration.")],
    as_json: JsonOption = False,
) -> None:
    """Check a configuration: its values, and that what it names is there.

    Exit status 1 if anything is wrong; all that is wrong is told.
    """
    from recallseg.runtime.services.checking import check_configuration
    from recallseg.runtime.services.settings import read_configuration

    configuration = read_configuration(file)
    problems = check_configuration(configuration)
    if as_json:
        emit_json(
            {
                "schema": "recallseg-configuration-check/1",
                "configuration": configuration.model_dump(mode="json"),
                "problems": problems,
            }
        )
    else:
        for problem in problems:
            note(problem)
        if not problems:
            say(f"{file} is right: {len(configuration.rules)} rules")
    if problems:
        raise typer.Exit(1)


@app.command()
def example(
    service: Annotated[str, typer.Argument(help="Which service.")],
) -> None:
    """Print an example of a service's configuration, every setting explained."""
    from recallseg.runtime.services.settings import example as text

    typer.echo(text(service), nl=False)
