"""``recallseg audit``: check the log of all segmentations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import JsonOption, emit_json, note

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check the log of all segmentations.")


@app.callback()
def _audit() -> None:
    """Hold the subcommands, of which there is one so far."""


@app.command()
def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What --audit wrote.")],
    known: Annotated[
        Optional[str],
        typer.Option(help="Digest of an entry that must be there; sees what was cut off the end."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no entry was changed, removed or put elsewhere."""
    from recallseg.runtime.services.audit import verify_audit_log

    summary = verify_audit_log(log, known)
    if as_json:
        emit_json(asdict(summary))
        return
    noun = "entry" if summary.entries == 1 else "entries"
    typer.echo(f"{summary.entries} {noun}, all in order; newest {summary.newest}")
    if summary.entries:
        typer.echo(f"from {summary.first_time} to {summary.last_time}")
    if summary.unfinished:
        note(
            f"{summary.unfinished} bytes after the last entry are of one whose writer died; the "
            "next entry takes their place."
        )
