"""Shape never decides what an axis means: frames, kinds, intent and datatype do, or it is asked."""

from __future__ import annotations

from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from support.dicom_series import ORIENTATIONS, make_slice, write_series

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.nifti import read_nifti, write_nifti
from recallseg.runtime.formats.reading import count_volumes, read_volume
from recallseg.runtime.formats.volume import Slicing

RNG = np.random.default_rng(4)
AFFINE = np.array([[-1.0, 0, 0, 5], [0, -1.2, 0, 6], [0, 0, 3.0, 7], [0, 0, 0, 1]])


def nifti(path: Path, array: np.ndarray, **header: int) -> Path:
    image = nibabel.Nifti1Image(array, AFFINE)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_a_fourth_axis_of_nifti_counts_volumes(tmp_path: Path, count: int) -> None:
    array = RNG.integers(0, 99, (5, 6, 4, count)).astype(np.int16)
    path = nifti(tmp_path / "a.nii.gz", array)
    with pytest.raises(InputError, match=f"series of {count} volumes.*--time"):
        read_volume(path)
    assert count_volumes(path) == count
    for time in range(1, count + 1):
        volume = read_volume(path, time=time)
        assert np.array_equal(volume.array, array[..., time - 1])
        assert volume.notes == (f"volume {time} of {count}",)
    with pytest.raises(InputError, match=f"no number {count + 1}"):
        read_volume(path, time=count + 1)


def test_colours_of_nifti_are_told_by_datatype_or_intent(tmp_path: Path) -> None:
    array = RNG.integers(0, 255, (5, 6, 4, 1, 3)).astype(np.uint8)
    path = nifti(tmp_path / "rgb.nii", array, intent_code=2003)
    assert np.array_equal(read_volume(path).array, array[:, :, :, 0])
    path = nifti(tmp_path / "vector.nii", array.astype(np.float32), intent_code=1007)
    with pytest.raises(InputError, match="vectors"):
        read_volume(path)
    times = RNG.integers(0, 255, (5, 6, 4, 2, 3)).astype(np.uint8)
    path = nifti(tmp_path / "times.nii", times, intent_code=2003)
    assert count_volumes(path) == 2
    assert np.array_equal(read_volume(path, time=2).array, times[:, :, :, 1])


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        ("RGB-color", "colours"), ("3-color", "colours"), ("list", "volumes"), ("time", "volumes"),
        ("vector", "vectors"), ("3-vector", "vectors"), ("???", "volumes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_an_axis_of_three_in_nrrd_is_what_its_kind_says(
    tmp_path: Path, kind: str, meaning: str, first: bool
) -> None:
    array = RNG.integers(0, 99, (3, 5, 6, 4)).astype(np.int16)
    stored = array if first else np.moveaxis(array, 0, -1)
    nothing, directions = [np.nan] * 3, np.diag([1.0, 1.2, 3.0])
    header = {
        "space": "left-posterior-superior", "space origin": [0.0, 0.0, 0.0],
        "space directions": np.vstack(
            [nothing, directions] if first else [directions, nothing]
        ),
        "kinds": [kind, *["domain"] * 3] if first else [*["domain"] * 3, kind],
    }  # fmt: skip
    nrrd.write(str(tmp_path / "a.nrrd"), stored, header)
    if meaning == "colours":
        assert np.array_equal(read_volume(tmp_path / "a.nrrd").array, np.moveaxis(array, 0, -1))
        return
    with pytest.raises(InputError, match=meaning):
        read_volume(tmp_path / "a.nrrd")
    assert count_volumes(tmp_path / "a.nrrd") == (3 if meaning == "volumes" else 1)
    if meaning == "volumes":
        assert np.array_equal(read_volume(tmp_path / "a.nrrd", time=2).array, array[1])


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_frames_of_a_clip_are_no_colours(tmp_path: Path, frames: int) -> None:
    array = RNG.integers(0, 255, (frames, 12, 10)).astype(np.uint16)
    dataset = make_slice(array[0], Modality="US", NumberOfFrames=frames)
    dataset.PixelData = array.tobytes()
    dataset.save_as(tmp_path / "c.dcm", enforce_file_format=True)
    assert np.array_equal(read_volume(tmp_path / "c.dcm").array, array)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_cut_across_its_thin_axis(tmp_path: Path, axis: int) -> None:
    shape = [7, 8, 9]
    shape[axis] = 1
    volume = read_volume(nifti(tmp_path / "a.nii", np.zeros(shape, np.int16)))
    slicing = Slicing.of(volume)
    assert slicing.axis == axis
    assert slicing.plane == ("sagittal", "coronal", "axial")[axis]
    with pytest.raises(InputError, match="single"):
        Slicing.of(volume, "coronal" if axis != 1 else "axial")


@pytest.mark.parametrize("plane", list(ORIENTATIONS))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_planes_of_dicom_are_its_slices(tmp_path: Path, plane: str, count: int) -> None:
    """Of even spacing and few: still images of that plane, and no lines of another one."""
    array = RNG.integers(0, 999, (count, 12, 10)).astype(np.uint16)
    write_series(tmp_path / "s", array, orientation=ORIENTATIONS[plane], spacing=(0.8, 0.8, 0.8))
    volume = read_volume(tmp_path / "s")
    slicing = Slicing.of(volume)
    assert (slicing.plane, slicing.count(volume)) == (plane, count)


def test_a_volume_acquired_in_three_dimensions_is_cut_axially(tmp_path: Path) -> None:
    array = RNG.integers(0, 999, (9, 12, 10)).astype(np.uint16)
    write_series(
        tmp_path / "s", array, orientation=ORIENTATIONS["sagittal"], spacing=(0.8, 0.8, 0.8),
        MRAcquisitionType="3D",
    )  # fmt: skip
    assert Slicing.of(read_volume(tmp_path / "s")).plane == "axial"


@pytest.mark.parametrize("kind", ["sform", "qform", "both", "microns", "two"])
def test_a_mask_keeps_the_place_of_its_source_as_it_is_written(tmp_path: Path, kind: str) -> None:
    affine = AFFINE.copy()
    affine[:3, :3] = affine[:3, :3] @ [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]
    image = (nibabel.Nifti2Image if kind == "two" else nibabel.Nifti1Image)(
        np.zeros((5, 6, 4), np.int16), affine
    )
    rigid = affine.copy()
    rigid[:3, :3] = np.diag([-1.0, -1.2, 3.0])
    image.set_sform(affine, code=0 if kind == "qform" else 4)
    image.set_qform(rigid, code=0 if kind == "sform" else 1)
    if kind == "microns":
        image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "m.nii.gz", np.ones(volume.shape, np.uint8), volume)
    source = nibabel.load(tmp_path / "a.nii.gz").header
    mask = nibabel.load(tmp_path / "m.nii.gz").header
    for form in ("get_sform", "get_qform"):
        one, other = getattr(source, form)(coded=True), getattr(mask, form)(coded=True)
        assert one[1] == other[1]
        assert one[0] is None or np.allclose(one[0], other[0])
    again = read_nifti(tmp_path / "m.nii.gz")
    assert np.allclose(again.affine, volume.affine)


def test_pictures_have_no_time_points_or_stacks(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((5, 6), np.uint8))
    assert read_volume(tmp_path / "a.npy", time=1).shape == (1, 5, 6)
    with pytest.raises(InputError, match="one image"):
        read_volume(tmp_path / "a.npy", time=2)
    with pytest.raises(InputError, match="no stacks"):
        read_volume(tmp_path / "a.npy", stack="1")
