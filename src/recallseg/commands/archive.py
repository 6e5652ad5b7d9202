"""``recallseg archive``: everything in an archive, by many processes or machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.asking import Asking, Handling, grouped
from recallseg.commands.common import (
    INTERRUPTED,
    QUIET_SECONDS,
    JsonOption,
    LibraryArgument,
    check_output_folder,
    emit_json,
    note,
    say,
    say_notice,
    stopped_by_signals,
)

if TYPE_CHECKING:
    from recallseg.runtime.services.archive import Progress

__all__ = ["archive"]

_SHOWN = 20


@grouped
def archive(
    library: LibraryArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Folders, files, patterns ('studies/*/ct'), URLs of object stores, or tables "
            "(.csv, .parquet) with a column 'path'.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for segmentations and their NAME.json.")],
    asking: Asking,
    handling: Handling,
    ray: Annotated[
        Optional[str],
        typer.Option(
            "--ray",
            metavar="ADDRESS|local",
            help="Spread over a cluster of Ray, or Ray on this machine.",
            show_default="processes of this machine, without Ray",
        ),
    ] = None,
    workers: Annotated[
        Optional[int],
        typer.Option(
            "--workers", min=1, help="Each with a model of its own.", show_default="what fits"
        ),
    ] = None,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, help="Of an input that ends its worker.")
    ] = 3,
    deadline: Annotated[
        float, typer.Option("--deadline", min=1, help="Seconds that an input may take.")
    ] = 3600.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what was set aside before.")
    ] = False,
    summary: Annotated[
        Optional[Path],
        typer.Option(
            "--summary",
            help="Table of all outputs, .parquet or .csv.",
            show_default="summary.parquet in --output",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment everything in an archive, each image once; call it again to go on.

    Exit status 1 if something was set aside or refused; with --strict also if something was passed
    over; 130 if it was stopped.
    """
    from recallseg.runtime.services.archive import segment_archive
    from recallseg.runtime.services.archive.worker import AuditFiles

    check_output_folder(output)
    volumes = handling.volumes()
    audit = None
    if handling.audit is not None:
        key, head = handling.audit_key, handling.audit_head
        audit = AuditFiles(
            handling.audit.absolute(),
            None if key is None else key.absolute(),
            None if head is None else head.absolute(),
        )
        audit.open()  # what is wrong with it is said before the work
    with stopped_by_signals() as stop, _shown() as show:
        done = segment_archive(
            library,
            inputs,
            output,
            volumes=volumes,
            kind=handling.format,
            audit=audit,
            ray=ray,
            workers=workers,
            attempts=attempts,
            deadline_s=deadline,
            retry=retry,
            summary=summary,
            progress=show,
            stop=stop.is_set,
            **asking.settings(handling.propagate),
        )
    told = done.progress
    if as_json:
        emit_json(done.to_json())
    else:
        before = f" ({told.before} before)" if told.before else ""
        say(
            f"{told.done} done{before}, {told.set_aside} set aside, {told.refused} refused, "
            f"{told.passed_over} passed over, in {done.seconds:.0f} s"
        )
        say(done.summary)
    for named, why in list(done.set_aside.items())[:_SHOWN]:
        note(f"not segmented: {named}: {why}")
    if done.failed > _SHOWN:
        note(f"and {done.failed - _SHOWN} more, in the summary")
    if not done.complete:
        note("stopped; the same call goes on")
        raise typer.Exit(INTERRUPTED)
    if done.failed or (handling.strict and told.passed_over):
        raise typer.Exit(1)


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Show progress on stderr: a line that changes, or in a log one now and then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    told = monotonic()
    if not console.is_terminal:

        def line(progress: Progress) -> None:
            nonlocal told
            say_notice(progress.notice)
            if monotonic() - told >= QUIET_SECONDS:
                told = monotonic()
                note(f"archive: {progress}")

        yield line
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def change(progress: Progress) -> None:
            say_notice(progress.notice)
            live.update(Text(f"archive: {progress}, {progress.workers} workers"))

        yield change
