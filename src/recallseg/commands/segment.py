"""``recallseg segment``: images and volumes in, segmentations and their records out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recallseg.commands.asking import Asking, Handling, grouped
from recallseg.commands.common import (
    JsonOption,
    LibraryArgument,
    check_output_folder,
    emit_json,
    note,
    progress_bar,
    say,
    say_notice,
    tell_passed,
)
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.json_text import printable

if TYPE_CHECKING:
    from recallseg.runtime.formats.finding import Finding, Item
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.audit import AuditLog
    from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["segment"]


@grouped
def segment(
    library: LibraryArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Images, NIfTI, NRRD, MetaImage or DICOM files, DICOM series, or folders of "
            "images.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for NAME.mask.png and NAME.json.")],
    asking: Asking,
    handling: Handling,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an earlier call ended: pass over what it did, if image, settings and "
            "library are the same.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment images, and volumes slice by slice, by recalling the library's exemplars."""
    from recallseg.runtime.formats.finding import find_inputs
    from recallseg.runtime.library import Library

    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other.")
    asking.check()
    check_output_folder(output)
    settings = handling.volumes()
    found = find_inputs(paths, handling.format)
    jobs = _jobs(found, paths, output)
    if not (overwrite or resume):
        _refuse_existing(jobs)
    log = handling.log()
    records: list[dict[str, Any]] = []
    failed = {str(each.path): each.reason for each in found.not_given}
    with Library.open(library) as opened:
        segmenter = asking.segmenter(opened, handling.propagate)
        if resume:
            jobs, before = _left(jobs, settings, segmenter), len(jobs)
            note(f"{before - len(jobs)} of {before} are done already and passed over")
        with progress_bar("Segmenting", len(jobs)) as step:
            for item, base in jobs:
                try:
                    done = _segment_item(segmenter, item, base, settings, overwrite, resume, log)
                    for record, line in done:
                        records.append(record)
                        for text in record.get("notes", ()):
                            note(f"{item.name}: {text}")
                        if not as_json:
                            say(line)
                        for name, why in record["quality"].get("reasons", {}).items():
                            note(f"{item.name}: {name}: {'; '.join(why)}")
                except (InputError, OutputError, MemoryError) as error:
                    failed[str(item.path)] = str(error) or "it needs more memory than there is"
                step(printable(item.name))
    if as_json:
        passed = {str(each.path): each.reason for each in found.passed}
        emit_json({"results": records, "failed": failed, "passed_over": passed})
    for mend in dict.fromkeys(record["quality"]["mend"] for record in records):
        if mend:
            note(f"uncalibrated: {mend}")
    for path_text, why in failed.items():
        note(f"failed: {path_text}: {why}")
    tell_passed(found.passed)
    if failed or (handling.strict and found.passed):
        raise typer.Exit(1)


def _segment_item(
    segmenter: Segmenter,
    item: Item,
    base: Path,
    settings: VolumeSettings,
    overwrite: bool,
    resume: bool,
    log: AuditLog | None,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Segment an image, a volume, or each of several at one place: those get names of their own."""
    from recallseg.runtime.formats.images import read_image
    from recallseg.runtime.formats.reading import count_item, read_item
    from recallseg.runtime.formats.volume import Slicing
    from recallseg.runtime.services.items import request_of, segment_item, volumes_of
    from recallseg.runtime.services.outputs import is_done, mask_file

    request = request_of(item, settings)
    extra = {"request": request}
    if item.kind == "image":
        picture = read_image(item.path, as_stored=settings.as_stored)
        say_notice(segmenter.bundle.notice)
        result, record = segment_item(
            segmenter, item, picture, base, settings, log=log, extra=extra
        )
        yield record, f"{mask_file(base)}  {result!r}"
        return
    volumes = volumes_of(item, base, settings.time, lambda: count_item(item, settings.stack))
    for time, target in volumes or ():
        with progress_bar(f"Reading {printable(item.name)}", len(item.files)) as step:
            each = step if len(item.files) > 1 else lambda image: None  # one file has many
            volume = read_item(
                item, voi=settings.voi, time=time, stack=settings.stack, progress=each
            )
        slices = Slicing.of(volume, settings.plane).count(volume)
        say_notice(segmenter.bundle.notice)
        if target != base and resume and is_done(target, request, segmenter.provenance):
            continue
        if target != base and not (overwrite or resume):
            _refuse_existing([(item, target)])
        with progress_bar(printable(item.name), slices) as step:
            result, record = segment_item(
                segmenter, item, volume, target, settings, log=log, progress=step, extra=extra
            )
        written = record["mask"] or "nothing found"
        yield record, f"{base.parent / written}  {result!r}"


def _jobs(found: Finding, paths: Sequence[Path], output: Path) -> list[tuple[Item, Path]]:
    """Return what to segment, each with the path, less its suffix, that its outputs get.

    Raises
    ------
    InputError
        If there is nothing, or two outputs would have the same name.
    """
    from recallseg.runtime.services.outputs import output_base

    if not found.items:
        why = "".join(f"\n{each}" for each in found.passed[:20])
        more = f"\nand {len(found.passed) - 20} more" if len(found.passed) > 20 else ""
        raise InputError(
            f"there is no image in {', '.join(map(printable, paths))}; nothing was written."
            + (f" Passed over:{why}{more}" if why else "")
        )
    jobs = [(item, output_base(output, item.relative)) for item in found.items]
    taken: dict[str, Path] = {}
    for item, base in jobs:
        other = taken.setdefault(str(base).casefold(), item.path)
        if other is not item.path:
            raise InputError(
                f"{printable(other)} and {printable(item.path)} would both be written to "
                f"{printable(base)}. Rename one, or segment them into different folders."
            )
    return jobs


def _left(
    jobs: Sequence[tuple[Item, Path]], settings: VolumeSettings, segmenter: Segmenter
) -> list[tuple[Item, Path]]:
    """Return the jobs that no earlier call has done; InputError where it did something else."""
    from recallseg.runtime.services.items import request_of
    from recallseg.runtime.services.outputs import is_done

    made = segmenter.provenance
    return [
        (item, base) for item, base in jobs if not is_done(base, request_of(item, settings), made)
    ]


def _refuse_existing(jobs: Sequence[tuple[Item, Path]]) -> None:
    from recallseg.runtime.services.outputs import output_files

    for item, base in jobs:
        for target in output_files(base, item.kind):
            if target.exists():
                raise InputError(
                    f"{printable(target)} exists already; nothing was written. Choose another "
                    "--output, or give --overwrite."
                )
