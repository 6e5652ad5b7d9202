"""Bring annotated images into a library, a few at a time, so that it can be resumed.

What is in the library already (same pixels, same masks, same absences), in use or retired, is
skipped: after an interruption the same command continues. A file that cannot be used does not stop
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    VolumeReader,
    annotated_slices,
    read_annotated_volume,
    volume_reader,
)
from recallseg.runtime.formats.annotations import AnnotatedVolume, Annotations, find_annotations
from recallseg.runtime.formats.dicom_headers import patient_of
from recallseg.runtime.formats.pairs import (
    Annotated,
    Legend,
    Missing,
    Pair,
    read_pair,
)
from recallseg.runtime.formats.volume import SPACING_TAG, Slicing, Volume
from recallseg.runtime.frozen import public
from recallseg.runtime.library.batches import Batches

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = [
    "ImportReport",
    "check_pattern",
    "import_annotated",
    "import_exemplars",
    "import_pairs",
    "import_volume",
    "patient_group",
]


@public
@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes
    ----------
    added : key by name.
    skipped : names of those that were in the library already, in use or retired.
    failed : message by name.
    notes : by name, what had to be decided while volumes were read, and what is retired.
    """

    added: Mapping[str, str]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def import_pairs(
    library: Library,
    pairs: Sequence[Pair],
    labels: Mapping[int, str] | None,
    *,
    missing: Missing = "absent",
    legend: Legend | None = None,
    as_stored: bool = False,
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Add every pair to a library; the first options as :func:`read_pair` takes them."""

    def reading(pair: Pair) -> Callable[[], Annotated]:
        return partial(read_pair, pair, labels, missing, legend=legend, as_stored=as_stored)

    return import_annotated(
        library,
        [(pair.name, reading(pair)) for pair in pairs],
        tags=tags,
        key=key,
        strict=strict,
        progress=progress,
    )


def import_volume(
    library: Library,
    volume: AnnotatedVolume,
    labels: Mapping[int, str] | None,
    choice: SliceChoice,
    *,
    plane: str | None = None,
    read: VolumeReader = read_annotated_volume,
    missing: Missing = "absent",
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    strict: bool = False,
) -> ImportReport:
    """Add the chosen slices of a volume; a volume that cannot be used is one failure.

    Parameters
    ----------
    labels : structure by label value, for label maps.
    read : how; see :func:`recallseg.runtime.formats.annotated_volumes.volume_reader`.
    choice, plane, missing : see :func:`annotated_slices`.
    tags : given to every slice, beside those of the volume.
    key : see :func:`import_annotated`.
    strict : raise instead.

    Raises
    ------
    InputError
        If ``strict`` and it cannot be used.
    LibraryWriteError
        If the library cannot be written.
    """
    item = volume.item
    name = item.relative.as_posix() + item.suffix  # files of two folders may have one name
    try:
        found, masks = read(item, volume.segmentation, labels)
        held = [library.embeddings(name)[1] for name in library.structures]
        chosen = annotated_slices(
            found,
            masks,
            item.relative.as_posix(),
            choice,
            plane=plane,
            missing=missing,
            embed=library.embed,
            known=np.concatenate(held) if held else None,
        )
    except InputError as error:
        if strict:
            raise
        return ImportReport({}, (), {name: str(error)})
    report = import_annotated(
        library,
        [(each.name, lambda each=each: each) for each in chosen],  # type: ignore[misc]
        tags={**found.tags, **_scale(found, plane), **(tags or {})},
        key=key,
        origin=f"{item.path}, series {item.series}" if item.series else str(item.path),
        group=patient_group(found) or f"volume {item.relative.as_posix()}",
        strict=strict,
    )
    if not found.notes:
        return report
    return replace(report, notes={name: found.notes, **report.notes})


def patient_group(volume: Volume) -> str | None:
    """Return what all images of a volume's patient belong to; None where no patient is told.

    For :meth:`Library.add`, which stores its keyed hash only.
    """
    return patient_of(getattr(volume.origin, "header", None))


def _scale(volume: Volume, plane: str | None) -> dict[str, str]:
    """Return the tag that says how large a pixel of a volume's slices is, where that is known."""
    if not volume.in_mm:
        return {}
    rows, columns = Slicing.of(volume, plane).spacing(volume)
    return {SPACING_TAG: f"{rows:.6g}x{columns:.6g}"}


def import_exemplars(
    library: Library,
    found: Annotations | str | Path,
    *,
    labels: Mapping[int, str] | None = None,
    legend: Legend | None = None,
    mask: str | Path | None = None,
    slices: str = "all",
    empty: bool = False,
    plane: str | None = None,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    resample: bool = False,
    segments: str = "union",
    as_stored: bool = False,
    missing: Missing = "absent",
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Add everything annotated that was found in a file or folder, as ``library import`` does.

    Parameters
    ----------
    found : a file or folder, or what
        :func:`recallseg.runtime.formats.annotations.find_annotations` found there.
    labels, legend, as_stored, missing : see :func:`read_pair`.
    mask : where the masks are, if not beside the images: see :func:`find_annotations`.
    slices, empty : which slices of volumes: ``all`` that show something, ``every:5`` or
        ``different:16``; with ``empty`` also of those that show nothing.
    plane : see :func:`import_volume`.
    voi, time, stack, resample, segments : see
        :func:`recallseg.runtime.formats.annotated_volumes.volume_reader`.
    tags : given to every exemplar.
    key : see :func:`import_annotated`.
    strict : stop at the first that cannot be used; what was added before stays.
    progress : called after each image and volume with its name.

    Raises
    ------
    InputError
        If there is nothing annotated; if label maps have no ``labels``; for options that cannot
        be understood; if ``strict`` and one cannot be used.
    LibraryWriteError
        If the library cannot be written.
    """
    choice = SliceChoice.parse(slices, empty=empty)
    read = volume_reader(voi, time, stack, resample, segments)
    if not isinstance(found, Annotations):
        found = find_annotations(found, mask)
    elif mask is not None:
        raise InputError("mask goes with a file or folder; what was found has its masks already.")
    found.check_named(labels, legend)
    if found.unclear and strict:
        raise InputError(next(iter(found.unclear.values())))
    if strict:
        found.check_whole()
    report = import_pairs(
        library,
        found.pairs,
        labels,
        missing=missing,
        legend=legend,
        as_stored=as_stored,
        tags=tags,
        key=key,
        strict=strict,
        progress=progress,
    )
    added, skipped = dict(report.added), list(report.skipped)
    unseen = {str(each.path): each.reason for each in found.unseen}
    failed = {**report.failed, **found.unclear, **unseen}
    notes = dict(report.notes)
    for volume in found.volumes:
        report = import_volume(
            library,
            volume,
            labels,
            choice,
            plane=plane,
            read=read,
            missing=missing,
            tags=tags,
            key=key,
            strict=strict,
        )
        added |= report.added
        skipped += report.skipped
        failed |= report.failed
        notes |= report.notes
        if progress is not None:
            progress(volume.item.name)
    return ImportReport(added, tuple(skipped), failed, notes)


def check_pattern(key: str) -> None:
    """Raise InputError unless keys can be made of a pattern."""
    if not ("{name}" in key or "{number}" in key):
        raise InputError(
            f"a pattern of keys must have {{name}} or {{number}}, got '{key}': each exemplar has a "
            "key of its own."
        )


def import_annotated(
    library: Library,
    sources: Sequence[tuple[str, Callable[[], Annotated]]],
    *,
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    origin: str = "",
    group: str | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Add annotated images to a library that is open for writing, each read when its turn comes.

    Parameters
    ----------
    sources : names, and what gives the image. Only :meth:`recallseg.Library.whois` tells a name.
    tags : given to every exemplar.
    key : None for keys that say nothing; or a pattern in which ``{name}`` stands for the name and
        ``{number}`` for a number that is free. Keys stand in records of other patients.
    origin : where all of them come from, which is told with their names.
    group : that all of them belong to, see :meth:`recallseg.Library.add`.
    strict : stop at the first that cannot be used; what was added before stays.
    progress : called with the name of each when it is there, or is skipped, or failed. Several are
        added in one commit, as many as take a few seconds; an interruption loses those.

    Raises
    ------
    InputError
        If ``strict`` and one cannot be used.
    LibraryWriteError
        If the library cannot be written.
    """
    if key is not None:
        check_pattern(key)
    told = {"tags": dict(tags or {}), "group": group}
    batches = Batches(library, key, origin, told, strict, progress or (lambda name: None))
    for name, read in sources:
        batches.take(name, read)
    batches.flush()
    return ImportReport(batches.added, tuple(batches.skipped), batches.failed, batches.notes)
