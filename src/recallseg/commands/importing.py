"""``recallseg library import``: exemplars from what people have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from recallseg.commands.common import (
    AsStoredOption,
    EngineOption,
    JsonOption,
    LegendOption,
    LibraryArgument,
    OneTimeOption,
    PlaneOption,
    PrecisionOption,
    ResampleOption,
    SegmentsOption,
    StackOption,
    TagOption,
    ThreadsOption,
    VoiOption,
    emit_json,
    note,
    parse_tags,
    parsed,
    progress_bar,
    say,
    say_notice,
    tell_passed,
    tell_unlabelled,
)
from recallseg.commands.library import MissingOption, parse_missing
from recallseg.engines import defaults

__all__ = ["import_"]


def import_(
    library: LibraryArgument,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder with NAME.png and NAME.mask.png, NAME.mask.STRUCTURE.png or LabelMe's "
            "NAME.json; a NIfTI, NRRD or MetaImage volume, or a folder of them, with "
            "NAME.mask.nii.gz, NAME.seg.nrrd or NAME.mask.mha beside; DICOM series with their SEG.",
        ),
    ],
    labels: Annotated[
        Optional[str],
        typer.Option(
            "--labels",
            help="Structures by label value, e.g. 1=liver,2=spleen; segments carry names instead.",
        ),
    ] = None,
    legend: LegendOption = None,
    mask: Annotated[
        Optional[Path],
        typer.Option(
            help="Segmentation of one volume or image; or a folder of masks, or a COCO file.",
            show_default="beside",
        ),
    ] = None,
    slices: Annotated[
        str,
        typer.Option(
            help="Of a volume: all with a structure, every:5, or different:16 from all else."
        ),
    ] = "all",
    empty: Annotated[
        bool, typer.Option("--empty", help="Choose from slices without any structure too.")
    ] = False,
    plane: PlaneOption = None,
    voi: VoiOption = False,
    time: OneTimeOption = None,
    stack: StackOption = None,
    resample: ResampleOption = False,
    segments: SegmentsOption = "union",
    as_stored: AsStoredOption = False,
    missing: MissingOption = "absent",
    tag: TagOption = None,
    key: Annotated[
        Optional[str],
        typer.Option(
            help="Keys of exemplars, e.g. '{name}' or 'lung-{number}'. They stand in records of "
            "other patients.",
            show_default="random",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at the first file that fails; status 1 if any was left out."
        ),
    ] = False,
    engine: EngineOption = defaults.ENGINE,
    precision: PrecisionOption = defaults.PRECISION,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add annotated images or slices. Run it again to continue an interrupted import.

    Tags of DICOM slices are taken from their header: modality, body part, view; no patient's. Names
    of files and UIDs go to the library's table of identifiers, see 'recallseg library whois'.
    """
    from recallseg.runtime.formats.annotated_volumes import SliceChoice
    from recallseg.runtime.formats.annotations import find_annotations
    from recallseg.runtime.formats.pairs import parse_labels, parse_legend
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.importing import check_pattern, import_exemplars

    names = None if labels is None else parsed(parse_labels, labels, "--labels")
    colours = None if legend is None else parsed(parse_legend, legend, "--legend")
    tags = parse_tags(tag)
    unlooked = parsed(parse_missing, missing, "--missing")
    parsed(SliceChoice.parse, slices, "--slices")
    if key is not None:
        parsed(check_pattern, key, "--key")
    found = find_annotations(path, mask)
    with Library.open(
        library, mode="write", engine=engine, precision=precision, threads=threads
    ) as opened:
        found.check_named(names, colours)
        say_notice(opened.bundle.notice)
        with progress_bar("Importing", len(found)) as step:
            report = import_exemplars(
                opened,
                found,
                labels=names,
                legend=colours,
                slices=slices,
                empty=empty,
                plane=plane,
                voi=voi,
                time=time,
                stack=stack,
                resample=resample,
                segments=segments,
                as_stored=as_stored,
                missing=unlooked,
                tags=tags,
                key=key,
                strict=strict,
                progress=step,
            )
        count = len(opened)
    if as_json:
        unlabelled = [str(path) for path in found.unlabelled]
        passed = {str(each.path): each.reason for each in found.passed}
        emit_json({**vars(report), "unlabelled": unlabelled, "passed_over": passed})
    else:
        say(
            f"{len(report.added)} added, {len(report.skipped)} already there, {len(report.failed)} "
            f"failed; the library has {count} exemplars"
        )
    tell_unlabelled(found.unlabelled)
    tell_passed(found.passed)
    for name, texts in report.notes.items():
        for text in texts:
            note(f"{name}: {text}")
    for name, why in report.failed.items():
        note(f"failed: {name}: {why}")
    if report.added and not as_json:
        note(
            f"next: 'recallseg library calibrate {library}' lets results say whether they are "
            f"normal; 'recallseg segment {library} PATH --output FOLDER' segments"
        )
    if report.failed or (strict and (found.unlabelled or found.passed)):
        raise typer.Exit(1)
