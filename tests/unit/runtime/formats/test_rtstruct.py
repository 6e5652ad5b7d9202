"""RT structure sets as rt-utils writes them, and what cannot be laid on the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from support.dicom_series import ORIENTATIONS, write_object, write_picture, write_series

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.dicom import read_dicom

SHAPE = (5, 40, 32)
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"


def drawn() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[1:4, 6:20, 4:14] = True
    mask[2, 25:33, 20:30] = True
    return mask


@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
@pytest.mark.filterwarnings("ignore")
def test_what_rt_utils_writes(tmp_path: Path, orientation: str) -> None:
    """Against the package's own masks; its outlines run through the outer pixels' centres."""
    rt_utils = pytest.importorskip("rt_utils", reason="needs rt-utils")
    # Of square pixels: rt-utils 1.2 takes the spacing of rows for that of columns.
    write_series(
        tmp_path / "s", np.zeros(SHAPE, np.uint16), orientation=ORIENTATIONS[orientation],
        spacing=(3.0, 0.8, 0.8),
    )  # fmt: skip
    writer = rt_utils.RTStructBuilder.create_new(dicom_series_path=str(tmp_path / "s"))
    slices = [d.ImagePositionPatient for d in writer.series_data]
    volume = read_dicom(tmp_path / "s")
    order = [
        round(float((np.linalg.inv(volume.lattice.affine) @ [*map(float, p), 1.0])[0]))
        for p in slices
    ]
    writer.add_roi(mask=np.moveaxis(drawn()[order], 0, 2), name="GTV/primary")
    writer.save(str(tmp_path / "s" / "rt.dcm"))
    (found,) = find_annotations(tmp_path / "s").volumes
    assert found.segmentation.name == "rt.dcm"
    read, masks = read_annotated_volume(found.item, found.segmentation, None)
    np.testing.assert_array_equal(masks["GTV-primary"], drawn())
    assert any("GTV/primary" in text for text in read.notes)


def structure_set(path: Path, series: Path, outlines: list[np.ndarray], **fields: Any) -> Path:
    """Write outlines Nx3 of voxel indices, as a planning system would, in mm."""
    volume = read_dicom(series)
    roi, contours = Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 7, "lung"
    roi.ReferencedFrameOfReferenceUID = fields.pop("reference", volume.origin.reference)
    contours.ReferencedROINumber = 7
    contours.ContourSequence = []
    for outline in outlines:
        item = Dataset()
        points = np.column_stack([outline, np.ones(len(outline))]) @ volume.lattice.affine.T
        item.ContourGeometricType = fields.get("kind", "CLOSED_PLANAR")
        item.ContourData = [f"{v:.6f}" for v in points[:, :3].ravel()]
        contours.ContourSequence.append(item)
    return write_object(
        path, RTSTRUCT, StructureSetROISequence=[roi], ROIContourSequence=[contours]
    )


def square(plane: float, low: float, high: float) -> np.ndarray:
    return np.array(
        [(plane, low, low), (plane, low, high), (plane, high, high), (plane, high, low)]
    )


def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "s", np.zeros(SHAPE, np.uint16))
    return tmp_path / "s"


def test_holes_and_islands(tmp_path: Path) -> None:
    outlines = [square(2, 4.5, 8.5), square(2, 2, 12), square(2, 20, 24), square(3, 5, 6)]
    path = structure_set(tmp_path / "rt.dcm", series(tmp_path), outlines)
    _, masks = read_annotated_volume(tmp_path / "s", path, None)
    wanted = np.zeros(SHAPE, bool)
    wanted[2, 2:13, 2:13] = True
    wanted[2, 5:9, 5:9] = False
    wanted[2, 20:25, 20:25] = True
    wanted[3, 5:7, 5:7] = True
    np.testing.assert_array_equal(masks["lung"], wanted)


@pytest.mark.parametrize(
    ("outlines", "fields", "message"),
    [
        ([square(1.5, 2, 5)], {}, "between two planes"),
        ([square(9, 2, 5)], {}, "outside the images"),
        ([square(1, 2, 5) + np.arange(4)[:, None] * [1, 0, 0]], {}, "across the planes"),
        ([square(1, 2, 5)], {"reference": "1.2.3"}, "another frame of reference"),
        ([square(1, 2, 5)], {"kind": "OPEN_PLANAR"}, "OPEN_PLANAR"),
        ([square(1, 2, 5)[:2]], {}, "6 numbers"),
    ],
)
def test_what_cannot_be_laid_on_the_images(
    tmp_path: Path, outlines: list[np.ndarray], fields: dict[str, Any], message: str
) -> None:
    path = structure_set(tmp_path / "rt.dcm", series(tmp_path), outlines, **fields)
    with pytest.raises(InputError, match=message):
        read_annotated_volume(tmp_path / "s", path, None)


def test_a_radiograph_with_its_mask_drawn_as_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    write_picture(tmp_path / "a.dcm", "1.2", np.arange(48, dtype=np.uint16).reshape(6, 8))
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:7] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    (found,) = find_annotations(tmp_path).volumes
    _, masks = read_annotated_volume(found.item, found.segmentation, {1: "bone"})
    np.testing.assert_array_equal(masks["bone"], mask[None] > 0)
    with pytest.raises(InputError, match="--labels"):
        read_annotated_volume(found.item, found.segmentation, None)
    Image.fromarray(mask.T).save(tmp_path / "a.mask.png")
    with pytest.raises(InputError, match="its own size"):
        read_annotated_volume(found.item, found.segmentation, {1: "bone"})
    assert pydicom.dcmread(tmp_path / "a.dcm").Rows == 6
