"""Where the segmentation of a volume goes: in its source's format, with record and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom_seg import write_segmentation
from recallseg.runtime.formats.images import write_atomically, write_label_map
from recallseg.runtime.formats.nifti import write_nifti
from recallseg.runtime.formats.nrrd import write_seg_nrrd
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.reports.volume_page import contact_sheet, render_volume_page
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.outputs import (
    PREVIEW_SUFFIXES,
    VOLUME_SUFFIXES,
    mask_file,
    record_file,
)
from recallseg.runtime.volumes.slices import VolumeResult, clean_up, segment_volume

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["VolumeSettings", "segment_to_files", "write_preview", "write_volume_result"]


@dataclass(frozen=True)
class VolumeSettings:
    """How volumes are treated.

    Attributes
    ----------
    plane : see :meth:`recallseg.runtime.formats.volume.Slicing.of`.
    largest, fill_holes : see :func:`recallseg.runtime.volumes.slices.clean_up`.
    preview : whether to leave pictures.
    voi : see :func:`recallseg.runtime.formats.dicom.read_dicom`.
    """

    plane: str | None = None
    largest: bool = False
    fill_holes: bool = False
    preview: bool = False
    voi: bool = False


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
    InputError, EngineRunError, AuditError, OSError
        As :func:`segment_volume` and :func:`write_volume_result` say.
    """
    result = segment_volume(segmenter, volume, plane=settings.plane, progress=progress)
    if settings.largest or settings.fill_holes:
        result = clean_up(result, largest=settings.largest, fill_holes=settings.fill_holes)
    if log is not None:
        log.record(volume.array, result.label_map, result.to_audit(volume))
    if settings.preview:
        write_preview(base, volume, result, segmenter.library)
    return result, write_volume_result(base, volume, kind, result, source, extra)


def write_volume_result(
    base: Path,
    volume: Volume,
    kind: str,
    result: VolumeResult,
    source: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the segmentation and its record, the record last; return the record.

    DICOM becomes a SEG (none if nothing was found: DICOM knows no empty one), NIfTI a label map,
    NRRD a ``.seg.nrrd``. Pictures without a patient frame become PNG, or NIfTI if they are several.

    Parameters
    ----------
    kind : as :func:`recallseg.runtime.formats.reading.volume_format` says.
    source : name of the volume's file or folder.
    extra : more fields for the record.

    Raises
    ------
    InputError
        If a DICOM source lacks what a SEG must repeat of it.
    OSError
        If the folder cannot be written.
    """
    from recallseg import __version__

    base.parent.mkdir(parents=True, exist_ok=True)
    if volume.frame == "image":
        single = volume.shape[0] == 1
        target = mask_file(base) if single else base.with_name(base.name + VOLUME_SUFFIXES["nifti"])
    else:
        target = base.with_name(base.name + VOLUME_SUFFIXES[kind])
    written: str | None = target.name
    if target.suffix == ".png":
        write_label_map(target, result.label_map[0])
    elif target.suffix == ".gz":
        write_nifti(target, result.label_map, volume)
    elif target.suffix == ".nrrd":
        write_seg_nrrd(target, result.label_map, volume, result.labels)
    elif result.label_map.any():
        write_segmentation(target, volume, result)
    else:
        target.unlink(missing_ok=True)  # of an earlier run
        written = None
    record = {
        "image": source,
        "mask": written,
        "recallseg": __version__,
        **result.to_json(volume),
        **(extra or {}),
    }
    write_atomically(record_file(base), json_text(record).encode())
    return record


def write_preview(base: Path, volume: Volume, result: VolumeResult, library: Library) -> None:
    """Write a contact sheet (PNG) and a page (HTML) of a segmented volume.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """

    def source(key: str) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]] | None:
        try:
            return library.source(key) if library.keeps_sources else None
        except InputError:  # removed by another process since it was recalled
            return None

    base.parent.mkdir(parents=True, exist_ok=True)
    sheet, page = (base.with_name(base.name + suffix) for suffix in PREVIEW_SUFFIXES)
    write_atomically(sheet, contact_sheet(volume, result, library.intensity))
    text = render_volume_page(volume, result, library.intensity, source, printable(base.name))
    write_atomically(page, text.encode())
