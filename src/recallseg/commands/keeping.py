"""``recallseg library ...``: exemplars out of use, names, other libraries, copies, history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    LibraryArgument,
    PrecisionOption,
    ThreadsOption,
    counted,
    emit_json,
    note,
    progress_bar,
    say,
    say_notice,
    state_of,
)
from recallseg.engines import defaults

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recallseg.runtime.library import Library
    from recallseg.runtime.library.history import Change

__all__ = ["backup", "history", "merge", "reinstate", "rename", "restore", "retire"]

KeysArgument = Annotated[list[str], typer.Argument(metavar="KEY...", help="Exemplars.")]


def retire(library: LibraryArgument, keys: KeysArgument, as_json: JsonOption = False) -> None:
    """Take exemplars out of use; all of them stays, and 'reinstate' brings them back."""
    from recallseg.runtime.library import Library

    with Library.open(library, mode="write") as opened:
        opened.retire(keys)
        _tell(opened, "retired", keys, as_json)


def reinstate(library: LibraryArgument, keys: KeysArgument, as_json: JsonOption = False) -> None:
    """Take retired exemplars into use again."""
    from recallseg.runtime.library import Library

    with Library.open(library, mode="write") as opened:
        opened.reinstate(keys)
        _tell(opened, "reinstated", keys, as_json)


def _tell(library: Library, what: str, keys: Sequence[str], as_json: bool) -> None:
    if as_json:
        emit_json({what: list(dict.fromkeys(keys)), "library": state_of(library)})
    else:
        note(f"{len(set(keys))} {what}; {len(library)} in use, {len(library.retired)} retired")


def rename(
    library: LibraryArgument,
    old: Annotated[str, typer.Argument(metavar="OLD", help="A structure.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The name that it gets.")],
    as_json: JsonOption = False,
) -> None:
    """Rename a structure in every exemplar; calibrations follow."""
    from recallseg.runtime.library import Library

    with Library.open(library, mode="write") as opened:
        opened.rename_structure(old, new)
        if as_json:
            emit_json({"renamed": {old: new}, "library": state_of(opened)})
        else:
            note(f"'{old}' is '{new}' now; structures: {', '.join(opened.structures)}")


def merge(
    library: LibraryArgument,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Folder of the other library.")],
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the exemplars of another library of the same bundle to LIB; all or none.

    What both have alike is passed over. Memories are copied where LIB would make them alike.
    """
    from recallseg.runtime.library import Library

    with (
        Library.open(other) as source,
        Library.open(
            library, mode="write", engine=engine, precision=precision, threads=threads
        ) as opened,
        progress_bar("Merging", len(source)) as step,
    ):
        report = opened.merge(source, progress=counted(step))
        if report.encoded:
            say_notice(opened.bundle.notice)
    if as_json:
        emit_json({name: [*keys] for name, keys in vars(report).items()})
        return
    made = f", memories of {len(report.encoded)} made anew" if report.encoded else ""
    say(f"{len(report.added)} exemplars added{made}")
    for keys, why in (
        (report.equal, "LIB has them"),
        (report.same, "LIB has the same image with the same masks under another key"),
        (report.retired, "retired in OTHER"),
    ):
        if keys:
            note(f"passed over, {why}: {', '.join(keys)}")
    if report.apart:
        note(
            f"of {len(report.apart)} the group (patient, series) is known by OTHER's hash only: if "
            "LIB has others of it, they count as another"
        )


def backup(
    library: LibraryArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the copy.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a library, also while it is in use, and verify the copy.

    The copy is a library itself; 'restore' puts it back.
    """
    from recallseg.runtime.library import Library

    with (
        Library.open(library) as opened,
        progress_bar("Verifying the copy", len(opened) + len(opened.retired)) as step,
    ):
        report = opened.backup(folder, progress=counted(step))
    if as_json:
        emit_json({**vars(report), "ok": report.ok})
    else:
        say(
            f"{report.exemplars} exemplars, {report.memories} memories and {report.sources} "
            f"sources copied to {folder} and verified"
        )


def restore(
    folder: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder of the copy.")],
    library: LibraryArgument,
    over_newer: Annotated[
        bool,
        typer.Option("--over-newer", help="Also over a library that has what the backup has not."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put the copy that 'backup' made in the place of LIB, or where there is none."""
    from recallseg.runtime.library import Library

    Library.restore(folder, library, over_newer=over_newer)
    with Library.open(library) as restored:
        if as_json:
            emit_json({"library": state_of(restored)})
        else:
            note(f"{restored!r}")


def history(library: LibraryArgument, as_json: JsonOption = False) -> None:
    """Show who changed a library, when and how."""
    from recallseg.runtime.library import Library

    with Library.open(library) as opened:
        changes = opened.history()
    if as_json:
        emit_json([change.to_json() for change in changes])
        return
    for change in changes:
        say(_line(change))


def _line(change: Change) -> str:
    from recallseg.runtime.json_text import printable

    parts = [f"{name}: {value}" for name, value in change.details.items()]
    if change.exemplars:
        shown = ", ".join(change.exemplars[:5]) + (", ..." if len(change.exemplars) > 5 else "")
        parts.append(f"{len(change.exemplars)} exemplars ({shown})")
    if change.erased:
        parts.append(f"{change.erased} since removed")
    when, who = change.time or "at an unknown time", change.who or "somebody"
    return printable(f"{change.revision:>6} {when} {who}: {change.what} {'; '.join(parts)}".strip())
