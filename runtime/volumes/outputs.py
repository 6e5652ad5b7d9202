"""Where the segmentation of a volume goes: in its source's format, with record and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from recallseg.engines.durable import make_folder, replace_file
from recallseg.engines.errors import OutputError
from recallseg.runtime.formats.concepts import Concept, concepts_for
from recallseg.runtime.formats.dicom_seg import Algorithm, check_segmentation
from recallseg.runtime.formats.kinds import FORMATS
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.reports.pictures import source_of
from recallseg.runtime.reports.volume_page import contact_sheet, render_volume_page
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.outputs import (
    no_halves,
    output_files,
    preview_files,
    record_file,
    remove_previews,
)
from recallseg.runtime.volumes.slices import VolumeResult, segment_volume
from recallseg.runtime.volumes.writing import write_segmentation

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = [
    "VolumeSettings",
    "check_output",
    "segment_to_files",
    "write_preview",
    "write_volume_result",
]


@dataclass(frozen=True)
class VolumeSettings:
    """How volumes are treated.

    Attributes
    ----------
    plane : see :meth:`recallseg.runtime.formats.volume.Slicing.of`.
    largest, fill_holes : see :func:`recallseg.runtime.volumes.slices.clean_up`.
    preview : whether to leave pictures, of pictures too.
    voi : see :func:`recallseg.runtime.formats.dicom.read_dicom`.
    concepts : coded meaning by structure, beyond the built-in table; see
        :mod:`recallseg.runtime.formats.concepts`.
    as_stored : of pictures, see :func:`recallseg.runtime.formats.images.read_image`.
    time, stack : see :func:`recallseg.runtime.formats.reading.read_volume`; ``all`` volumes at one
        place are segmented one by one.
    """

    plane: str | None = None
    largest: bool = False
    fill_holes: bool = False
    preview: bool = False
    voi: bool = False
    concepts: Mapping[str, Concept] = field(default_factory=dict)
    as_stored: bool = False
    time: int | Literal["all"] | None = None
    stack: str | None = None


def segment_to_files(
    segmenter: Segmenter,
    volume: Volume,
    base: Path,
    settings: VolumeSettings,
    *,
    kind: str,
    source: str,
    log: AuditLog | None = None,
    progress: Callable[[str], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[VolumeResult, dict[str, Any]]:
    """Segment a volume, clean up, log, write pictures and result; return it and its record.

    Parameters
    ----------
    base, kind, source, extra : see :func:`write_volume_result`.
    log : in which the segmentation is recorded before it is written.
    progress : is told of each slice that is done.

    Raises
    ------
    InputError, OutputError, EngineRunError, AuditError, OSError
        As :func:`check_output`, :func:`segment_volume` and :func:`write_volume_result` say; what
        an output needs is checked before the first slice is segmented.
    """
    check_output(base, volume, kind, segmenter.structures, settings.concepts)
    result = segment_volume(
        segmenter,
        volume,
        plane=settings.plane,
        largest=settings.largest,
        fill_holes=settings.fill_holes,
        progress=progress,
    )
    read_with = {"voi": settings.voi}
    if log is not None:
        log.record(volume.array, result.label_map, {**result.to_audit(volume), **read_with})
    extra = {**read_with, **(extra or {})}
    with no_halves(base, *output_files(base, kind)):
        if settings.preview:
            write_preview(base, volume, result, segmenter.library)
        else:
            remove_previews(base)
        record = write_volume_result(base, volume, kind, result, source, extra, settings.concepts)
    return result, record


def check_output(
    base: Path,
    volume: Volume,
    kind: str,
    structures: Sequence[str],
    concepts: Mapping[str, Concept] | None = None,
) -> None:
    """See before the work whether a volume's segmentation can be written.

    Raises
    ------
    InputError
        If a DICOM source lacks what a SEG must repeat of it.
    OutputError
        If the folder cannot be written or has too little room, or the format cannot hold it.
    """
    folder = base.parent
    try:
        make_folder(folder)
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp"):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"{printable(folder)} cannot be written: {error.strerror}.") from error
    needed = len(structures) * prod(volume.shape) // 8 + 2**20  # a bit each; headers
    if free < needed:
        raise OutputError(
            f"{printable(folder)} has {free / 1e6:.0f} MB left; the segmentation may take "
            f"{needed / 1e6:.0f} MB. Make room, or choose another --output."
        )
    if kind == "dicom" and volume.frame != "image":
        check_segmentation(volume, structures, Algorithm("0", {}), concepts)


def write_volume_result(
    base: Path,
    volume: Volume,
    kind: str,
    result: VolumeResult,
    source: str,
    extra: Mapping[str, Any] | None = None,
    concepts: Mapping[str, Concept] | None = None,
) -> dict[str, Any]:
    """Write the segmentation and its record, the record last; return the record.

    DICOM becomes a SEG (none if nothing was found: DICOM knows no empty one), NIfTI a label map,
    NRRD a ``.seg.nrrd``. Pictures without a patient frame become PNG, or NIfTI if they are several.

    Parameters
    ----------
    kind : as :func:`recallseg.runtime.formats.reading.volume_format` says.
    source : name of the volume's file or folder.
    extra : more fields for the record.
    concepts : see :class:`VolumeSettings`.

    Raises
    ------
    InputError
        If a DICOM source lacks what a SEG must repeat of it.
    OutputError
        If a SEG cannot be made.
    OSError
        If the folder cannot be written.
    """
    from recallseg import __version__

    make_folder(base.parent)
    if volume.frame == "image":
        kind = "image" if volume.shape[0] == 1 else "nifti"
    target = base.with_name(base.name + FORMATS[kind].mask)
    written: str | None = target.name
    known = concepts_for(result.labels, concepts)
    notes = list(volume.notes)
    if target.suffix in (".nrrd", ".dcm"):
        plain = [name for name, concept in known.items() if not concept.known]
        if plain:
            notes.append(f"no code is known of {', '.join(plain)}: written as tissue (--codes)")
    elif any(map(len, result.shared.values())):
        count = sum(map(len, result.shared.values()))
        notes.append(
            f"structures overlap in {count} voxels; this format holds one a voxel, the surest"
        )
    if target.suffix != ".dcm" or result.label_map.any():
        write_segmentation(target, result, volume, concepts=known)
    else:
        target.unlink(missing_ok=True)  # of an earlier run
        written = None
    record = {
        "image": source,
        "mask": written,
        "recallseg": __version__,
        **result.to_json(volume),
        "notes": notes,
        **(extra or {}),
    }
    replace_file(record_file(base), json_text(record).encode())
    return record


def write_preview(base: Path, volume: Volume, result: VolumeResult, library: Library) -> None:
    """Write a contact sheet (PNG) and a page (HTML) of a segmented volume.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    make_folder(base.parent)
    sheet, page = preview_files(base)
    replace_file(sheet, contact_sheet(volume, result, library.intensity))
    text = render_volume_page(
        volume, result, library.intensity, source_of(library), printable(base.name)
    )
    replace_file(page, text.encode())
