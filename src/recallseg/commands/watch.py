"""``recallseg watch``: segment whatever arrives in a folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.asking import Asking, Handling, grouped
from recallseg.commands.common import (
    JsonOption,
    LibraryArgument,
    check_output_folder,
    note,
    say,
    say_notice,
    stopped_by_signals,
    tell_passed,
)
from recallseg.runtime.json_text import json_text, printable

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["watch"]


@grouped
def watch(
    library: LibraryArgument,
    output: Annotated[Path, typer.Option(help="Folder for segmentations and their NAME.json.")],
    asking: Asking,
    handling: Handling,
    source: Annotated[
        Optional[Path],
        typer.Argument(metavar="IN", help="Folder in which images arrive.", show_default=False),
    ] = None,
    former: Annotated[Optional[Path], typer.Option("--library", hidden=True)] = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            help="Seconds without a change until a file or series is complete.",
        ),
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="End when all that is there is done.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment every image, volume and DICOM series that arrives in a folder, once.

    Stop it with Ctrl-C or SIGTERM; after a restart it goes on where it was. Exit status 1 if
    something could not be segmented or looked at; with --strict also if something was set aside
    before, or passed over.
    """
    from recallseg.runtime.library import Library
    from recallseg.runtime.services.watching import FAILURE_SCHEMA, LEFT_OUT_SCHEMA, Watcher

    if former is not None and source is None:
        library, source = former, library
        note("'watch IN --library LIB' is written 'watch LIB IN' now; the former still works")
    elif former is not None or source is None:
        raise typer.BadParameter("name the library and the folder: watch LIB IN.")
    asking.check()
    check_output_folder(output)
    volumes = handling.volumes()
    failures, told = set[str](), set[str]()
    with stopped_by_signals() as stop, ExitStack() as held:

        def ask(opened: Library | None = None) -> Segmenter:
            if opened is None:
                opened = held.enter_context(Library.open(library))
                say_notice(opened.bundle.notice)
            segmenter = asking.segmenter(opened, handling.propagate)
            segmenter.warm_up()
            return segmenter

        segmenter, log = ask(), handling.log()
        with Watcher(
            segmenter,
            source,
            output,
            settle_s=settle,
            volumes=volumes,
            kind=handling.format,
            audit=log,
            renewed=ask,
        ) as watcher:
            if not as_json:
                note(f"watching {source}")
            for arrival in watcher.run(stop, once=once):
                if arrival.record is None:
                    failures.add(arrival.name)
                mend = arrival.record["quality"]["mend"] if arrival.record else ""
                if mend and mend not in told:
                    told.add(mend)
                    note(f"uncalibrated: {mend}")
                if as_json:
                    answer = arrival.record or {
                        "schema": FAILURE_SCHEMA,
                        "image": arrival.name,
                        "error": arrival.error,
                    }
                    typer.echo(json_text(answer, indent=None))
                elif arrival.record is None:
                    note(f"failed: {arrival.error}")
                else:
                    total = arrival.record["timings_ms"]["total"]
                    quality = arrival.record["quality"]
                    flag = quality.get("flag") or f"slices {quality['flags']}"
                    say(f"{printable(arrival.name)}  {flag}, {total:.0f} ms")
            left_out = bool(watcher.passed or watcher.set_aside)
            if as_json and left_out:
                passed = {str(each.path): each.reason for each in watcher.passed}
                aside = dict(watcher.set_aside)
                told_last = {"schema": LEFT_OUT_SCHEMA, "passed_over": passed, "set_aside": aside}
                typer.echo(json_text(told_last, indent=None))
            for name, why in watcher.set_aside.items():
                if name not in failures:
                    note(f"set aside before: {name}: {why}")
            tell_passed(watcher.passed)
    if failures or watcher.not_given or (handling.strict and left_out):
        raise typer.Exit(1)
