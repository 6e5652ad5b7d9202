"""What commands share: options, parsing of their values, progress, output."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar

import typer

from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.kinds import FORMATS

if TYPE_CHECKING:
    from recallseg.runtime.formats.finding import PassedOver
    from recallseg.runtime.library import Library
    from recallseg.runtime.services.audit import AuditLog

__all__ = [
    "INTERRUPTED",
    "AsStoredOption",
    "AuditHeadOption",
    "AuditKeyOption",
    "AuditOption",
    "CleanUpOption",
    "EngineOption",
    "FormatOption",
    "JsonOption",
    "LegendOption",
    "LibraryArgument",
    "OneTimeOption",
    "PlaneOption",
    "PrecisionOption",
    "PreviewOption",
    "PropagateOption",
    "ReachOption",
    "ResampleOption",
    "SegmentsOption",
    "StackOption",
    "StrictOption",
    "TagOption",
    "ThreadsOption",
    "TimeOption",
    "VoiOption",
    "check_output_folder",
    "counted",
    "emit_json",
    "forget_notices",
    "note",
    "one_of",
    "open_audit",
    "parse_tags",
    "parsed",
    "print_table",
    "progress_bar",
    "say",
    "say_notice",
    "split_clean_ups",
    "split_counts",
    "split_list",
    "split_numbers",
    "split_tags",
    "split_time",
    "state_of",
    "stopped_by_signals",
    "tell_passed",
    "tell_unlabelled",
]

T = TypeVar("T")

INTERRUPTED = 130
"""Exit status of what a person or the system stopped: 128 and the number of SIGINT."""
QUIET_SECONDS = 10.0
"""Between lines of progress in a log."""
WHOLE = 40
"""Most characters of a name that a terminal does not fold: a random key has 32."""
UNBOUNDED = 100_000
"""Characters in a line that nobody looks at."""
CLEAN_UPS = ("largest", "holes")
PLANES = ("axial", "coronal", "sagittal")

LibraryArgument = Annotated[
    Path, typer.Argument(metavar="LIB", help="Folder of the library.", show_default=False)
]


def _engine(name: str) -> str:
    from recallseg.engines.registry import ENGINES

    offered = [engine for engine in ENGINES if engine != "fake"]  # which is for tests
    return name if name in ENGINES else one_of(name, offered, "engine")


def _precision(name: str) -> str:
    from recallseg.engines.precisions import PRECISIONS

    return one_of(name, PRECISIONS, "precision")


def _plane(name: str | None) -> str | None:
    return name if name is None else one_of(name, PLANES, "plane")


def _format(name: str | None) -> str | None:
    return name if name is None else one_of(name, FORMATS, "format")


def _segments(name: str) -> str:
    from recallseg.runtime.formats.annotated_volumes import SEGMENTS

    return one_of(name, SEGMENTS, "way to take segments")


def _reach(value: float) -> float:
    if not value >= 1:
        raise typer.BadParameter(
            f"reach must be at least 1 (times the nearest distance), or inf, got {value:g}."
        )
    return value


def one_of(name: str, known: Iterable[str], what: str) -> str:
    """Return an option's value if it is known; otherwise it is a usage error (exit status 2)."""
    known = tuple(known)
    if name not in known:
        raise typer.BadParameter(f"there is no {what} '{name}'; choose of {', '.join(known)}.")
    return name


EngineOption = Annotated[
    str, typer.Option("--engine", help="What runs the networks.", callback=_engine)
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Precision of the graphs.", callback=_precision)
]
ThreadsOption = Annotated[
    Optional[int],
    typer.Option("--threads", min=1, help="CPU threads.", show_default="one per usable core"),
]
AuditOption = Annotated[
    Optional[Path],
    typer.Option("--audit", help="Append an entry for every segmentation to this log."),
]
AuditKeyOption = Annotated[
    Optional[Path],
    typer.Option(
        "--audit-key",
        envvar="RECALLSEG_AUDIT_KEY",
        help="Key that seals every entry ('audit key', 'sign key').",
    ),
]
AuditHeadOption = Annotated[
    Optional[Path],
    typer.Option(
        "--audit-head",
        envvar="RECALLSEG_AUDIT_HEAD",
        help="File, best elsewhere, that always names the newest entry.",
    ),
]
PlaneOption = Annotated[
    Optional[str],
    typer.Option(
        "--plane",
        callback=_plane,
        help="Cut volumes into axial, coronal or sagittal slices.",
        show_default="as they were acquired",
    ),
]
PropagateOption = Annotated[
    int,
    typer.Option(
        "--propagate",
        min=0,
        help="Slices of a volume whose memories help the next one; 0: none.",
    ),
]
ReachOption = Annotated[
    float,
    typer.Option(
        "--reach",
        callback=_reach,
        help="Of the k, recall those up to so many times as far as the nearest, or inf.",
    ),
]
CleanUpOption = Annotated[
    Optional[str],
    typer.Option(
        "--clean-up", help="Of a volume's structures keep the 'largest' part, fill 'holes'."
    ),
]
PreviewOption = Annotated[
    bool, typer.Option("--preview", help="Leave pictures: a PNG, and of a volume a page (HTML).")
]
VoiOption = Annotated[
    bool, typer.Option("--voi", help="Apply a DICOM file's own window, as a screen does.")
]
AsStoredOption = Annotated[
    bool,
    typer.Option(
        "--as-stored", help="Leave pictures and masks unturned and uninverted, whatever they say."
    ),
]
LegendOption = Annotated[
    Optional[str],
    typer.Option(
        "--legend", help="Structures by colour, #ff0000=liver,#00ff00=spleen, or a file of such."
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with status 1 if any file was passed over.")
]
FormatOption = Annotated[
    Optional[str],
    typer.Option(
        "--format",
        callback=_format,
        help=f"{', '.join(FORMATS)}, where a name does not tell; of folders, only such.",
    ),
]
TimeOption = Annotated[
    Optional[str],
    typer.Option(
        "--time",
        metavar="N|all",
        help="Which of several volumes at one place (time points, echoes), from 1.",
    ),
]
StackOption = Annotated[
    Optional[str],
    typer.Option("--stack", help="Which of several stacks of a DICOM series: number or StackID."),
]
OneTimeOption = Annotated[
    Optional[int],
    typer.Option("--time", min=1, help="Which of several volumes at one place, from 1."),
]
ResampleOption = Annotated[
    bool,
    typer.Option("--resample", help="Take masks of another grid too, by the nearest voxel."),
]
SegmentsOption = Annotated[
    str,
    typer.Option(
        "--segments",
        callback=_segments,
        help="Segments of one name: 'union', or 'by-number' to keep them apart.",
    ),
]
TagOption = Annotated[
    Optional[list[str]], typer.Option("--tag", help="name=value; may be given again.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def open_audit(path: Path | None, key: Path | None, head: Path | None) -> AuditLog | None:
    """Open the log of ``--audit`` with its key and head; None without one."""
    from recallseg.runtime.services import audit

    return None if path is None else audit.open_audit(path, key, head)


@contextmanager
def stopped_by_signals() -> Iterator[Event]:
    """Yield what Ctrl-C and SIGTERM set while the block lasts."""
    stop = Event()
    former = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def parsed(parse: Callable[[str], T], text: str, option: str) -> T:
    """Parse an option's value; what is wrong with it is a usage error (exit status 2)."""
    try:
        return parse(text)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def split_time(text: str) -> int | Literal["all"]:
    """Parse which volume: a number from 1, or ``all``; raises InputError otherwise."""
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise InputError(f"--time must be a number from 1, or all; got '{text}'.")
    return int(text)


def split_list(text: str) -> list[str]:
    """Split a comma-separated list of distinct names; raises InputError otherwise."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"'{text}' has an empty entry; expected names separated by commas.")
    if len(set(names)) < len(names):
        raise InputError(f"'{text}' names something twice.")
    return names


def split_numbers(text: str) -> list[int]:
    """Split a comma-separated list of distinct whole numbers; raises InputError otherwise."""
    return _whole_numbers(text, 1, "1,4,16")


def split_counts(text: str) -> list[int]:
    """Split a comma-separated list of distinct counts, 0 too; raises InputError otherwise."""
    return _whole_numbers(text, 0, "0,2")


def _whole_numbers(text: str, least: int, example: str) -> list[int]:
    names = split_list(text)
    if not all(name.isascii() and name.isdecimal() and int(name) >= least for name in names):
        raise InputError(
            f"'{text}' must be whole numbers from {least}, separated by commas, e.g. {example}."
        )
    return [int(name) for name in names]


def split_clean_ups(text: str) -> list[str]:
    """Split a list of clean-ups; raises InputError for one that there is not."""
    chosen = split_list(text)
    unknown = [name for name in chosen if name not in CLEAN_UPS]
    if unknown:
        raise InputError(f"there is no clean-up '{unknown[0]}'; choose of {', '.join(CLEAN_UPS)}.")
    return chosen


def split_tags(items: list[str] | None) -> dict[str, str]:
    """Split ``name=value`` items; raises InputError on other syntax or a name given twice."""
    tags: dict[str, str] = {}
    for item in items or ():
        name, sign, value = item.partition("=")
        if not sign or not name or not value:
            raise InputError(f"a tag must read like modality=MR, got '{item}'.")
        if name in tags:
            raise InputError(f"tag '{name}' is given twice.")
        tags[name] = value
    return tags


def parse_tags(items: list[str] | None) -> dict[str, str]:
    """Parse ``--tag`` options; other syntax is a usage error."""
    try:
        return split_tags(items)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--tag") from error


def note(message: str) -> None:
    """Say one thing to a person, on stderr: stdout belongs to the answer.

    Lines after the first are indented, so that no name in it begins what looks like another.
    """
    from recallseg.runtime.json_text import printable

    typer.echo(printable(message, lines=True).replace("\n", "\n  "), err=True)


def say(answer: object) -> None:
    """Print an answer for a person on stdout, whatever characters names in it are made of."""
    from recallseg.runtime.json_text import printable

    typer.echo(printable(answer, lines=True))


def tell_unlabelled(unlabelled: Sequence[Path]) -> None:
    """Say which images and volumes have no mask."""
    if unlabelled:
        these = ", ".join(map(str, unlabelled))
        note(
            f"{len(unlabelled)} images have no label map or segmentation and were left out: {these}"
        )


def tell_passed(passed: Sequence[PassedOver]) -> None:
    """Say which files were not taken, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for each in passed:
        by_reason.setdefault(each.reason, []).append(str(each.path))
    for reason, paths in by_reason.items():
        note(f"passed over, {reason}: {', '.join(paths)}")


def emit_json(value: Any) -> None:
    """Print a JSON value on stdout."""
    from recallseg.runtime.json_text import json_text

    typer.echo(json_text(value))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows on stdout with nothing cut off: on a terminal folded, elsewhere a line each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for place, head in enumerate(heads):
        longest = max((len(row[place]) for row in rows), default=0)
        whole = place == 0 and longest <= WHOLE  # what is copied into the next command
        table.add_column(head, overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(markup=False, width=UNBOUNDED)
    console.print(table)


def check_output_folder(path: Path) -> None:
    """Look whether results can be written, before the work that would be lost without; makes none.

    Raises
    ------
    OutputError
        If the folder, or the first one above it that there is, is none or cannot be written.
    OSError
        If the disk does not say what there is.
    """
    from recallseg.engines.reading import is_there
    from recallseg.runtime.json_text import printable

    place = path.absolute()
    while not is_there(place):
        place = place.parent
    why = "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written"
    if not place.is_dir():
        why = f"{place} is no folder"
    if why:
        raise OutputError(
            f"{printable(path)} cannot be the folder of outputs: {printable(why)}. Choose another "
            "--output."
        )


def state_of(library: Library) -> dict[str, Any]:
    """Return what a program wants to know of a library that was changed, as JSON values."""
    return {
        "path": str(library.path),
        "digest": library.digest,
        "bundle_identity": library.bundle_identity,
        "exemplars": len(library),
        "retired": len(library.retired),
        "structures": list(library.structures),
    }


_said: set[str] = set()


def forget_notices() -> None:
    """Begin a call of the command line, in which nothing was said yet."""
    _said.clear()


def say_notice(notice: str) -> None:
    """Say, unmissably, what must be said of the weights: once, when the input has been checked.

    Nothing when there is nothing to say.
    """
    if notice and notice not in _said:
        _said.add(notice)
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        Console(stderr=True).print(Panel(Text(notice.upper(), justify="center"), style="bold red"))


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr, or in a log a line now and then; call the result after each step.

    What it yields takes what is being done and, if it is not a whole step, how far that goes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[step]}"),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total)
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(_plain(title), total=total, step="")
        yield lambda step, advance=1: progress.update(task, advance=advance, step=_plain(step))


def _plain(text: str) -> str:
    """Return text that Rich shows as it is, square brackets included."""
    from rich.markup import escape

    from recallseg.runtime.json_text import printable

    return escape(printable(text))


def _lines(title: str, total: int) -> Callable[..., None]:
    """Return what a bar would be told; it says so in a line, once in a while."""
    done, told = 0.0, monotonic()
    began = told

    def step(what: str, advance: float = 1) -> None:
        nonlocal done, told
        done += advance
        if monotonic() - told >= QUIET_SECONDS:
            told = monotonic()
            rate = done / (told - began)
            left = f", {rate:.2g}/s, {_minutes((total - done) / rate)} left" if rate > 0 else ""
            note(f"{title}: {done:.0f} of {total}{left}{f', {what}' if what else ''}")

    return step


def _minutes(seconds: float) -> str:
    """Return a time to wait, as a person would say it."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes} min" if minutes >= 10 else f"{minutes}:{rest:02d} min"


def counted(step: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return what a library tells its progress to, for a bar's ``step``."""
    return lambda done, total: step("")
