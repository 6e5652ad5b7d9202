"""Segmentations of pictures without a place: their frames go where they say, or nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from support.dicom_series import write_object, write_picture
from support.multi_frame import items

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg_reading import read_segmentation
from recallseg.runtime.formats.volume import Volume

SEG, ULTRASOUND = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.3.1"
FRAMES = np.random.default_rng(0).integers(0, 900, (3, 16, 8)).astype(np.uint16)
DRAWN = np.random.default_rng(1).random((2, 16, 8)) > 0.5


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Volume, str]:
    path = tmp_path / "us.dcm"
    fields = {"SOPClassUID": ULTRASOUND, "NumberOfFrames": 3, "PixelData": FRAMES.tobytes()}
    write_picture(path, generate_uid(), FRAMES[0], **fields)
    volume = read_dicom(path)
    assert volume.frame == "image"
    return volume, str(pydicom.dcmread(path).SOPInstanceUID)


def segmentation(path: Path, named: list[tuple[str, int | None]], **fields: Any) -> Path:
    """Frames of one segment, each drawn on one frame of a picture; None does not say which."""
    groups = []
    for uid, frame in named:
        group, source = Dataset(), Dataset()
        group.SegmentIdentificationSequence = items(ReferencedSegmentNumber=4)
        source.ReferencedSOPInstanceUID = uid
        if frame is not None:
            source.ReferencedFrameNumber = frame
        group.DerivationImageSequence = items(SourceImageSequence=[source])
        groups.append(group)
    drawn = fields.pop("drawn", DRAWN[: len(named)])
    return write_object(
        path, SEG, SegmentationType="BINARY", NumberOfFrames=len(named), Rows=drawn.shape[1],
        Columns=drawn.shape[2], SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=1, BitsStored=1, HighBit=0, PixelRepresentation=0,
        SegmentSequence=items(SegmentNumber=4, SegmentLabel="liver"),
        PerFrameFunctionalGroupsSequence=fields.pop("groups", groups),
        PixelData=np.packbits(drawn.ravel(), bitorder="little").tobytes(), **fields,
    )  # fmt: skip


def test_frames_go_to_the_pictures_that_they_name(
    picture: tuple[Volume, str], tmp_path: Path
) -> None:
    volume, uid = picture
    found = read_segmentation(segmentation(tmp_path / "seg.dcm", [(uid, 3), (uid, 1)]), volume)
    expected = np.zeros(FRAMES.shape, bool)
    expected[2], expected[0] = DRAWN
    np.testing.assert_array_equal(found.masks[4], expected)
    assert found.labels == {4: "liver"}


def test_frames_that_could_be_of_another_picture_are_refused(
    picture: tuple[Volume, str], tmp_path: Path
) -> None:
    volume, uid = picture
    elsewhere = Volume(FRAMES, np.eye(4), "LPS")
    path = tmp_path / "seg.dcm"
    narrow = np.zeros((1, 16, 16), bool)
    for onto, named, fields, said in [
        (volume, [(uid, 4)], {}, "a frame names none of its pictures"),
        (volume, [(uid, None)], {}, "a frame names none of its pictures"),
        (volume, [("1.2.3", 1)], {}, "was drawn on other images than this series"),
        (volume, [(uid, 1)], {"drawn": narrow}, "a frame is 16 x 16 pixels, the picture 16 x 8"),
        (volume, [(uid, 1)], {"groups": [Dataset()]}, "does not say whose segment it is"),
        (volume, [(uid, 1)], {"SegmentSequence": items(SegmentNumber=5)}, "4, which is not descr"),
        (volume, [(uid, 1)], {"SegmentSequence": []}, "has no segments"),
        (volume, [(uid, 1)], {"TotalPixelMatrixRows": 9}, "a segmentation of a slide"),
        (elsewhere, [(uid, 1)], {}, "have no place, so they cannot be laid on a volume"),
    ]:  # fmt: skip
        written = segmentation(path, named)
        if fields:
            segments = fields.pop("SegmentSequence", None)
            written = segmentation(path, named, **fields)
            if segments is not None:
                dataset = pydicom.dcmread(written)
                dataset.SegmentSequence = segments
                dataset.save_as(written)
        with pytest.raises(InputError, match=said) as raised:
            read_segmentation(written, onto)
        assert str(path) in str(raised.value)
