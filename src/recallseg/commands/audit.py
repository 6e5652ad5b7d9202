"""``recallseg audit``: check, seal and rotate the log of all segmentations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import (
    AuditHeadOption,
    AuditKeyOption,
    JsonOption,
    emit_json,
    note,
    open_audit,
    say,
)

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check, seal and rotate the log of all segmentations.")


@app.command()
def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What --audit wrote.")],
    known: Annotated[
        Optional[str],
        typer.Option(help="Digest of an entry that must be there; sees what was cut off the end."),
    ] = None,
    key: Annotated[
        Optional[Path],
        typer.Option(help="Key of the seals (of an Ed25519 key, the .pub is enough)."),
    ] = None,
    head: Annotated[
        Optional[Path], typer.Option(help="What --audit-head wrote; its entry must be there.")
    ] = None,
    before: Annotated[
        Optional[list[Path]],
        typer.Option(help="File that was put aside before, oldest first; may be given again."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no entry was changed, forged, removed or put elsewhere."""
    from recallseg.runtime.services.audit import verify_audit_log
    from recallseg.runtime.services.audit_keys import read_audit_key

    summary = verify_audit_log(
        log,
        known,
        key=None if key is None else read_audit_key(key),
        head=head,
        before=before or (),
    )
    if as_json:
        emit_json(asdict(summary))
        return
    noun = "entry" if summary.entries == 1 else "entries"
    checked = "" if key is None else f", {summary.sealed} seals fit"
    say(f"{summary.entries} {noun}, all in order{checked}; newest {summary.newest}")
    if summary.entries:
        say(f"from {summary.first_time} to {summary.last_time}")
    if summary.continues is not None:
        note(f"goes on from {summary.continues}, the end of the file before; give it with --before")
    if summary.sealed and key is None:
        note(f"{summary.sealed} entries are sealed by {' '.join(summary.keys)}: --key checks them")
    elif not summary.sealed and summary.entries:
        note("without a key, whoever can write the file can write another chain; see docs/security")
    if summary.unfinished:
        note(
            f"{summary.unfinished} bytes after the last entry are of one whose writer died; the "
            "next entry takes their place."
        )


@app.command()
def key(file: Annotated[Path, typer.Argument(help="New file for the secret.")]) -> None:
    """Make a secret for --audit-key (HMAC-SHA256). Who has it can seal, and forge."""
    from recallseg.runtime.services.audit_keys import create_audit_key

    note(f"wrote {file}, key {create_audit_key(file)}")


@app.command()
def rotate(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What --audit wrote.")],
    audit_key: AuditKeyOption = None,
    audit_head: AuditHeadOption = None,
) -> None:
    """Put the log aside and go on in a new file, chained to it. Prints where the old one is."""
    if not log.exists():
        raise typer.BadParameter(f"there is no file {log}.", param_hint="LOG")
    opened = open_audit(log, audit_key, audit_head)
    assert opened is not None
    say(opened.rotate())
