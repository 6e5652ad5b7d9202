"""``recallseg library next``: what to annotate next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from recallseg.commands.asking import Asking, grouped
from recallseg.commands.common import (
    AsStoredOption,
    JsonOption,
    LibraryArgument,
    PlaneOption,
    VoiOption,
    emit_json,
    note,
    one_of,
    print_table,
    progress_bar,
    say_notice,
    tell_passed,
)
from recallseg.runtime.json_text import printable

if TYPE_CHECKING:
    from recallseg.runtime.formats.finding import Finding

__all__ = ["next_"]


def _by(name: str) -> str:
    from recallseg.runtime.segmenting.choosing import By

    return one_of(name, get_args(By), "way to choose")


@grouped
def next_(
    library: LibraryArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images and volumes.")],
    asking: Asking,
    count: Annotated[int, typer.Option(min=1, help="How many to choose.")] = 8,
    by: Annotated[
        str,
        typer.Option(
            callback=_by,
            help="distance to the library, doubt of it, coverage of all images, or all of these.",
        ),
    ] = "all",
    plane: PlaneOption = None,
    voi: VoiOption = False,
    as_stored: AsStoredOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which images (of volumes, which slices) to annotate next, best first."""
    from recallseg.runtime.formats.finding import find_inputs
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.choosing import choose_next

    asking.check()
    found = find_inputs([folder])
    with Library.open(
        library, engine=asking.engine, precision=asking.precision, threads=asking.threads
    ) as opened:
        doubtful = by in ("all", "doubt") and opened.structures
        segmenter = asking.segmenter(opened) if doubtful else None
        with progress_bar("Looking", len(found.items)) as step:
            chosen = choose_next(
                opened,
                _images(found, plane, voi, as_stored),
                count,
                by=by,  # type: ignore[arg-type]
                segmenter=segmenter,
                progress=step,
            )
        say_notice(opened.bundle.notice)
    tell_passed(found.passed)
    if as_json:
        emit_json(
            [
                {n: None if v != v else v for n, v in vars(one).items()}  # NaN
                for one in chosen
            ]
        )
        return
    rows = []
    for one in chosen:
        numbers = (one.distance, one.doubt, one.gain)
        cells = ["-" if math.isnan(number) else f"{number:.3f}" for number in numbers]
        rows.append([printable(one.name), *cells])
    print_table(("annotate next", "distance", "doubt", "gain"), rows)
    if not doubtful and by in ("all", "doubt"):
        note("the library shows no structure yet, so doubt does not count")


def _images(
    found: Finding, plane: str | None, voi: bool, as_stored: bool
) -> Iterator[tuple[str, Any]]:
    """Yield names and images; of a volume every slice, upright."""
    from recallseg.runtime.formats.images import read_image
    from recallseg.runtime.formats.reading import read_item
    from recallseg.runtime.formats.volume import Slicing

    for item in found.items:
        name = item.relative.as_posix()
        if item.kind == "image":
            yield name, read_image(item.path, as_stored=as_stored)
            continue
        volume = read_item(item, voi=voi)
        slicing = Slicing.of(volume, plane)
        for index in range(slicing.count(volume)):
            yield f"{name}-{slicing.plane}-{index:04d}", slicing.view(volume.array, index)
