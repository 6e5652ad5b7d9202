"""Enhanced multi-frame objects, series of several volumes: each frame in its place and value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless
from support.dicom_series import ORIENTATIONS, write_series
from support.multi_frame import items, write_multi_frame

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.reading import count_volumes, read_volume
from recallseg.runtime.formats.volume import Slicing

STACK = np.random.default_rng(5).integers(0, 900, (5, 12, 10)).astype(np.int16)
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, -0.8)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("orientation", [*ORIENTATIONS.values(), OBLIQUE])
def test_frames_in_any_order_and_groups_shared_or_not(
    tmp_path: Path, order: list[int], shared: bool, orientation: tuple[float, ...]
) -> None:
    path = write_multi_frame(
        tmp_path / "m.dcm", STACK, order, shared=shared, orientation=orientation
    )
    volume = read_dicom(path)
    assert np.array_equal(volume.array, STACK)
    normal = np.cross(orientation[:3], orientation[3:])
    assert volume.affine[:3, 3] == pytest.approx([-50, -60, 20])
    assert volume.affine[:3, 0] == pytest.approx(normal * 3.0, abs=1e-4)
    assert volume.affine[:3, 1] == pytest.approx(np.array(orientation[3:]) * 0.8)
    assert volume.affine[:3, 2] == pytest.approx(np.array(orientation[:3]) * 0.9)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_frames_keep_their_order(tmp_path: Path, syntax: str) -> None:
    path = write_multi_frame(tmp_path / "m.dcm", STACK, [3, 1, 4, 0, 2])
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path)
    assert np.array_equal(read_dicom(path).array, STACK)


def test_one_frame_only(tmp_path: Path) -> None:
    path = write_multi_frame(tmp_path / "m.dcm", STACK[:1], orientation=ORIENTATIONS["coronal"])
    volume = read_dicom(path)
    assert volume.spacing == pytest.approx((3.0, 0.8, 0.9))
    slicing = Slicing.of(volume)
    assert (slicing.plane, slicing.count(volume)) == ("coronal", 1)
    assert np.array_equal(slicing.view(volume.array, 0), STACK[0])


@pytest.mark.parametrize("shared", [True, False])
def test_rescale_and_window_of_each_frame(tmp_path: Path, shared: bool) -> None:
    def each(index: int, group: Dataset) -> None:
        slope = 2.0 if shared else index + 1.0
        group.PixelValueTransformationSequence = items(
            RescaleSlope=slope, RescaleIntercept=-100, RescaleType="HU"
        )
        group.FrameVOILUTSequence = items(WindowCenter=300, WindowWidth=400)

    volume = read_dicom(write_multi_frame(tmp_path / "m.dcm", STACK, [4, 2, 0, 1, 3], each=each))
    slopes = np.full(5, 2) if shared else np.arange(1, 6)
    assert np.array_equal(volume.array, STACK.astype(int) * slopes[:, None, None] - 100)
    assert volume.window == (300.0, 400.0)
    shown = read_dicom(tmp_path / "m.dcm", voi=True).array
    assert (shown[volume.array < 100] == shown.min()).all()
    assert (shown[volume.array > 500] == shown.max()).all()


def test_the_same_values_as_a_series_of_the_same_scan(tmp_path: Path) -> None:
    fields = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 0, "WindowWidth": 300}
    write_series(tmp_path / "s", STACK, **fields)

    def each(index: int, group: Dataset) -> None:
        group.PixelValueTransformationSequence = items(RescaleSlope=2, RescaleIntercept=-1000)
        group.FrameVOILUTSequence = items(WindowCenter=0, WindowWidth=300)

    path = write_multi_frame(tmp_path / "m.dcm", STACK, [1, 0, 3, 2, 4], each=each)
    for voi in (False, True):
        one, other = read_dicom(tmp_path / "s", voi=voi), read_dicom(path, voi=voi)
        assert np.array_equal(one.array, other.array)
        assert np.allclose(one.affine, other.affine)


def time_points(path: Path, **fields: object) -> np.ndarray:
    """Two time points of four planes, mixed; return [time, plane]."""
    array = STACK[:4]
    both = np.concatenate([array, array + 1000])

    def each(index: int, group: Dataset) -> None:
        where = index % 4
        group.PlanePositionSequence = items(ImagePositionPatient=[0.0, 0.0, where * 3.0])
        group.FrameContentSequence = items(StackID="1", TemporalPositionIndex=index // 4 + 1)

    write_multi_frame(path, both, [7, 0, 4, 3, 1, 5, 2, 6], each=each, **fields)
    return both.reshape(2, *array.shape)


def test_time_points_are_named_and_chosen(tmp_path: Path) -> None:
    both = time_points(tmp_path / "m.dcm")
    with pytest.raises(InputError, match=r"2 volumes \(1: time point 1; 2: time point 2\)"):
        read_dicom(tmp_path / "m.dcm")
    assert count_volumes(tmp_path / "m.dcm") == 2
    for time in (1, 2):
        volume = read_volume(tmp_path / "m.dcm", time=time)
        assert np.array_equal(volume.array, both[time - 1])
        assert f"volume {time} of 2" in volume.notes[0]
    with pytest.raises(InputError, match="there is no 3"):
        read_volume(tmp_path / "m.dcm", time=3)


def two_stacks(path: Path) -> None:
    def each(index: int, group: Dataset) -> None:
        if index >= 3:
            group.PlaneOrientationSequence = items(
                ImageOrientationPatient=list(ORIENTATIONS["sagittal"])
            )
            group.PlanePositionSequence = items(ImagePositionPatient=[(index - 3) * 4.0, 0.0, 0.0])
        group.FrameContentSequence = items(StackID="A" if index < 3 else "B")

    write_multi_frame(path, STACK, [4, 0, 3, 2, 1], shared=False, each=each)


def test_stacks_are_named_and_chosen(tmp_path: Path) -> None:
    two_stacks(tmp_path / "m.dcm")
    with pytest.raises(InputError, match=r"2 stacks \(1: StackID A, axial.*2: StackID B, sagittal"):
        read_dicom(tmp_path / "m.dcm")
    other = STACK[3:][::-1]  # its normal points to the right
    for stack, planes in {"1": STACK[:3], "A": STACK[:3], "2": other, "B": other}.items():
        assert np.array_equal(read_volume(tmp_path / "m.dcm", stack=stack).array, planes)
    with pytest.raises(InputError, match="no stack 'C'"):
        read_volume(tmp_path / "m.dcm", stack="C")


@pytest.mark.parametrize(
    "mark", ["TriggerTime", "EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier"]
)
def test_volumes_in_a_series_are_told_apart(tmp_path: Path, mark: str) -> None:
    for n, value in enumerate((10, 2)):
        write_series(tmp_path / "s" / str(n), STACK + n * 1000, **{mark: value})
    one = pydicom.dcmread(next((tmp_path / "s" / "0").iterdir()))
    for path in (tmp_path / "s" / "1").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = one.SeriesInstanceUID
        dataset.FrameOfReferenceUID = one.FrameOfReferenceUID
        dataset.save_as(path)
    with pytest.raises(InputError, match=r"2 volumes .*1: .* 2(\.0)?; 2: .* 10"):
        read_volume(tmp_path / "s")
    assert np.array_equal(read_volume(tmp_path / "s", time=1).array, STACK + 1000)
    assert np.array_equal(read_volume(tmp_path / "s", time=2).array, STACK)


def test_several_multi_frame_files_are_one_volume(tmp_path: Path) -> None:
    write_multi_frame(tmp_path / "a.dcm", STACK, [1, 0])
    write_multi_frame(tmp_path / "b.dcm", STACK, [4, 2, 3])
    one = pydicom.dcmread(tmp_path / "a.dcm")
    two = pydicom.dcmread(tmp_path / "b.dcm")
    two.SeriesInstanceUID = one.SeriesInstanceUID
    two.FrameOfReferenceUID = one.FrameOfReferenceUID
    two.save_as(tmp_path / "b.dcm")
    assert np.array_equal(read_dicom([tmp_path / "a.dcm", tmp_path / "b.dcm"]).array, STACK)


def test_an_ultrasound_volume_is_ordered_and_has_no_patient(tmp_path: Path) -> None:
    def each(index: int, group: Dataset) -> None:
        del group.PlanePositionSequence
        group.PlanePositionVolumeSequence = items(ImagePositionVolume=[0.0, 0.0, index * 0.5])
        group.PlaneOrientationVolumeSequence = items(
            ImageOrientationVolume=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        )

    path = write_multi_frame(tmp_path / "u.dcm", STACK, [3, 4, 0, 2, 1], modality="US", each=each)
    dataset = pydicom.dcmread(path)
    del dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    dataset.save_as(path)
    volume = read_dicom(path)
    assert np.array_equal(volume.array, STACK)
    assert (volume.frame, volume.spacing) == ("image", pytest.approx((0.5, 0.8, 0.9)))


def test_a_run_of_an_angiogram_is_a_clip(tmp_path: Path) -> None:
    def each(index: int, group: Dataset) -> None:
        del group.PlanePositionSequence
        group.FrameAnatomySequence = items(FrameLaterality="L")

    path = write_multi_frame(tmp_path / "x.dcm", STACK, modality="XA", each=each)
    dataset = pydicom.dcmread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    del shared.PlaneOrientationSequence
    del shared.PixelMeasuresSequence
    shared.FramePixelDataPropertiesSequence = items(ImagerPixelSpacing=[0.2, 0.3])
    dataset.save_as(path)
    volume = read_dicom(path)
    assert np.array_equal(volume.array, STACK)
    assert (volume.frame, volume.spacing) == ("image", pytest.approx((1.0, 0.2, 0.3)))
    assert volume.tags["laterality"] == "L"


def test_a_frame_without_a_place_among_others_is_refused(tmp_path: Path) -> None:
    def each(index: int, group: Dataset) -> None:
        if index == 2:
            del group.PlanePositionSequence

    write_multi_frame(tmp_path / "m.dcm", STACK, each=each)
    with pytest.raises(InputError, match="no ImagePositionPatient"):
        read_dicom(tmp_path / "m.dcm")


@pytest.mark.parametrize(("gone", "count"), [(2, 5), (1, 5), (1, 4)])
def test_a_missing_frame_is_noticed(tmp_path: Path, gone: int, count: int) -> None:
    order = [index for index in range(count) if index != gone]
    write_multi_frame(tmp_path / "m.dcm", STACK[:count], order)
    with pytest.raises(InputError, match="A slice is missing"):
        read_dicom(tmp_path / "m.dcm")


@pytest.mark.parametrize("decimals", [0, 1, 2, 3])
@pytest.mark.parametrize("gap", [2.5, 3.3333, 0.625, 1.25])
def test_rounding_is_no_missing_slice_and_a_missing_slice_no_rounding(
    tmp_path: Path, decimals: int, gap: float
) -> None:
    if gap < 2 and decimals == 0:
        pytest.skip("whole millimetres cannot tell such slices apart")
    array = np.repeat(STACK, 4, axis=0)
    for missing in (False, True):
        paths = write_series(tmp_path / f"{missing}", array, spacing=(gap, 0.8, 0.9))
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.ImagePositionPatient = [
                f"{v:.{decimals}f}" for v in dataset.ImagePositionPatient
            ]
            dataset.save_as(path)
        if missing:
            paths[9].unlink()
            with pytest.raises(InputError, match="missing"):
                read_dicom(tmp_path / f"{missing}")
        else:
            volume = read_dicom(tmp_path / f"{missing}")
            assert np.array_equal(volume.array, array)
            assert volume.spacing[0] == pytest.approx(gap, rel=0.01)
