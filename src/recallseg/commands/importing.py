"""``recallseg library import``: exemplars from what people have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from recallseg.commands.common import (
    EngineOption,
    JsonOption,
    LibraryArgument,
    PlaneOption,
    PrecisionOption,
    StackOption,
    ThreadsOption,
    VoiOption,
    emit_json,
    note,
    parsed,
    progress_bar,
    say_notice,
)
from recallseg.commands.library import MissingOption, TagOption, parse_missing, parse_tags
from recallseg.engines.errors import InputError
from recallseg.runtime.json_text import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recallseg.runtime.formats.annotated_volumes import SliceChoice
    from recallseg.runtime.formats.pairs import Missing
    from recallseg.runtime.formats.volume import Volume
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.importing import ImportReport

__all__ = ["import_"]


def import_(
    library: LibraryArgument,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder with NAME.png and NAME.mask.png; a NIfTI or NRRD volume, or a folder of "
            "them, with NAME.mask.nii.gz or NAME.seg.nrrd beside; a DICOM series.",
        ),
    ],
    labels: Annotated[
        Optional[str],
        typer.Option(
            "--labels",
            help="Structures by label value, e.g. 1=liver,2=spleen; segments carry names instead.",
        ),
    ] = None,
    mask: Annotated[
        Optional[Path],
        typer.Option(
            help="Segmentation of one volume: SEG, NIfTI, .seg.nrrd.", show_default="beside"
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
    time: Annotated[
        Optional[int],
        typer.Option("--time", min=1, help="Which of several volumes at one place, from 1."),
    ] = None,
    stack: StackOption = None,
    resample: Annotated[
        bool,
        typer.Option("--resample", help="Take masks of another grid too, by the nearest voxel."),
    ] = False,
    segments: Annotated[
        str,
        typer.Option(help="Segments of one name: 'union', or 'by-number' to keep them apart."),
    ] = "union",
    missing: MissingOption = "absent",
    tag: TagOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first file that fails.")
    ] = False,
    engine: EngineOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add annotated images or slices. Run it again to continue an interrupted import.

    Tags of DICOM slices are taken from their header: modality, body part, view; no patient's.
    """
    from recallseg.runtime.formats.annotated_volumes import SliceChoice, read_annotated_volume
    from recallseg.runtime.formats.pairs import parse_labels
    from recallseg.runtime.library import Library

    if segments not in ("union", "by-number"):
        raise typer.BadParameter("expected union or by-number.", param_hint="--segments")
    read = partial(
        read_annotated_volume,
        voi=voi,
        time=time,
        stack=stack,
        resampled=resample,
        by_number=segments == "by-number",
    )
    names = None if labels is None else parsed(parse_labels, labels, "--labels")
    tags = parse_tags(tag)
    unlooked = parsed(parse_missing, missing, "--missing")
    choice = parsed(lambda text: SliceChoice.parse(text, empty=empty), slices, "--slices")
    volumes = _volumes(path, mask)
    unlabelled: tuple[Path, ...] = ()
    with Library.open(
        library, mode="write", engine=engine, precision=precision, threads=threads
    ) as opened:
        say_notice(opened.bundle.notice)
        if volumes:
            report = _import_volumes(
                opened, volumes, names, choice, plane, read, unlooked, tags, strict
            )
        else:
            report, unlabelled = _import_pairs(opened, path, names, unlooked, tags, strict)
        count = len(opened)
    if as_json:
        emit_json({**vars(report), "unlabelled": [str(path) for path in unlabelled]})
    else:
        typer.echo(
            f"{len(report.added)} added, {len(report.skipped)} already there, {len(report.failed)} "
            f"failed; the library has {count} exemplars"
        )
    if unlabelled:
        note(f"{len(unlabelled)} images have no label map and were left out")
    for name, why in report.failed.items():
        note(f"failed: {name}: {why}")
    if report.failed:
        raise typer.Exit(1)


def _volumes(path: Path, mask: Path | None) -> list[tuple[Path, Path]]:
    """Return volumes with their segmentations; none if it is a folder of pairs of images."""
    from recallseg.runtime.formats.annotated_volumes import find_segmentation
    from recallseg.runtime.formats.dicom import find_series
    from recallseg.runtime.formats.dicom_seg import is_segmentation
    from recallseg.runtime.formats.reading import is_volume

    if path.exists() and is_volume(path):
        found = mask or find_segmentation(path)
        if found is None and path.is_dir():
            inside = [file for file in find_series(path) if is_segmentation(file)]
            if len(inside) > 1:
                names = ", ".join(file.name for file in inside)
                raise InputError(
                    f"there are {len(inside)} segmentations beside {path} ({names}). Say which "
                    "with --mask."
                )
            found = inside[0] if inside else None
        if found is None:
            raise InputError(
                f"there is no segmentation beside {path}. Name it with --mask: a DICOM SEG, a "
                "NIfTI label map or a .seg.nrrd."
            )
        return [(path, found)]
    if mask is not None:
        raise InputError(f"--mask belongs to one volume, and {path} is none.")
    files = sorted(path.iterdir()) if path.is_dir() else []
    pairs = [
        (file, find_segmentation(file)) for file in files if file.is_file() and is_volume(file)
    ]
    return [(file, found) for file, found in pairs if found is not None]


def _import_volumes(
    library: Library,
    volumes: list[tuple[Path, Path]],
    labels: Mapping[int, str] | None,
    choice: SliceChoice,
    plane: str | None,
    read: Callable[..., tuple[Volume, dict[str, NDArray[np.bool_]]]],
    missing: Missing,
    tags: Mapping[str, str],
    strict: bool,
) -> ImportReport:
    import numpy as np

    from recallseg.runtime.formats.annotated_volumes import annotated_slices
    from recallseg.runtime.formats.reading import volume_stem
    from recallseg.runtime.library.importing import ImportReport, import_annotated

    added: dict[str, str] = {}
    skipped: list[str] = []
    failed: dict[str, str] = {}
    for path, segmentation in volumes:
        try:
            volume, masks = read(path, segmentation, labels)
            for text in volume.notes:
                note(printable(f"{path.name}: {text}"))
            held = [library.embeddings(name)[1] for name in library.structures]
            chosen = annotated_slices(
                volume,
                masks,
                volume_stem(path),
                choice,
                plane=plane,
                missing=missing,
                embed=library.embed,
                known=np.concatenate(held) if held else None,
            )
        except InputError as error:
            if strict:
                raise
            failed[path.name] = str(error)
            continue
        with progress_bar(f"Importing {path.name}", len(chosen)) as step:
            report = import_annotated(
                library,
                [(each.name, lambda each=each: each) for each in chosen],  # type: ignore[misc]
                tags={**volume.tags, **tags},
                strict=strict,
                progress=step,
            )
        added |= report.added
        skipped += report.skipped
        failed |= report.failed
    return ImportReport(added, tuple(skipped), failed)


def _import_pairs(
    library: Library,
    folder: Path,
    labels: Mapping[int, str] | None,
    missing: Missing,
    tags: Mapping[str, str],
    strict: bool,
) -> tuple[ImportReport, tuple[Path, ...]]:
    from recallseg.runtime.formats.pairs import find_pairs
    from recallseg.runtime.library.importing import import_pairs

    found = find_pairs(folder)
    if labels is None:
        raise InputError("say what the values of the label maps mean: --labels 1=liver,2=spleen.")
    with progress_bar("Importing", len(found.pairs)) as step:
        report = import_pairs(
            library,
            found.pairs,
            labels,
            missing=missing,
            tags=tags,
            strict=strict,
            progress=step,
        )
    return report, found.unlabelled
