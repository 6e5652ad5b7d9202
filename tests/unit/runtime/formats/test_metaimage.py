"""MetaImage as SimpleITK (ITK) writes and reads it, and what is refused."""

from __future__ import annotations

import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation
from support.pictures import disc
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.finding import find_in_folder
from recallseg.runtime.formats.metaimage import count_metaimage, read_metaimage
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.library import Library
from recallseg.runtime.volumes.writing import write_segmentation

SHAPE = (6, 5, 4)  # i, j, k
TYPES = (
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
)


def itk_image(dtype: str = "int16", *, oblique: bool = True) -> SimpleITK.Image:
    numbers = np.arange(np.prod(SHAPE)).reshape(SHAPE[::-1]).astype(dtype)
    image = SimpleITK.GetImageFromArray(numbers)
    image.SetSpacing((0.7, 1.3, 4.5))
    image.SetOrigin((-12.5, 30.25, 7.0))
    if oblique:
        turned = Rotation.from_euler("zyx", (25, -40, 70), degrees=True).as_matrix()
        image.SetDirection((turned @ np.diag([1, -1, 1])).ravel().tolist())
    return image


def written(path: Path, image: SimpleITK.Image | None = None, *, packed: bool = False) -> Path:
    SimpleITK.WriteImage(image or itk_image(), str(path), useCompression=packed)
    return path


def assert_as_itk_has_it(volume: Volume, path: Path) -> None:
    image = SimpleITK.ReadImage(str(path))
    assert volume.frame == "LPS"
    assert np.array_equal(volume.array, SimpleITK.GetArrayFromImage(image).T)
    for index in ((0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3), (5, 4, 3)):
        place = image.TransformIndexToPhysicalPoint(index)
        assert (volume.affine @ [*index, 1])[:3] == pytest.approx(place, abs=1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".MHA"])
def test_what_itk_writes_is_read_as_itk_reads_it(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = written(tmp_path / f"a{suffix.lower()}", packed=packed)
    path = path.rename(tmp_path / f"a{suffix}")
    volume = read_volume(path)
    assert volume.spacing == pytest.approx((0.7, 1.3, 4.5))
    assert count_metaimage(path) == 1
    if suffix != ".MHA":  # SimpleITK goes by a name in small letters
        assert_as_itk_has_it(volume, path)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_number_and_either_order_of_bytes(tmp_path: Path, dtype: str) -> None:
    path = written(tmp_path / "a.mha", itk_image(dtype))
    little = read_metaimage(path)
    assert little.array.dtype == dtype
    assert_as_itk_has_it(little, path)
    head, _, pixels = path.read_bytes().partition(b"LOCAL\n")
    head = head.replace(b"OrderMSB = False", b"OrderMSB = True")
    size = np.dtype(dtype).itemsize
    turned = np.frombuffer(pixels, f"V{size}").view("u1").reshape(-1, size)[:, ::-1].tobytes()
    path.write_bytes(head + b"LOCAL\n" + turned)
    big = read_metaimage(path)
    assert np.array_equal(big.array, little.array)
    assert_as_itk_has_it(big, path)


@pytest.mark.parametrize(
    "change",
    [
        (b"BinaryData = True\n", b""),
        (b"NDims = 3", b"NDims=3\nComment = one\nComment = two\nModality = MET_MOD_CT"),
        (b"TransformMatrix", b"Orientation"),
        (b"TransformMatrix", b"Rotation"),
        (b"Offset", b"Position"),
        (b"Offset", b"Origin"),
        (b"ElementSpacing", b"ElementSize"),
        (b"BinaryDataByteOrderMSB", b"ElementByteOrderMSB"),
        (b"LOCAL", b"Local "),
        (b"NDims = 3", b"NDims = 3\nHeaderSize = -1"),
        (b"NDims = 3", b"NDims = 3\nCenterOfRotation = 5 5 5"),
        (b"NDims = 3", b"NDims = 3\nDistanceUnits = mm\nElementNumberOfChannels = 1"),
    ],
)
def test_other_ways_to_say_it(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    path = written(tmp_path / "a.mha")
    data = path.read_bytes()
    if b"CenterOfRotation" in change[1]:
        data = re.sub(rb"CenterOfRotation.*\n", b"", data)
    assert change[0] in data
    path.write_bytes(data.replace(*change))
    assert_as_itk_has_it(read_metaimage(path), path)


def test_pixels_of_old_files_behind_a_header_of_their_own(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mhd")
    raw = tmp_path / "a.raw"
    pixels = raw.read_bytes()
    for size in ("7", "-1"):
        raw.write_bytes(b"scanner" + pixels)
        path.write_text(
            path.read_text().replace("NDims = 3\n", f"NDims = 3\nHeaderSize = {size}\n")
        )
        assert_as_itk_has_it(read_metaimage(path), path)
        path.write_text(path.read_text().replace(f"HeaderSize = {size}\n", ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((r"NDims = 3", "NDims = 2"), "'2' axes"),
        ((r"NDims = 3", "NDims = 4"), "'4' axes"),
        ((r"TransformMatrix = .*\n", ""), "9 numbers as TransformMatrix, and it is missing"),
        ((r"TransformMatrix = .*", "TransformMatrix = 1 0 0 0 1 0 0 0"), "9 numbers"),
        ((r"TransformMatrix = .*", "TransformMatrix = 1 0 0 0 1 0 0 0 nan"), "9 numbers"),
        ((r"TransformMatrix = .*", "TransformMatrix = 1 0 0 1 0 0 0 0 1"), "span space"),
        ((r"Offset = .*\n", ""), "3 numbers as Offset, and it is missing"),
        ((r"ElementSpacing = .*\n", ""), "3 numbers as ElementSize"),
        ((r"ElementSpacing = .*", "ElementSpacing = 1 -1 1"), "above 0"),
        ((r"NDims = 3", "NDims = 3\nOffset = 1 2 3"), "states Offset twice"),
        ((r"NDims = 3", "NDims = 3\nPosition = 1 2 3"), "states Offset twice"),
        ((r"NDims = 3", "NDims = 3\nDistanceUnits = cm"), "lengths in 'cm'"),
        ((r"NDims = 3", "NDims = 3\nElementNumberOfChannels = 3"), "'3' numbers for each voxel"),
        ((r"MET_SHORT", "MET_SHORT_ARRAY"), "type MET_SHORT_ARRAY|MET_SHORT_ARRAY"),
        ((r"BinaryData = True", "BinaryData = False"), "binary: 'False'"),
        ((r"BinaryDataByteOrderMSB = .*\n", ""), "BinaryDataByteOrderMSB as True or False"),
        ((r"CompressedData = False", "CompressedData = maybe"), "CompressedData as True or False"),
        ((r"NDims = 3", "NDims = 3\nElementToIntensityFunctionSlope = 2"), "rescaled"),
        ((r"NDims = 3", "NDims = 3\nElementToIntensityFunctionOffset = -1024"), "rescaled"),
        ((r"ObjectType = Image", "ObjectType = Tube"), "holds no image"),
        ((r"DimSize = .*", "DimSize = 6 5 0"), "empty or damaged"),
        ((r"DimSize = .*", "DimSize = 6 5"), "DimSize is damaged"),
        ((r"DimSize = .*", "DimSize = 6 5 -4"), "DimSize is damaged"),
        ((r"DimSize = .*", "DimSize = 99999 99999 99999"), "GiB of pixels"),
        ((r"DimSize = .*", "DimSize = 6 5 5"), "cut off: it holds 240 bytes.* states 300"),
        ((r"NDims = 3", "NDims = 3\nHeaderSize = 100"), "cut off"),
        ((r"NDims = 3", "NDims = 3\nHeaderSize = -2"), "HeaderSize"),
        ((r"LOCAL", "LIST"), "several files"),
        ((r"LOCAL", "LIST 2"), "several files"),
        ((r"LOCAL", "a%03d.raw 1 4 1"), "several files"),
        ((r"LOCAL", "/etc/passwd"), "only a file in its own folder"),
        ((r"LOCAL", "../a.raw"), "only a file in its own folder"),
        ((r"LOCAL", "below/a.raw"), "only a file in its own folder"),
        ((r"LOCAL", ".."), "only a file in its own folder"),
        ((r"LOCAL", "none.raw"), "none.raw, which cannot be opened beside it: No such file"),
        ((r"LOCAL", "link.raw"), "link.raw, which cannot be opened"),
        ((r"LOCAL", "pipe.raw"), "pipe.raw: no file"),
        ((r"ElementDataFile = LOCAL", "ElementData = LOCAL"), "no list of 'key = value'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = written(tmp_path / "a.mha")
    os.mkfifo(tmp_path / "pipe.raw")
    (tmp_path / "link.raw").symlink_to("/etc/passwd")
    head, local, pixels = path.read_bytes().partition(b"LOCAL\n")
    text = (head + local).decode()
    assert re.search(change[0], text)
    path.write_bytes(re.sub(change[0], change[1], text, count=1).encode() + pixels)
    with pytest.raises(InputError, match=message) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) or str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "sent", "message"),
    [
        ("{n}", slice(0, -5), "cut off"),
        ("999999999999", slice(None), "cut off"),
        ("10", slice(None), "less pixels"),
        ("0", slice(0, 20), "less pixels"),
        ("-4", slice(None), "CompressedDataSize"),
    ],
)
def test_packed_pixels_that_are_not_as_stated(
    tmp_path: Path, stated: str, sent: slice, message: str
) -> None:
    path = written(tmp_path / "a.mha", packed=True)
    head, _, pixels = path.read_bytes().partition(b"LOCAL\n")
    wanted = f"CompressedDataSize = {stated.format(n=len(pixels))}".encode()
    head = re.sub(rb"CompressedDataSize = \d+", wanted, head)
    path.write_bytes(head + b"LOCAL\n" + pixels[sent])
    with pytest.raises(InputError, match=message):
        read_metaimage(path)


def test_pixels_that_unpack_to_more_than_stated(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mha", packed=True)
    head, _, _ = path.read_bytes().partition(b"LOCAL\n")
    bomb = zlib.compress(b"\0" * 200_000_000)
    head = re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(bomb), head)
    path.write_bytes(head + b"LOCAL\n" + bomb)
    with pytest.raises(InputError, match="more pixels than the 240 bytes"):
        read_metaimage(path)


def test_headers_that_never_end_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    for data in (b"", b"\0" * 100, b"NDims = 3\n" + b"Comment = x\n" * 100_000, b"P5 1 1 255 0"):
        path.write_bytes(data)
        for ask in (read_metaimage, count_metaimage):
            with pytest.raises(InputError, match="MetaImage file"):
                ask(path)
    path.write_bytes(b"\x1f\x8b\x08" + bytes(60))
    with pytest.raises(InputError, match="packed with gzip"):
        read_metaimage(path)


def test_pictures_and_vectors_of_itk_are_refused(tmp_path: Path) -> None:
    flat = SimpleITK.GetImageFromArray(np.zeros((5, 6), np.uint8))
    field = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.float32), isVector=True)
    series = SimpleITK.GetImageFromArray(np.zeros((2, 4, 5, 6), np.uint8), isVector=False)
    for image, message in ((flat, "'2' axes"), (field, "'3' numbers"), (series, "'4' axes")):
        with pytest.raises(InputError, match=message):
            read_volume(written(tmp_path / "a.mha", image))


def test_a_header_and_its_pixels_are_one_image_of_a_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mhd")
    written(tmp_path / "b.mhd", packed=True)
    written(tmp_path / "a.mask.mhd", itk_image("uint8"))
    (tmp_path / "other.raw").write_bytes(b"x")
    found = find_in_folder(tmp_path)
    assert [(item.name, len(item.files), item.kind) for item in found.items] == [
        ("a.mhd", 2, "metaimage"),
        ("b.mhd", 2, "metaimage"),
    ]
    assert {each.path.name for each in found.passed} == {"a.mask.mhd", "other.raw"}
    (item, _) = found.items
    assert item.as_found
    pixels = (tmp_path / "a.raw").read_bytes()
    (tmp_path / "a.raw").unlink()  # or it is still to come
    assert not item.as_found
    alone = find_in_folder(tmp_path).items[0]
    assert alone.files == (path,)
    (tmp_path / "a.raw").write_bytes(pixels[:-1])
    growing = find_in_folder(tmp_path).items[0]
    assert len({one.signature for one in (item, alone, growing)}) == 3


@pytest.mark.parametrize("name", ["x.mask.mha", "x.mhd"])
@pytest.mark.parametrize("frame", ["LPS", "RAS"])
def test_what_is_written_lies_right_in_itk(tmp_path: Path, name: str, frame: Any) -> None:
    path = written(tmp_path / "a.mha")
    volume = read_volume(path)
    if frame == "RAS":
        volume = Volume(volume.array, volume.affine_in("RAS"), "RAS")
    mask = np.zeros(SHAPE, bool)
    mask[1:4, 2:5, 3] = mask[5, 0, 0] = True
    write_segmentation(tmp_path / name, {"a": mask, "b": ~mask}, volume)
    source, made = (SimpleITK.ReadImage(str(p)) for p in (path, tmp_path / name))
    assert made.GetPixelID() == SimpleITK.sitkUInt8
    assert np.array_equal(SimpleITK.GetArrayFromImage(made).T, np.where(mask, 1, 2))
    for ask in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(made, ask)() == pytest.approx(getattr(source, ask)(), abs=1e-12)
    again = read_volume(tmp_path / name)
    assert np.allclose(again.affine, volume.affine_in("LPS"), atol=1e-12)


def test_without_a_patient_no_metaimage_is_written(tmp_path: Path) -> None:
    volume = Volume(np.zeros((2, 3, 4)), np.eye(4), "image")
    with pytest.raises(InputError, match="how the patient lay"):
        write_segmentation(tmp_path / "x.mha", {"a": np.ones((2, 3, 4), bool)}, volume)
    assert not [*tmp_path.iterdir()]


def test_it_needs_no_extra(
    fake_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, segmented by the command, and its mask written, without what ``medical`` brings."""
    for name in ("highdicom", "nibabel", "nrrd", "pydicom", "scipy", "SimpleITK"):
        monkeypatch.setitem(sys.modules, name, None)
    written_by_hand = Volume(np.zeros(SHAPE, np.int16), np.diag([0.7, 1.3, 4.5, 1.0]), "LPS")
    write_segmentation(tmp_path / "a.mha", {"a": np.ones(SHAPE, bool)}, written_by_hand)
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        for position in (0.0, 0.4):
            one = disc(position)
            library.add(one.image, one.masks, key=one.name)
    given = [str(tmp_path / "library"), str(tmp_path / "a.mha")]
    done = CliRunner().invoke(
        app, ["segment", *given, "--output", str(tmp_path / "out"), "--engine", "fake", "--k", "1"]
    )
    assert done.exit_code == 0, done.output
    mask = read_volume(tmp_path / "out" / "a.mask.mha")
    assert mask.shape == SHAPE
    assert np.allclose(mask.affine, written_by_hand.affine)
    assert (tmp_path / "out" / "a.json").is_file()


def test_masks_of_itk_beside_an_image_are_laid_on_it(tmp_path: Path) -> None:
    """Whichever way the axes of the mask's file run."""
    image = itk_image()
    written(tmp_path / "a.mha", image)
    labels = SimpleITK.Image(SHAPE, SimpleITK.sitkUInt8)
    labels.CopyInformation(image)
    labels[2, 3, 1] = labels[5, 0, 3] = 2
    turned = SimpleITK.Flip(SimpleITK.PermuteAxes(labels, (2, 0, 1)), (True, False, False))
    written(tmp_path / "a.mask.mhd", turned, packed=True)
    with pytest.raises(InputError, match="--labels"):
        read_annotated_volume(tmp_path / "a.mha", tmp_path / "a.mask.mhd", None)
    (annotated,) = find_annotations(tmp_path).volumes
    assert annotated.segmentation == tmp_path / "a.mask.mhd"
    volume, masks = read_annotated_volume(tmp_path / "a.mha", annotated.segmentation, {2: "x"})
    assert volume.shape == SHAPE
    assert [tuple(at) for at in np.argwhere(masks["x"])] == [(2, 3, 1), (5, 0, 3)]
