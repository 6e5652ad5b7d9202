"""DICOM in: geometry right or refused, values through their look-up tables, nothing of patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dicom_series import ORIENTATIONS, make_slice, write_series
from support.ungiven import ungiven

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.reading import read_volume, volume_format
from recallseg.runtime.formats.volume import Slicing

RNG = np.random.default_rng(3)
STACK = RNG.integers(0, 4000, (5, 12, 10)).astype(np.uint16)


@pytest.mark.parametrize("plane", list(ORIENTATIONS))
def test_a_series_is_ordered_by_position(tmp_path: Path, plane: str) -> None:
    write_series(tmp_path / "s", STACK, orientation=ORIENTATIONS[plane])
    assert volume_format(tmp_path / "s") == "dicom"
    volume = read_volume(tmp_path / "s")
    assert np.array_equal(volume.array, STACK)
    assert volume.spacing == pytest.approx((3.0, 0.8, 0.9))
    slicing = Slicing.of(volume)
    assert (slicing.axis, slicing.plane) == (0, plane)
    assert np.array_equal(slicing.view(volume.array, 2), STACK[2])  # drawn as it is displayed


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
@settings(max_examples=30)
def test_oblique_series_keep_every_voxel_in_its_place(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float]
) -> None:
    row, column = np.array(numbers[:3]), np.array(numbers[3:])
    if np.linalg.norm(row) < 0.1 or np.linalg.norm(np.cross(row, column)) < 0.1:
        row, column = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    row = row / np.linalg.norm(row)
    column = column - row * (row @ column)
    column = column / np.linalg.norm(column)
    orientation = tuple(round(float(v), 8) for v in (*row, *column))
    folder = tmp_path_factory.mktemp("oblique") / "s"
    write_series(folder, STACK, orientation=orientation)
    volume = read_dicom(folder)
    assert np.array_equal(volume.array, STACK)
    for plane, index in zip(volume.origin.planes, range(5), strict=True):
        place = volume.affine @ [index, 0, 0, 1]
        assert place[:3] == pytest.approx(plane.at.position, abs=1e-3)
    corner = volume.affine @ [2, 11, 9, 1]
    expected = np.array(volume.origin.planes[2].at.position) + column * 11 * 0.8 + row * 9 * 0.9
    assert corner[:3] == pytest.approx(expected, abs=1e-3)


def spoil(folder: Path, index: int, **fields: Any) -> None:
    path = sorted(folder.iterdir())[index]
    dataset = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "no ImageOrientationPatient"),
        ({"PixelSpacing": None}, "no PixelSpacing"),
        ({"PixelSpacing": [0.8, 1.5]}, r"2 stacks .*0\.8 x 0\.9 mm.*0\.8 x 1\.5 mm"),
        (
            {"ImageOrientationPatient": [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]},
            "2 stacks .*axial.*sagittal",
        ),
        ({"SeriesInstanceUID": "1.2.3"}, "2 series"),
        (
            {"FrameOfReferenceUID": "1.2.3"},
            r"2 stacks .*1 images, frame of reference 1\.2\.3; .*4 images, frame of reference 1\.2",
        ),
        ({"Rows": 6}, "2 stacks .*12 x 10 pixels.*6 x 10 pixels"),
        ({"PixelData": None}, "no pixels"),
    ],
)
def test_a_slice_that_does_not_belong_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_series(tmp_path / "s", STACK)
    spoil(tmp_path / "s", 1, **fields)
    with pytest.raises(InputError, match=message):
        read_dicom(tmp_path / "s")


def test_gaps_copies_time_points_and_tilt_are_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "gap", STACK)
    paths[2].unlink()
    with pytest.raises(InputError, match=r"gaps between slices range from 3\.000 to 6\.000"):
        read_dicom(tmp_path / "gap")

    paths = write_series(tmp_path / "copy", STACK)
    (tmp_path / "copy" / "again.dcm").write_bytes(paths[0].read_bytes())
    with pytest.raises(InputError, match="same image twice"):
        read_dicom(tmp_path / "copy")

    paths = write_series(tmp_path / "time", STACK)
    dataset = pydicom.dcmread(paths[0])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.save_as(tmp_path / "time" / "second.dcm")
    with pytest.raises(InputError, match="one position"):
        read_dicom(tmp_path / "time")

    for index, path in enumerate(write_series(tmp_path / "tilt", STACK)):
        dataset = pydicom.dcmread(path)
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + index * 0.4, z]
        dataset.save_as(path)
    with pytest.raises(InputError, match="gantry tilt"):
        read_dicom(tmp_path / "tilt")

    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no DICOM series"):
        read_volume(tmp_path / "none")
    with pytest.raises(InputError, match="no slices"):
        read_dicom(tmp_path / "none")


def test_values_go_through_modality_and_display_tables(tmp_path: Path) -> None:
    ct = (STACK.astype(np.int16) - 1000)[:1]
    fields = {"RescaleSlope": 2, "RescaleIntercept": -24, "WindowCenter": 40, "WindowWidth": 400}
    write_series(tmp_path / "ct", ct, **fields)
    volume = read_dicom(tmp_path / "ct")
    assert np.array_equal(volume.array[0], ct[0] * 2 - 24)
    assert volume.window == (40.0, 400.0)
    assert volume.modality == "CT"
    shown = read_dicom(tmp_path / "ct", voi=True).array
    assert (shown[volume.array < -200] == shown.min()).all()
    assert (shown[volume.array > 300] == shown.max()).all()


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    plain, inverted = tmp_path / "a.dcm", tmp_path / "b.dcm"
    make_slice(STACK[0]).save_as(plain, enforce_file_format=True)
    make_slice(STACK[0], PhotometricInterpretation="MONOCHROME1").save_as(
        inverted, enforce_file_format=True
    )
    first, second = read_dicom(plain).array.astype(int), read_dicom(inverted).array.astype(int)
    assert np.array_equal(65535 - first, second)  # of the stored bits, not of this image


def test_monochrome1_of_a_slope_for_each_slice_is_inverted_alike(tmp_path: Path) -> None:
    stack = np.full((3, 4, 4), 100, np.uint16)
    paths = write_series(tmp_path / "s", stack, PhotometricInterpretation="MONOCHROME1")
    for slope, path in enumerate(paths, 1):
        dataset = pydicom.dcmread(path)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
        dataset.WindowCenter, dataset.WindowWidth = 200, 1e6
        dataset.save_as(path)
    values = read_dicom(tmp_path / "s").array[:, 0, 0].astype(int)
    assert (values[0] - values).tolist() == [0, 100, 200]  # as 100, 200, 300 are apart
    shown = read_dicom(tmp_path / "s", voi=True).array[:, 0, 0].astype(float)
    assert (np.diff(shown) < 0).all()


def test_a_volume_that_is_shorter_than_another_at_its_place_is_told(tmp_path: Path) -> None:
    for echo in (1, 2):
        for path in write_series(tmp_path / f"{echo}", STACK):
            dataset = pydicom.dcmread(path)
            dataset.EchoTime, dataset.EchoNumbers = 10 * echo, echo
            dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4"
            if echo == 1 or dataset.ImagePositionPatient[2] < 30:
                (tmp_path / "s").mkdir(exist_ok=True)
                dataset.save_as(tmp_path / "s" / f"{echo}-{path.name}")
    whole, short = (read_dicom(tmp_path / "s", time=time) for time in (1, 2))
    assert (len(whole.array), len(short.array)) == (5, 4)
    assert whole.notes == ("volume 1 of 2: echo 1",)
    assert short.notes[1] == "volume 2 has 4 images, others at its place up to 5"


def test_a_picture_without_a_place_is_one_slice(tmp_path: Path) -> None:
    make_slice(STACK[0], Modality="DX", ImagerPixelSpacing=[0.15, 0.2]).save_as(
        tmp_path / "x.dcm", enforce_file_format=True
    )
    volume = read_dicom(tmp_path / "x.dcm")
    assert volume.frame == "image"
    assert volume.spacing == pytest.approx((1.0, 0.15, 0.2))


def test_no_tag_says_who_the_patient_is(tmp_path: Path) -> None:
    write_series(tmp_path / "s", STACK)
    volume = read_dicom(tmp_path / "s")
    assert dict(volume.tags) == {"modality": "MR", "body_part": "HEAD"}
    assert "Doe" not in repr(volume)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("MR_small_RLE.dcm", (1, 64, 64)),
        ("MR_small_jp2klossless.dcm", (1, 64, 64)),
        ("MR_small_jpeg_ls_lossless.dcm", (1, 64, 64)),
        ("MR_small_bigendian.dcm", (1, 64, 64)),
        ("SC_rgb_jpeg_gdcm.dcm", (1, 100, 100)),
        ("examples_palette.dcm", (1, 350, 800)),
        ("examples_ybr_color.dcm", (30, 240, 320)),
    ],
)
def test_compressed_and_coloured_files_of_others(name: str, shape: tuple[int, int, int]) -> None:
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("this version of pydicom does not ship it")
    volume = read_dicom(Path(str(path)))
    assert volume.shape == shape
    if name.startswith("MR_small"):
        plain = read_dicom(Path(str(get_testdata_file("MR_small.dcm", download=False))))
        assert np.array_equal(volume.array, plain.array)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    for name, message in {
        "MR_truncated.dcm": "cut off",
        "liver_1frame.dcm": "segmentation",
        "rtplan.dcm": "no pixels of an image: it is a RT Plan",
    }.items():
        path = get_testdata_file(name, download=False)
        if path is not None:
            with pytest.raises(InputError, match=message):
                read_dicom(Path(str(path)))
    bomb = make_slice(STACK[0], Rows=65535, Columns=65535)
    bomb.save_as(tmp_path / "bomb.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match="GiB"):
        read_dicom(tmp_path / "bomb.dcm")


def test_a_series_that_is_not_given_whole_is_none(tmp_path: Path) -> None:
    """A part of it would be another volume, and the folder would be taken for none of DICOM."""
    write_series(tmp_path / "s" / "a", STACK[:3])
    rest = write_series(tmp_path / "s" / "b", STACK[3:])
    for lost in (tmp_path / "s" / "b", rest[0]):
        with ungiven(lost):
            for ask in (read_volume, volume_format, read_dicom):
                with pytest.raises(InputError, match=f"{lost}.*Input/output error"):
                    ask(tmp_path / "s")
    with ungiven(tmp_path / "s"), pytest.raises(InputError, match="cannot be looked"):
        read_volume(tmp_path / "s")
