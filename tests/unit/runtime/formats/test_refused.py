"""What cannot be used is refused: what it is, what was expected, and never another value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from support.dicom_series import write_object, write_series

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.dicom import count_dicom, read_dicom
from recallseg.runtime.formats.dicom_seg_reading import read_segmentation
from recallseg.runtime.formats.nifti import count_nifti, read_nifti
from recallseg.runtime.formats.nrrd import count_nrrd
from recallseg.runtime.formats.pairs import parse_labels
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.rtstruct import read_structure_set

STACK = np.random.default_rng(3).integers(0, 1000, (4, 12, 10)).astype(np.uint16)


def change(path: Path, **fields: Any) -> None:
    dataset = pydicom.dcmread(path)
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("which", "fields", "said"),
    [
        (1, {"PhotometricInterpretation": "MONOCHROME1"}, "slices differ in PhotometricInterp"),
        (4, {"SamplesPerPixel": 4}, "4 samples a pixel; expected 1 or 3"),
        (4, {"BitsAllocated": 12}, "12 bits a pixel; expected 1, 8, 16, 32 or 64"),
        (4, {"PixelSpacing": [0.8, 0]}, "pixel spacing is [0.8, 0.0]; expected more than 0"),
        (1, {"PixelSpacing": [0.8, float("nan")]}, "expected 2 numbers, got [0.8, nan]"),
        (1, {"ImagePositionPatient": [1, 2]}, "expected 3 numbers, got [1.0, 2.0]"),
        (1, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "two unit vectors at right angles"),
        (1, {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}, "two unit vectors at right angles"),
        (1, {"NumberOfFrames": -3}, "declares -3 frames"),
        (1, {"SeriesInstanceUID": "1.2.3"}, "holds 2 series; expected one"),
        (1, {"PixelData": b"\0" * 100}, "cannot be read as DICOM"),
    ],
)
def test_a_series_with_a_damaged_header(
    tmp_path: Path, which: int, fields: dict[str, Any], said: str
) -> None:
    for path in write_series(tmp_path / "s", STACK)[:which]:
        change(path, **fields)
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        read_dicom(tmp_path / "s")
    assert str(tmp_path / "s") in str(raised.value)


def test_slices_closer_than_can_be_told_apart(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    for path, height in zip(paths, (0.0009, 0.0017, 3.0, 6.0), strict=True):
        change(path, ImagePositionPatient=[-50.0, -60.0, height])
    with pytest.raises(InputError, match=r"two slices lie at one position\. Give each"):
        read_dicom(tmp_path / "s")


def test_no_slices_are_no_series(tmp_path: Path) -> None:
    for read in (read_dicom, count_dicom):
        with pytest.raises(InputError, match="there are no DICOM files"):
            read(())
        with pytest.raises(InputError, match=f"there are no DICOM files in {tmp_path}"):
            read(tmp_path)


def test_a_number_that_is_described_twice_is_nobodys(tmp_path: Path) -> None:
    """Each would have the outlines, or the pixels, of both, under the name of one."""
    write_series(tmp_path / "s", STACK)
    volume = read_dicom(tmp_path / "s")
    twice = []
    for name in ("liver", "spleen"):
        item = Dataset()
        item.ROINumber = item.SegmentNumber = 7
        item.ROIName = item.SegmentLabel = name
        twice.append(item)
    outlines = write_object(
        tmp_path / "rt.dcm", "1.2.840.10008.5.1.4.1.1.481.3", StructureSetROISequence=twice
    )
    with pytest.raises(InputError, match="structure's number twice"):
        read_structure_set(outlines, volume)
    pixels = write_object(
        tmp_path / "seg.dcm", "1.2.840.10008.5.1.4.1.1.66.4", SegmentSequence=twice
    )
    with pytest.raises(InputError, match="segment's number twice"):
        read_segmentation(pixels, volume)


def nifti(path: Path, array: np.ndarray, **fields: Any) -> Path:
    image = nibabel.Nifti1Image(array, np.eye(4))
    nibabel.save(image, path)
    with path.open("rb+") as file:  # nibabel would mend what is to be damaged
        header = nibabel.Nifti1Header.from_fileobj(file, check=False)
        for name, value in fields.items():
            header[name] = value
        file.seek(0)
        file.write(header.binaryblock)
    return path


def test_a_nifti_file_that_means_something_else(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), [(name, "u1") for name in "RGBA"])
    whole = np.ones((2, 3, 4), np.int16)
    for number, (array, fields, said) in enumerate(
        [
            (whole, {"xyzt_units": 5}, "states lengths in the unknown unit 5"),
            (whole[0], {}, "has 2 dimensions; expected a volume of three"),
            (rgba, {}, "voxels of type .*; expected whole or floating-point numbers"),
            (whole, {"srow_x": [np.nan, 0, 0, 0]}, "affine must be 4x4 and finite"),
            (whole, {"srow_x": [0, 0, 0, 0]}, "do not span space"),
        ]
    ):
        path = nifti(tmp_path / f"{number}.nii", array, **fields)
        with pytest.raises(InputError, match=said) as raised:
            read_nifti(path)
        assert str(path) in str(raised.value)


def test_files_that_are_counted_before_they_are_read(tmp_path: Path) -> None:
    for count, name in ((count_nifti, "a.nii"), (count_nrrd, "a.nrrd")):
        (tmp_path / name).write_bytes(b"NRRD0004\ntype: uint8\n\n" + bytes(400))
        with pytest.raises(InputError, match=f"{name} is no N.* file, or damaged"):
            count(tmp_path / name)


def test_what_is_asked_of_a_file_that_has_no_such_thing(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.ones((2, 3, 4), np.int16))
    with pytest.raises(InputError, match="no stacks to choose from: it is no DICOM"):
        read_volume(path, stack="1")
    with pytest.raises(InputError, match="label 70000 is too large"):
        parse_labels("70000=liver")
    nifti(tmp_path / "a.mask.nii", np.ones((2, 3, 4), np.uint8))
    nifti(tmp_path / "b.nii", np.ones((2, 3, 4), np.int16))
    with pytest.raises(InputError, match=r"--mask belongs to one image .*Name one"):
        find_annotations(tmp_path, tmp_path / "a.mask.nii")


@pytest.mark.parametrize("masks", ["folder", "coco.json"])
def test_masks_that_were_named_are_never_left_out(tmp_path: Path, masks: str) -> None:
    """Not for the segmentations that lie beside volumes, which nobody named."""
    images, named = tmp_path / "images", tmp_path / masks
    images.mkdir()
    nifti(images / "a.nii", np.ones((2, 3, 4), np.int16))
    nifti(images / "a.mask.nii", np.ones((2, 3, 4), np.uint8))
    assert len(find_annotations(images).volumes) == 1
    if masks == "folder":
        named.mkdir()
    else:
        named.write_text("[]")
    with pytest.raises(InputError, match=r"belong to pictures, and .* has none"):
        find_annotations(images, named)
    cv2.imwrite(str(images / "b.png"), np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"no pairs|neither a COCO file|no label map"):
        find_annotations(images, named)
