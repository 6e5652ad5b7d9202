"""Volumes keep every voxel where it was: types, slicing, files, on any affine."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.nifti import read_nifti, write_nifti
from recallseg.runtime.formats.nrrd import read_nrrd, read_seg_nrrd, write_seg_nrrd
from recallseg.runtime.formats.reading import read_volume, volume_format, volume_stem
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.reports.annotated_sources import sources_of
from recallseg.runtime.volumes.writing import write_segmentation


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any orientation, flips, anisotropic spacing and offset."""
    turn = np.array([draw(st.floats(-1, 1)) for _ in range(4)])
    if np.linalg.norm(turn) < 0.1:
        turn = np.array([1.0, 0, 0, 0])
    w, x, y, z = turn / np.linalg.norm(turn)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    flips = np.diag([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    order = draw(st.permutations(range(3)))
    spacing = np.diag([draw(st.floats(0.2, 8)) for _ in range(3)])
    affine = np.eye(4)
    affine[:3, :3] = (rotation @ flips)[:, order] @ spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine


shapes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5))


def label_map_of(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 3, shape).astype(np.uint8)


@given(affines(), shapes, st.sampled_from([None, "axial", "coronal", "sagittal"]))
@settings(max_examples=150)
def test_slicing_puts_every_voxel_back(
    affine: np.ndarray, shape: tuple[int, int, int], plane: str | None
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    volume = Volume(array, affine, "LPS")
    if plane is not None and shape.count(1) == 1:  # a single slice has one plane
        plane = None
    slicing = Slicing.of(volume, plane)
    back = np.zeros_like(array)
    for index in range(slicing.count(volume)):
        slicing.view(back, index)[:] = slicing.view(array, index)
        assert np.array_equal(slicing.places(volume)(index), slicing.view(array, index))
    assert np.array_equal(back, array)
    assert slicing.view(array, 0).shape == (shape[slicing.rows], shape[slicing.columns])


@given(affines(), st.sampled_from(["RAS", "LPS"]))
@settings(max_examples=150)
def test_slices_are_upright_whatever_the_axes(affine: np.ndarray, frame: Any) -> None:
    """Stepping down or right on the screen goes towards back or feet, and left or back."""
    volume = Volume(np.zeros((4, 4, 4), np.uint8), affine, frame)
    lps = volume.affine_in("LPS")
    for plane, (down, right) in {
        "axial": ((1, 1), (0, 1)),
        "coronal": ((2, -1), (0, 1)),
        "sagittal": ((2, -1), (1, 1)),
    }.items():
        slicing = Slicing.of(volume, plane)
        index = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1)
        where = index @ lps[:3, :3].T + lps[:3, 3]
        view = slicing.view(where, 1)  # a colour-like last axis: coordinates of every pixel
        step_down, step_right = view[1, 0] - view[0, 0], view[0, 1] - view[0, 0]
        cosine_down = step_down[down[0]] * down[1] / np.linalg.norm(step_down)
        cosine_right = step_right[right[0]] * right[1] / np.linalg.norm(step_right)
        assert cosine_down > -1e-6
        assert cosine_right > -1e-6


def test_the_axis_of_acquisition_is_sliced_unless_another_is_asked_for() -> None:
    volume = Volume(np.zeros((9, 8, 7), np.uint8), np.diag([1.0, 5.0, 1.0, 1.0]), "RAS")
    assert (Slicing.of(volume).axis, Slicing.of(volume).plane) == (1, "coronal")
    assert Slicing.of(volume, "axial").axis == 2
    even = Volume(np.zeros((9, 8, 7), np.uint8), np.eye(4), "RAS")
    assert Slicing.of(even).plane == "axial"
    picture = Volume(np.zeros((1, 8, 7), np.uint8), np.eye(4), "image")
    assert Slicing.of(picture).axis == 0
    with pytest.raises(InputError, match="how the patient lay"):
        Slicing.of(picture, "axial")
    with pytest.raises(InputError, match="oblique"):
        Slicing.of(even, "oblique")


@given(affines(), shapes)
@settings(max_examples=40)
def test_nifti_round_trip(
    tmp_path_factory: pytest.TempPathFactory, affine: np.ndarray, shape: tuple[int, int, int]
) -> None:
    folder = tmp_path_factory.mktemp("nifti")
    image = nibabel.Nifti1Image(label_map_of(shape).astype(np.int16), affine)
    nibabel.save(image, folder / "in.nii.gz")
    volume = read_nifti(folder / "in.nii.gz")
    assert np.array_equal(volume.array, label_map_of(shape))
    assert np.allclose(volume.affine, affine, atol=1e-3)
    write_nifti(folder / "out.nii.gz", label_map_of(shape), volume)
    again = read_nifti(folder / "out.nii.gz")
    assert np.array_equal(again.array, label_map_of(shape))
    assert np.allclose(again.affine, volume.affine, atol=1e-3)


@given(affines(), shapes)
@settings(max_examples=40)
def test_seg_nrrd_round_trip(
    tmp_path_factory: pytest.TempPathFactory, affine: np.ndarray, shape: tuple[int, int, int]
) -> None:
    path = tmp_path_factory.mktemp("nrrd") / "x.seg.nrrd"
    labels = {"left ventricle": 1, "myocardium": 2}
    like = Volume(np.zeros(shape, np.int16), affine, "RAS")
    written = {name: label_map_of(shape) == value for name, value in labels.items()}
    write_seg_nrrd(path, written, like)
    volume, segments = read_seg_nrrd(path)
    assert np.allclose(volume.affine, like.affine_in("LPS"), atol=1e-4)
    assert [name for name, _ in segments] == list(labels)
    for name, mask in segments:
        assert np.array_equal(mask, written[name])


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
@pytest.mark.parametrize("dtype", ["int16", ">u2", "float32", "uint8"])
@pytest.mark.parametrize("space", ["left-posterior-superior", "RAS", "left-anterior-superior"])
def test_nrrd_kinds(tmp_path: Path, encoding: str, dtype: str, space: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    directions = np.diag([0.5, 0.7, 3.0])
    header = {"space": space, "space directions": directions, "space origin": [1.0, 2.0, 3.0]}
    nrrd.write(str(tmp_path / "a.nrrd"), array, header | {"encoding": encoding})
    volume = read_nrrd(tmp_path / "a.nrrd")
    assert np.array_equal(volume.array, array)
    assert volume.spacing == pytest.approx((0.5, 0.7, 3.0))
    x = volume.affine_in("RAS")[0, 3]
    assert x == pytest.approx(1.0 if space == "RAS" else -1.0)


def nifti(tmp_path: Path, array: np.ndarray, name: str = "a.nii") -> Path:
    image = nibabel.Nifti1Image(array, np.eye(4))
    nibabel.save(image, tmp_path / name)
    return tmp_path / name


def test_nifti_scaling_units_and_extra_axes(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((2, 3, 4, 1), np.int16), np.eye(4))
    image.header.set_xyzt_units("micron")
    image.header.set_slope_inter(2.0, -5.0)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii")
    assert volume.shape == (2, 3, 4)
    assert volume.spacing == pytest.approx((0.001,) * 3)
    rgb = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"] = 7
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii.gz")
    assert (read_nifti(tmp_path / "rgb.nii.gz").array == [0, 7, 0]).all()


def test_nifti_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    whole = np.ones((8, 9, 10), np.float32)
    path = nifti(tmp_path, whole)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        read_nifti(path)
    path = nifti(tmp_path, whole, "b.nii.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut off"):
        read_nifti(path)
    lost = nibabel.Nifti1Image(whole, None)
    lost.header.set_sform(None, code=0)
    lost.header.set_qform(None, code=0)
    nibabel.save(lost, tmp_path / "c.nii")
    with pytest.raises(InputError, match="how the patient lay"):
        read_nifti(tmp_path / "c.nii")
    holes = whole.copy()
    holes[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 NaN"):
        read_nifti(nifti(tmp_path, holes, "d.nii"))
    with pytest.raises(InputError, match="series of 5 volumes"):
        read_nifti(nifti(tmp_path, np.ones((2, 2, 2, 5), np.uint8), "e.nii"))
    with pytest.raises(InputError, match="complex"):
        read_nifti(nifti(tmp_path, np.ones((2, 2, 2), np.complex64), "f.nii"))
    (tmp_path / "g.nii").write_bytes(b"\0" * 500)
    with pytest.raises(InputError, match="no NIfTI"):
        read_nifti(tmp_path / "g.nii")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = nifti(tmp_path, np.ones((2, 2, 2), np.uint8))
    header = bytearray(path.read_bytes()[:352])
    header[42:48] = np.array([20000, 20000, 20000], "<i2").tobytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(header) + b"\0" * 10_000_000))
    with pytest.raises(InputError, match="GiB"):
        read_nifti(tmp_path / "bomb.nii.gz")
    text = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: RAS\nsizes: 4 4 4\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: gzip\n\n"
    )
    (tmp_path / "bomb.nrrd").write_bytes(text.encode() + gzip.compress(b"\0" * 200_000_000))
    with pytest.raises(InputError, match="more pixels"):
        read_nrrd(tmp_path / "bomb.nrrd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("space: RAS", "space: 3D-right-handed"), "how the patient lay"),
        (("space origin: (0,0,0)\n", ""), "space origin"),
        (("sizes: 2 2 2", "sizes: 2 2 9"), "cut off"),
        (("sizes: 2 2 2", "sizes: 2 -2 2"), "empty or damaged"),
        (("encoding: raw", "encoding: hex"), "encoding 'hex'"),
        (("encoding: raw", "encoding: raw\ndata file: /etc/passwd"), "another file"),
        (("type: uint8", "type: block"), "type block"),
        (("(0,1,0)", "(1,0,0)"), "do not span space"),
        (("NRRD0004", "NARD0004"), "no NRRD"),
        (("type: uint8", "type: int16"), "its endian is 'missing', expected little or big"),
        (("type: uint8", "type: int16\nendian: middle"), "its endian is 'middle'"),
        (("encoding", 'space units: "inch" "mm" "mm"\nencoding'), "units that are not understood"),
        (("encoding", 'space units: "m" "m" "m"\nencoding'), "units that are not understood"),
        (("encoding", 'space units: "mm" "mm"\nencoding'), "units that are not understood"),
        (("encoding", 'units: "cm" "cm" "cm"\nencoding'), "units that are not understood"),
        (("encoding", "line skip: 3\nencoding"), "skips lines or bytes"),
        (("dimension: 3", "dimension: 2"), "3 axes; expected a volume of three"),
        (("(1,0,0) (0,1,0)", "(1,0,0) none"), "directions or origin are damaged"),
    ],
)
def test_nrrd_that_cannot_be_used_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: RAS\nsizes: 2 2 2\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: raw\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(text.encode() + bytes(8))
    assert read_nrrd(tmp_path / "a.nrrd").shape == (2, 2, 2)
    assert change[0] in text
    (tmp_path / "a.nrrd").write_bytes(text.replace(*change).encode() + bytes(8))
    with pytest.raises(InputError, match=message):
        read_nrrd(tmp_path / "a.nrrd")


@pytest.mark.parametrize(
    ("units", "millimetres"),
    [
        ('"mm" "mm" "mm"', (1, 1, 1)),
        ('"cm" "cm" "cm"', (10, 10, 10)),
        ('"micron" "Micrometers" "um"', (1e-3, 1e-3, 1e-3)),
        ('"mm" "Meters" ""', (1, 1000, 1)),
        ('"µm" "μm" "mm"', (1e-3, 1e-3, 1)),  # the sign of micro, and the Greek letter
    ],
)
def test_nrrd_states_lengths_in_units(
    tmp_path: Path, units: str, millimetres: tuple[float, ...]
) -> None:
    """Of space: x, y and z, wherever the axes of the voxels go."""
    text = (
        "NRRD0004\ntype: uint8\ndimension: 3\nspace: LAS\nsizes: 2 2 2\n"
        "space directions: (0,2,0) (3,0,0) (0,0,4)\nspace origin: (5,6,7)\nencoding: raw\n"
        f'space units: {units}\nunits: "" "" ""\n\n'
    )
    (tmp_path / "a.nrrd").write_bytes(text.encode() + bytes(8))
    x, y, z = millimetres
    expected = [[0, -3 * x, 0, -5 * x], [2 * y, 0, 0, 6 * y], [0, 0, 4 * z, 7 * z]]
    np.testing.assert_allclose(read_nrrd(tmp_path / "a.nrrd").affine_in("RAS")[:3], expected)


def test_which_reader_a_name_gets(tmp_path: Path) -> None:
    for name, kind in {
        "a.nii.gz": "nifti",
        "a.NRRD": "nrrd",
        "a.mhd": "metaimage",
        "x.dcm": "dicom",
        "p.png": "image",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        assert volume_format(tmp_path / name) == kind
    assert volume_stem(Path("scan.v2.nii.gz")) == "scan.v2"
    with pytest.raises(InputError, match="no file"):
        read_volume(tmp_path / "none.nii")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no known format"):
        read_volume(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="no format 'mnc'"):
        read_volume(tmp_path / "notes.txt", kind="mnc")


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((2, 2)), np.eye(4), "IxJxK"),
        (np.zeros((0, 2, 2)), np.eye(4), "empty"),
        (np.zeros((2, 2, 2)), np.eye(3), "4x4"),
        (np.zeros((2, 2, 2)), np.diag([1.0, 1, 0, 1]), "span space"),
    ],
)
def test_wrong_volumes_are_refused(array: np.ndarray, affine: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Volume(array, affine, "RAS")


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_slices_that_lie_askew_are_told_and_measured_across(tmp_path: Path, shift: float) -> None:
    array = np.zeros((20, 16, 6), np.int16)
    affine = np.diag([0.8, 0.9, 4.0, 1.0])
    affine[0, 2] = shift
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert ["32.0 degrees off right angles" in note for note in volume.notes] == [True] * bool(
        shift
    )
    mask = np.zeros(array.shape, np.uint8)
    mask[4:12, 4:12, 1:5] = 1
    nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / "a.mask.nii.gz")
    (source,) = sources_of(find_annotations(tmp_path), {1: "a"})
    found = source.read()
    assert found.across == pytest.approx(4.0)
    assert found.acquisition.spacing == pytest.approx((0.9, 0.8))


NAMES = ("Öd", "Äd", "左心室", "a: b := c", "#x")


def test_names_of_segments_are_what_was_written(tmp_path: Path) -> None:
    """3D Slicer writes and reads UTF-8; pynrrd drops what is not ASCII: two names were one."""
    like = Volume(np.zeros((3, 4, 5), np.int16), np.diag([1.0, 2, 3, 1]), "RAS")
    masks = {name: np.zeros(like.shape, bool) for name in NAMES}
    for at, mask in enumerate(masks.values()):
        mask[at % 3, at % 4, at % 5] = True
    write_segmentation(tmp_path / "a.seg.nrrd", masks, like)
    assert "Name:=Öd\n".encode() in (tmp_path / "a.seg.nrrd").read_bytes()
    found = dict(read_seg_nrrd(tmp_path / "a.seg.nrrd")[1])
    assert [*found] == [*NAMES]
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())
    header = nrrd.read_header(str(tmp_path / "a.seg.nrrd"))  # and others read the rest
    assert (header["encoding"], header["Segment3_Name"]) == ("gzip", NAMES[3])
    # Of an older Slicer on Windows: which letters these are depends on where it ran.
    data = (tmp_path / "a.seg.nrrd").read_bytes().replace("Öd".encode(), "Öd".encode("cp1252"))
    (tmp_path / "a.seg.nrrd").write_bytes(data)
    with pytest.raises(InputError, match="name of segment 0 is not in UTF-8"):
        read_seg_nrrd(tmp_path / "a.seg.nrrd")


def test_more_segments_than_a_byte_counts(tmp_path: Path) -> None:
    like = Volume(np.zeros((1, 20, 20), np.int16), np.eye(4), "RAS")
    masks = {f"s{n}": np.arange(400).reshape(like.shape) == n for n in range(300)}
    write_segmentation(tmp_path / "a.seg.nrrd", masks, like)
    found = dict(read_seg_nrrd(tmp_path / "a.seg.nrrd")[1])
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("name", ["a\nb", "", " a", "x/y", "a" * 65, 1])
def test_masks_that_cannot_be_named_are_not_written(tmp_path: Path, name: Any) -> None:
    like = Volume(np.zeros((3, 4, 5), np.int16), np.eye(4), "RAS")
    for suffix in (".seg.nrrd", ".nii.gz"):
        with pytest.raises(InputError, match="name"):
            write_segmentation(tmp_path / f"a{suffix}", {name: like.array == 0}, like)
    with pytest.raises(InputError, match="no structure to write"):
        write_segmentation(tmp_path / "a.seg.nrrd", {}, like)
    assert not [*tmp_path.iterdir()]


def test_a_label_that_no_integer_holds_is_told_as_it_is(tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), np.float32)
    nifti(tmp_path, array.astype(np.int16))
    array[0, 0, 0] = 2.0**100
    mask = nifti(tmp_path, array, "a.mask.nii")
    with pytest.raises(InputError, match=f"has label {2**100}, which"):
        read_annotated_volume(tmp_path / "a.nii", mask, {1: "liver"})
