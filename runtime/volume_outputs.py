"""Where the segmentation of a volume goes: in the format of its source, with record and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recallseg.runtime.formats.dicom_seg import write_segmentation
from recallseg.runtime.formats.images import write_atomically, write_label_map
from recallseg.runtime.formats.nifti import write_nifti
from recallseg.runtime.formats.nrrd import write_seg_nrrd
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.outputs import mask_file, record_file
from recallseg.runtime.volumes import VolumeResult

__all__ = ["volume_files", "write_volume_result"]

_SUFFIXES = {"dicom": ".seg.dcm", "nifti": ".mask.nii.gz", "nrrd": ".seg.nrrd"}


def volume_files(base: Path) -> list[Path]:
    """Return every file that segmenting a volume may write."""
    names = [*_SUFFIXES.values(), ".preview.png", ".preview.html"]
    return [mask_file(base), record_file(base), *(base.with_name(base.name + s) for s in names)]


def write_volume_result(
    base: Path, volume: Volume, kind: str, result: VolumeResult, source: str
) -> dict[str, Any]:
    """Write the segmentation and its record, the record last; return the record.

    DICOM becomes a SEG (none if nothing was found: DICOM knows no empty one), NIfTI a label map,
    NRRD a ``.seg.nrrd``. Pictures without a patient frame become PNG, or NIfTI if there are several.

    Parameters
    ----------
    kind : as :func:`recallseg.runtime.formats.reading.volume_format` says.
    source : name of the volume's file or folder.

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
        target = mask_file(base) if single else base.with_name(base.name + _SUFFIXES["nifti"])
    else:
        target = base.with_name(base.name + _SUFFIXES[kind])
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
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(record_file(base), text.encode())
    return record
