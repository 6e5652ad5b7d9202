"""Two grids are one lattice, or they are not; a mask on the same one loses no voxel."""

from __future__ import annotations

from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume, structure_name
from recallseg.runtime.formats.lattice import Lattice, resample

SHAPE = (6, 7, 5)


def turned(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


def some_affine() -> np.ndarray:
    affine = turned(20) @ np.diag([0.7, 1.1, 3.0, 1.0])
    affine[:3, 3] = [-40.3, 12.7, 99.1]
    return affine


def some_mask(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).random(shape) > 0.6


@given(
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.tuples(*[st.integers(-2, 3)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
)
@settings(max_examples=150)
def test_a_mask_comes_back_from_any_turned_and_cut_grid(
    order: list[int], signs: tuple[int, ...], first: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """Cut a box out of the image's lattice, partly outside of it, turn it, and place it."""
    onto = Lattice(some_affine(), SHAPE)
    box = np.random.default_rng(2).random(size) > 0.5
    affine = onto.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ first
    turn = np.eye(4)
    for axis, sign in enumerate(signs):
        if sign < 0:
            turn[axis, axis], turn[axis, 3] = -1, size[axis] - 1
    array = box[tuple(slice(None, None, sign) for sign in signs)].transpose(order)
    affine = affine @ turn @ np.eye(4)[:, [*order, 3]]
    expected = np.zeros(SHAPE, bool)
    inside = 0
    for index in np.argwhere(box):
        at = index + first
        if (at >= 0).all() and (at < SHAPE).all():
            expected[tuple(at)] = True
            inside += 1
    placed = np.zeros(SHAPE, bool)
    i, j, k = array.shape
    outside = Lattice(affine, (i, j, k)).relate(onto).put(array, placed)
    assert np.array_equal(placed, expected)
    assert outside == box.sum() - inside
    assert np.array_equal(resample(array, Lattice(affine, (i, j, k)), onto), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.diag([1.1, 1.0, 1.0, 1.0]), "voxels are"),
        (np.diag([2.0, 1.0, 1.0, 1.0]), "voxels are"),
        (turned(2), "turned by"),
        (np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "0.35 mm beside"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.3], [0, 0, 0, 1.0]]), "0.90 mm beside"),
        (np.array([[1, 0, 0.3, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "turned by"),
    ],
)
def test_another_lattice_is_told_by_its_difference(change: np.ndarray, message: str) -> None:
    onto = Lattice(some_affine(), SHAPE)
    with pytest.raises(InputError, match=message):
        Lattice(onto.affine @ change, SHAPE).relate(onto)


def test_what_float32_and_rounded_headers_lose_is_no_difference() -> None:
    onto = Lattice(some_affine(), (512, 512, 300))
    rounded = onto.affine.astype(np.float32).astype(float)
    rounded[:3, 3] = np.round(rounded[:3, 3], 2)
    assert Lattice(rounded, (512, 512, 300)).relate(onto).start == (0, 0, 0)


@pytest.mark.parametrize("thickness", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_slice_has_no_step_of_its_own(thickness: float, sign: int) -> None:
    onto = Lattice(some_affine(), SHAPE)
    affine = onto.affine.copy()
    affine[:3, 3] += affine[:3, 2] * 3
    affine[:3, 2] *= sign * thickness / 3.0
    mask = some_mask((6, 7, 1))
    placed = np.zeros(SHAPE, bool)
    assert Lattice(affine, (6, 7, 1)).relate(onto).put(mask, placed) == 0
    assert np.array_equal(placed[:, :, 3], mask[:, :, 0])
    assert placed.sum() == mask.sum()


def nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_masks_of_nibabel_itk_and_nrrd_in_other_axes_are_placed(tmp_path: Path) -> None:
    array = np.random.default_rng(3).integers(0, 99, SHAPE).astype(np.int16)
    mask, affine = some_mask(), some_affine()
    image = nifti(tmp_path / "i.nii.gz", array, affine)
    label = nibabel.Nifti1Image(mask.astype(np.uint8), affine)
    nibabel.save(nibabel.as_closest_canonical(label), tmp_path / "canonical.nii.gz")
    codes = nibabel.orientations.axcodes2ornt(("P", "I", "R"))
    nibabel.save(
        label.as_reoriented(
            nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), codes)
        ),
        tmp_path / "pir.nii.gz",
    )
    nibabel.save(label, tmp_path / "label.nii")
    itk = SimpleITK.ReadImage(str(tmp_path / "label.nii"))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk, "SAL"), str(tmp_path / "sal.nrrd"))
    flip = SimpleITK.Flip(SimpleITK.PermuteAxes(itk, [1, 2, 0]), [True, False, True])
    SimpleITK.WriteImage(flip, str(tmp_path / "flip.nii.gz"))
    for name in ("canonical.nii.gz", "pir.nii.gz", "sal.nrrd", "flip.nii.gz"):
        _, masks = read_annotated_volume(image, tmp_path / name, {1: "a"})
        assert np.array_equal(masks["a"], mask), name


def test_a_cropped_and_a_padded_mask(tmp_path: Path) -> None:
    array, mask, affine = np.zeros(SHAPE, np.int16), some_mask(), some_affine()
    image = nifti(tmp_path / "i.nii", array, affine)
    cut = affine.copy()
    cut[:3, 3] += affine[:3, :3] @ [1, 2, 1]
    nifti(tmp_path / "cut.nii", mask[1:5, 2:7, 1:4].astype(np.uint8), cut)
    volume, masks = read_annotated_volume(image, tmp_path / "cut.nii", {1: "a"})
    expected = np.zeros_like(mask)
    expected[1:5, 2:7, 1:4] = mask[1:5, 2:7, 1:4]
    assert np.array_equal(masks["a"], expected)
    assert volume.notes == ()
    pad = affine.copy()
    pad[:3, 3] -= affine[:3, :3] @ [2, 2, 2]
    wide = np.zeros(tuple(size + 4 for size in SHAPE), np.uint8)
    wide[2:-2, 2:-2, 2:-2], wide[0, 0, 0] = mask, 1
    volume, masks = read_annotated_volume(image, nifti(tmp_path / "pad.nii", wide, pad), {1: "a"})
    assert np.array_equal(masks["a"], mask)
    assert "1 voxels lie outside" in volume.notes[0]
    far = affine.copy()
    far[:3, 3] += affine[:3, :3] @ [100, 0, 0]
    with pytest.raises(InputError, match="nothing that is drawn"):
        read_annotated_volume(
            image, nifti(tmp_path / "far.nii", mask.astype(np.uint8), far), {1: "a"}
        )


def test_another_lattice_is_resampled_when_asked_and_says_so(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    image = nifti(tmp_path / "i.nii", np.zeros((12, 12, 12), np.int16), affine)
    coarse = np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = 0.5
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1:3, 2:5, 3:4] = 1
    nifti(tmp_path / "c.nii", mask, coarse)
    with pytest.raises(InputError, match="--resample"):
        read_annotated_volume(image, tmp_path / "c.nii", {1: "a"})
    volume, masks = read_annotated_volume(image, tmp_path / "c.nii", {1: "a"}, resampled=True)
    assert np.array_equal(masks["a"], mask.repeat(2, 0).repeat(2, 1).repeat(2, 2) == 1)
    assert volume.tags["mask"] == "resampled"
    assert "was resampled" in volume.notes[0]


def test_a_segmentation_of_slicer_in_a_box_and_in_layers(tmp_path: Path) -> None:
    affine = some_affine()
    image = nifti(tmp_path / "i.nii", np.zeros(SHAPE, np.int16), np.diag([-1, -1, 1, 1]) @ affine)
    layers = np.zeros((2, 3, 4, 2), np.uint8)
    layers[0, 0, :2], layers[0, 1, 2:], layers[1, :2, 1:3] = 1, 2, 1
    origin = affine[:3, 3] + affine[:3, :3] @ [2, 1, 3]
    header = {
        "space": "left-posterior-superior", "kinds": ["list", "domain", "domain", "domain"],
        "space directions": np.vstack([[np.nan] * 3, affine[:3, :3].T]), "space origin": origin,
    }  # fmt: skip
    for n, (name, layer, value) in enumerate([("one", 0, 1), ("two", 0, 2), ("a/b", 1, 1)]):
        header |= {f"Segment{n}_Name": name, f"Segment{n}_Layer": str(layer),
                   f"Segment{n}_LabelValue": str(value)}  # fmt: skip
    nrrd.write(str(tmp_path / "i.seg.nrrd"), layers, header)
    _, masks = read_annotated_volume(image, tmp_path / "i.seg.nrrd", None)
    assert list(masks) == ["one", "two", "a-b"]
    for name, (layer, value) in {"one": (0, 1), "two": (0, 2), "a-b": (1, 1)}.items():
        expected = np.zeros(SHAPE, bool)
        expected[2:5, 1:5, 3:5] = layers[layer] == value
        assert np.array_equal(masks[name], expected)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("GTV/primary", "GTV-primary"),
        ("a\\b", "a-b"),
        ("..hidden", "hidden"),
        ("  two\nlines ", "two lines"),
        ("x" * 80, "x" * 64),
        ("Läsion", "Läsion"),
        ("///", "---"),
        ("\x00", ""),
    ],
)
def test_labels_that_are_no_names(label: str, name: str) -> None:
    from recallseg.runtime.checks import check_name

    assert structure_name(label) == name
    if name:
        assert check_name(name) == name
