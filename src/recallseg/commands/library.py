"""``recallseg library ...``: make a library, fill it, look at it, keep it healthy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from recallseg.commands.asking import Asking, grouped
from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    LibraryArgument,
    PrecisionOption,
    TagOption,
    ThreadsOption,
    counted,
    emit_json,
    note,
    one_of,
    parse_tags,
    parsed,
    print_table,
    progress_bar,
    say,
    say_notice,
    state_of,
)
from recallseg.engines import defaults
from recallseg.engines.errors import InputError

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.calibrations import StoredCalibration
    from recallseg.runtime.library.choices import Choice
    from recallseg.runtime.library.heads import Head
    from recallseg.runtime.model.preprocess import Intensity

__all__ = ["LabelsOption", "MissingOption", "app", "parse_missing"]

app = typer.Typer(no_args_is_help=True, help="Make, fill, inspect and repair a library.")

LabelsOption = Annotated[
    str, typer.Option("--labels", help="Structures by label value, e.g. 1=liver,2=spleen.")
]
MissingOption = Annotated[
    str,
    typer.Option(
        "--missing", help="A structure without a pixel is 'absent', or 'unknown': nobody looked."
    ),
]


_LEFT_OUT = {
    "groups": "groups left out in turn",
    "exemplars": "exemplars left out in turn, no groups being known",
    "blocks": "blocks of slices left out in turn, within one patient",
}


def _memory_format(name: str) -> str:
    from recallseg.runtime.library.encoding import MEMORY_FORMATS

    return one_of(name, MEMORY_FORMATS, "format of memories")


@app.command()
def create(
    library: LibraryArgument,
    bundle: Annotated[str, typer.Option(help="Folder of a bundle, or the name of a shipped one.")],
    intensity: Annotated[
        str,
        typer.Option(
            help="How pixel values are scaled: percentile:1:99, window:LOW:HIGH (e.g. Hounsfield "
            "units), or range."
        ),
    ] = "percentile:1:99",
    sources: Annotated[
        bool,
        typer.Option(
            "--sources/--no-sources", help="Keep images and masks (to rebuild, calibrate)."
        ),
    ] = True,
    memories: Annotated[
        str,
        typer.Option(
            help="How memories are stored: fp16, or int8 in about half the bytes.",
            callback=_memory_format,
        ),
    ] = "fp16",
    as_json: JsonOption = False,
) -> None:
    """Make an empty library."""
    from recallseg.runtime.library import Library

    rule = parsed(_intensity, intensity, "--intensity")
    with Library.create(
        library, bundle, intensity=rule, keep_sources=sources, memory_format=memories
    ) as made:
        say_notice(made.bundle.notice)
        if as_json:
            emit_json({"library": state_of(made)})
        else:
            note(f"{made!r}")


@app.command()
def add(
    library: LibraryArgument,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    labels: LabelsOption,
    mask: Annotated[
        Optional[Path],
        typer.Option(help="Label map.", show_default="NAME.mask.png beside NAME.png"),
    ] = None,
    missing: MissingOption = "absent",
    tag: TagOption = None,
    group: Annotated[
        Optional[str],
        typer.Option(
            help="What it shares with others, e.g. its patient: fit leaves all of it out."
        ),
    ] = None,
    key: Annotated[
        Optional[str],
        typer.Option(
            help="Key of the exemplar; it stands in records of other patients.",
            show_default="random",
        ),
    ] = None,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add one annotated image; prints its key."""
    from recallseg.runtime.formats.pairs import Pair, parse_labels, read_pair
    from recallseg.runtime.library import Library

    names = parsed(parse_labels, labels, "--labels")
    tags = parse_tags(tag)
    pair = Pair(image.stem, image, mask or image.with_name(f"{image.stem}.mask.png"))
    annotated = read_pair(pair, names, parsed(parse_missing, missing, "--missing"))
    with Library.open(
        library, mode="write", engine=engine, precision=precision, threads=threads
    ) as opened:
        say_notice(opened.bundle.notice)
        made = opened.add(
            annotated.image,
            annotated.masks,
            absent=annotated.absent,
            tags=tags,
            key=key,
            name=str(image),
            group=group,
        )
        if as_json:
            emit_json({"key": made, "library": state_of(opened)})
        else:
            say(made)


@app.command("list")
def list_(library: LibraryArgument, as_json: JsonOption = False) -> None:
    """List exemplars and structures."""
    from recallseg.runtime.library import Library

    with Library.open(library) as opened:
        exemplars, retired = list(opened), opened.retired
        structures = {
            name: {"present": opened.count(name), "absent": opened.count(name, absent=True)}
            for name in opened.structures
        }
        calibrations = [_calibration(one, opened) for one in opened.calibrations]
        head = None if opened.head is None else _head(opened.head, opened)
        if as_json:
            emit_json(
                {
                    "path": str(opened.path),
                    "digest": opened.digest,
                    "bundle_identity": opened.bundle_identity,
                    "intensity": opened.intensity.to_json(),
                    "memory_format": opened.memory_format,
                    "calibrations": [one for _, one in calibrations],
                    "head": None if head is None else head[1],
                    "structures": structures,
                    "exemplars": [{**vars(e), "tags": dict(e.tags)} for e in exemplars],
                    "retired": [{**vars(e), "tags": dict(e.tags)} for e in retired],
                }
            )
            return
        rows = [
            [
                e.key,
                f"{e.height}x{e.width}",
                ", ".join(e.structures),
                ", ".join(e.absent),
                " ".join(f"{name}={value}" for name, value in e.tags.items()),
                e.created,
            ]
            for e in exemplars
        ]
        print_table(("key", "size", "structures", "absent", "tags", "added"), rows)
        say(
            f"{len(exemplars)} exemplars; "
            + ", ".join(
                f"{name} {number['present']} (absent in {number['absent']})"
                for name, number in structures.items()
            )
        )
        if retired:
            say(f"retired: {', '.join(e.key for e in retired)}")
        for line in [*(line for line, _ in calibrations), *(() if head is None else head[0])]:
            say(line)


@app.command()
def remove(
    library: LibraryArgument,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Exemplars to remove.")],
    compact: Annotated[bool, typer.Option("--compact", help="Then free their disk space.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase exemplars for good; 'retire' takes them out of use and keeps them."""
    from recallseg.runtime.library import Library

    keys = [*dict.fromkeys(keys)]
    with Library.open(library, mode="write") as opened:
        for key in keys:
            opened.get(key)  # all of them are there, or none is removed
        for key in keys:
            opened.remove(key)
        freed = opened.compact() if compact else None
        if as_json:
            emit_json({"removed": keys, "freed_bytes": freed, "library": state_of(opened)})
            return
        room = "" if freed is None else f", {freed} bytes freed"
        note(f"{len(keys)} removed{room}; {len(opened)} left")


@app.command()
def verify(library: LibraryArgument, as_json: JsonOption = False) -> None:
    """Compare everything stored with its digests."""
    from recallseg.runtime.library import Library

    with (
        Library.open(library) as opened,
        progress_bar("Verifying", len(opened) + len(opened.retired)) as step,
    ):
        report = opened.verify(counted(step))
    if as_json:
        emit_json({**vars(report), "ok": report.ok})
    else:
        say(
            f"{report.exemplars} exemplars, {report.memories} memories, {report.sources} sources, "
            f"{report.indexes} indexes, {report.heads} of heads: "
            f"{'all is well' if report.ok else 'damaged'}"
        )
        for problem in report.problems:
            say(f"  {problem}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def rebuild(
    library: LibraryArgument,
    bundle: Annotated[
        Optional[str], typer.Option(help="What it shall belong to.", show_default="its own bundle")
    ] = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Only the search index.")
    ] = False,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode every exemplar anew from its stored image, for instance for another bundle."""
    from recallseg.runtime.library import Library

    if index_only and bundle is not None:
        raise typer.BadParameter("--index-only and --bundle exclude each other.")
    with Library.open(
        library, mode="write", engine=engine, precision=precision, threads=threads
    ) as opened:
        if index_only:
            opened.rebuild_index()
        else:
            with progress_bar("Rebuilding", len(opened) + len(opened.retired)) as step:
                opened.rebuild(bundle, progress=counted(step))
            say_notice(opened.bundle.notice)
        if as_json:
            emit_json({"library": state_of(opened)})
        else:
            note(f"{opened!r}")


@app.command()
@grouped
def calibrate(library: LibraryArgument, asking: Asking, as_json: JsonOption = False) -> None:
    """Segment every exemplar from other groups, and store what is normal (for the quality flag).

    It holds for queries with the same settings; those for other settings or structures are kept.
    """
    from recallseg.runtime.library import Library

    asking.check()
    with Library.open(library, mode="write") as opened:
        segmenter = asking.segmenter(opened)
        say_notice(opened.bundle.notice)
        with progress_bar("Calibrating", len(opened)) as step:
            thresholds = segmenter.calibrate(counted(step))
    if as_json:
        emit_json({name: value.to_json() for name, value in thresholds.items()})
        return
    for name, value in thresholds.items():
        dice = "not segmented" if value.dice is None else f"median Dice {value.dice:.3f}"
        say(
            f"{name}: {value.exemplars} segmented, {_LEFT_OUT[value.left_out]}; {dice}; usual "
            f"distance up to {_limit(value.distance)}, IoU estimate from {_limit(value.iou)}"
        )


@app.command()
@grouped
def fit(
    library: LibraryArgument,
    asking: Asking,
    by: Annotated[
        Optional[str],
        typer.Option(help="Tag whose equal values make a group.", show_default="groups as added"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a head on the exemplars: boundaries at the image's own resolution, where surely no worse.

    Every exemplar is segmented without its group (patient, series, volume); what was made is kept,
    so that an interrupted fit goes on, and one after exemplars were added is short.
    """
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.fitting import fit_head

    asking.check()
    with Library.open(library, mode="write") as opened:
        segmenter = replace(asking, refine=False).segmenter(opened)
        say_notice(opened.bundle.notice)
        count = 2 * len(opened)
        with progress_bar("Fitting", count) as step:
            head = fit_head(segmenter, lambda done, of: step("", count / of), by=by)
        lines, data = _head(head, opened)
    if as_json:
        emit_json(data)
        return
    for line in lines:
        say(line)
    if any(choice.used for choice in head.choices.values()):
        note(
            "its results need a calibration of their own: recallseg library calibrate with the "
            "same options"
        )


def _head(head: Head, library: Library) -> tuple[list[str], dict[str, Any]]:
    """Return what was chosen for a head and is expected of it, for a person and as JSON values."""
    grouping = _LEFT_OUT[head.grouping]
    if head.grouping == "exemplars":
        grouping += (
            " (expected is too high for other patients where several are of one: add --group, or "
            "fit --by TAG)"
        )
    older = library.head_older(head)
    lines = [
        f"head {head.digest[:12]} fitted {head.created} on {len(head.fold_of)} exemplars, "
        f"{grouping}{f'; {older}' if older else ''}"
    ]
    for name, choice in head.choices.items():
        under, over = choice.interval
        dice = f"expected Dice {choice.expected:.3f} ({under:.3f} to {over:.3f})"
        if not choice.used:
            lines.append(f"  {name}: the head stays out: {choice.why}; {dice}")
            lines += _by_distance(choice)
            continue
        small = f", absent where {choice.absence}" if choice.absence else ""
        lines.append(
            f"  {name}: {choice.mix:.0%} of its logits are the head's{small}; {dice}, "
            f"{choice.alone:.3f} without (gain {choice.low:+.3f} to {choice.high:+.3f}, "
            f"{choice.exemplars} exemplars)"
        )
        lines += _by_distance(choice)
    return lines, {
        "digest": head.digest,
        "created": head.created,
        "exemplars": len(head.fold_of),
        "grouping": head.grouping,
        "older": older,
        "recipe": dict(head.recipe),
        "structures": {name: vars(choice) for name, choice in head.choices.items()},
    }


def _by_distance(choice: Choice) -> list[str]:
    """Return what is expected of images by their distance from the library."""
    lines = []
    if choice.curve:
        told = _steps(
            (knot.at, f"{knot.dice:.3f} ({knot.low:.3f} to {knot.high:.3f})")
            for knot in choice.curve
        )
        lines.append(f"    with a mask, by distance from the library: {told}")
        if any(abs(knot.dice) >= 0.0005 for knot in choice.sure):
            more = _steps((knot.at, f"{knot.dice:+.3f}") for knot in choice.sure)
            lines[-1] += f"; more or less by IoU estimate: {more}"
    right, of = choice.empty
    if of:
        lines.append(f"    without a mask, right in {right:.3g} of {of} exemplars")
    return lines


def _steps(knots: Iterable[tuple[float, str]]) -> str:
    """Say from where on it is what; what would be said again is left out."""
    told: list[str] = []
    for at, what in knots:
        if not told or not told[-1].endswith(f": {what}"):
            told.append(f"{at:.3f}: {what}")
    return ", ".join(told)


def _calibration(stored: StoredCalibration, library: Library) -> tuple[str, dict[str, Any]]:
    """Return what was calibrated, for a person and as JSON values."""
    from recallseg.runtime.segmenting.calibration import Thresholds
    from recallseg.runtime.segmenting.recipe import Recipe

    recipe = Recipe.from_json(stored.data.get("provenance", {}).get("recipe"))
    [learnt] = library.learnt([stored.recipe], [stored.structure], recipe.tags).values()
    of = len(learnt.embeddings)
    outdated = "" if stored.current else ", before the library was encoded anew"
    line = f"{stored.structure} calibrated with {learnt.made_with} of {of} for {recipe}{outdated}"
    return line, {
        "structure": stored.structure,
        "recipe": {"digest": stored.recipe, **recipe.to_json()},
        "current": stored.current,
        "made_with": learnt.made_with,
        "of": of,
        **Thresholds.from_json(stored.data.get("thresholds")).to_json(),
    }


def _limit(value: float | None) -> str:
    return "(too few)" if value is None else f"{value:.3f}"


def parse_missing(text: str) -> Literal["absent", "unknown"]:
    """Parse ``--missing``; raises InputError for anything but absent and unknown."""
    if text == "absent" or text == "unknown":
        return "absent" if text == "absent" else "unknown"
    raise InputError(f"'{text}' must be 'absent' or 'unknown'.")


def _intensity(text: str) -> Intensity:
    from recallseg.runtime.model.preprocess import Intensity

    mode, *ends = text.split(":")
    if mode not in ("percentile", "window", "range") or len(ends) not in (0, 2):
        raise InputError(
            f"intensities must read like percentile:1:99, window:-160:240 or range, got '{text}'."
        )
    if mode == "window" and not ends:
        raise InputError("a window needs its ends, e.g. window:-160:240.")
    if mode == "range" and ends:
        raise InputError(
            f"range is that of the pixels' type; of these ends, window:{':'.join(ends)}."
        )
    try:
        low, high = (float(end) for end in ends) if ends else (1.0, 99.0)
    except ValueError:
        raise InputError(f"'{text}' must end in two numbers.") from None
    if mode == "percentile":
        return Intensity("percentile", low, high)
    return Intensity("window", low, high) if mode == "window" else Intensity("range")
