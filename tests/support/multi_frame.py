"""Small enhanced multi-frame DICOM objects made of an array, as scanners write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, generate_uid

from support.dicom_series import ORIENTATIONS, make_slice

ENHANCED = {
    "CT": UID("1.2.840.10008.5.1.4.1.1.2.1"),
    "MR": UID("1.2.840.10008.5.1.4.1.1.4.1"),
    "US": UID("1.2.840.10008.5.1.4.1.1.6.2"),
    "XA": UID("1.2.840.10008.5.1.4.1.1.12.1.1"),
}


def items(**fields: Any) -> Items:
    """Return a sequence of one item."""
    item = Dataset()
    for name, value in fields.items():
        setattr(item, name, value)
    return Items([item])


def write_multi_frame(
    path: Path,
    array: np.ndarray,
    order: Sequence[int] | None = None,
    *,
    modality: str = "CT",
    orientation: Sequence[float] = ORIENTATIONS["axial"],
    spacing: tuple[float, float, float] = (3.0, 0.8, 0.9),
    origin: Sequence[float] = (-50.0, -60.0, 20.0),
    shared: bool = True,
    each: Callable[[int, Dataset], None] = lambda index, group: None,
    **fields: Any,
) -> Path:
    """Write SxHxW as frames: stored in ``order``, frame n showing ``array[order[n]]``.

    ``shared``: orientation and pixel measures once, else in each frame; ``each`` adds to a frame's
    group, given the index of its plane.
    """
    order = list(range(len(array)) if order is None else order)
    normal = np.cross(orientation[:3], orientation[3:])
    dataset = make_slice(array[0], Modality=modality, NumberOfFrames=len(order))
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ENHANCED[modality]
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid()
    common = {
        "PlaneOrientationSequence": items(ImageOrientationPatient=list(orientation)),
        "PixelMeasuresSequence": items(
            PixelSpacing=[spacing[1], spacing[2]], SliceThickness=spacing[0]
        ),
    }
    dataset.SharedFunctionalGroupsSequence = Items([Dataset()])
    groups = []
    for index in order:
        group = Dataset()
        position = np.array(origin) + normal * index * spacing[0]
        group.PlanePositionSequence = items(
            ImagePositionPatient=[round(float(v), 6) for v in position]
        )
        for name, value in common.items():
            setattr(dataset.SharedFunctionalGroupsSequence[0] if shared else group, name, value)
        each(index, group)
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Items(groups)
    dataset.PixelData = np.ascontiguousarray(array[order]).tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path
