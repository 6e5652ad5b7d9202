"""Image files: every format and depth comes back as stored, everything broken is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError
from recallseg.runtime.formats import images
from recallseg.runtime.formats.headers import declared_size
from recallseg.runtime.formats.images import (
    read_image,
    read_label_map,
    write_label_map,
)


def pixels(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 3)])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_lossless_files_come_back_as_stored(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], suffix: str
) -> None:
    image = pixels(*shape, dtype=dtype)
    path = tmp_path / f"image{suffix}"
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)
    found = read_image(path)
    assert found.dtype == image.dtype
    np.testing.assert_array_equal(found, image)


def test_colour_is_rgb_in_jpeg_and_bmp(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    for suffix in (".jpg", ".bmp"):
        cv2.imwrite(str(tmp_path / f"red{suffix}"), red[..., ::-1])
        found = read_image(tmp_path / f"red{suffix}").astype(int)
        assert np.abs(found - red).max() < 3, suffix


def test_float_tiff_and_arrays(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    cv2.imwrite(str(tmp_path / "a.tif"), image)
    np.save(tmp_path / "a.npy", image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy"), image)


def test_opacity_is_dropped_only_when_opaque(tmp_path: Path) -> None:
    image = pixels(6, 6, 4)
    image[..., 3] = 255
    cv2.imwrite(str(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image[..., 2::-1])
    image[2, 3, 3] = 254
    cv2.imwrite(str(tmp_path / "b.png"), image)
    with pytest.raises(InputError, match="transparent"):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".npy"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    image = pixels(40, 50)
    if suffix == ".npy":
        np.save(whole, image)
    else:
        cv2.imwrite(str(whole), image)
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in [0, 1, 7, *range(16, len(data) - 4, max(1, len(data) // 40))]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=path.name):
            read_image(path)


def test_a_changed_byte_in_a_png_is_refused_or_harmless(tmp_path: Path) -> None:
    image = pixels(20, 20)
    data = cv2.imencode(".png", image)[1].tobytes()
    path = tmp_path / "a.png"
    refused = 0
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        try:
            found = read_image(path)
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, image)
    assert refused > 40


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match="10000000000 pixels"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.parametrize("shape", [(31, 47), (47, 31, 3)])
def test_declared_sizes(suffix: str, shape: tuple[int, ...]) -> None:
    data = cv2.imencode(suffix, pixels(*shape))[1].tobytes()
    assert declared_size(data) == shape[:2]


def test_declared_size_of_a_progressive_jpeg_with_restarts() -> None:
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    data = cv2.imencode(".jpg", pixels(31, 47), options)[1].tobytes()
    assert declared_size(data) == (31, 47)


@pytest.mark.parametrize("data", [b"", b"BM", b"\xff\xd8\xff", b"II*\0\x08", b"GIF89a"])
def test_no_declared_size(data: bytes) -> None:
    assert declared_size(data) is None


def test_large_arrays_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    np.save(tmp_path / "a.npy", np.zeros((10, 11), np.uint8))
    with pytest.raises(InputError, match="110 pixels"):
        read_image(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((10, 10, 3), np.uint8))
    assert read_image(tmp_path / "b.npy").shape == (10, 10, 3)


def test_a_header_that_states_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    data = bytearray((tmp_path / "a.npy").read_bytes())
    data[6] = 3  # whose header's length has four bytes
    data[8:12] = b"\xff\xff\xff\xff"
    (tmp_path / "a.npy").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="header of 4294967295 bytes"):
            read_image(tmp_path / "a.npy")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_pages_pickles_and_foreign_formats_are_refused(tmp_path: Path) -> None:
    _, data = cv2.imencodemulti(".tif", [pixels(4, 4), pixels(4, 4)])
    (tmp_path / "pages.tif").write_bytes(data.tobytes())
    with pytest.raises(InputError, match="pages"):
        read_image(tmp_path / "pages.tif")
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"object\.npy"):
        read_image(tmp_path / "object.npy")
    for name in ("a.dcm", "a.nii", "a.nii.gz"):
        with pytest.raises(InputError, match="is a volume"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="unpack it first"):
        read_image(tmp_path / "a.dcm.gz")
    with pytest.raises(InputError, match="not a known image format"):
        read_image(tmp_path / "a.txt")
    with pytest.raises(InputError, match="there is no file"):
        read_image(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / "folder.png")
    np.save(tmp_path / "nan.npy", np.full((3, 3), np.nan))
    with pytest.raises(InputError, match=r"nan\.npy.*NaN"):
        read_image(tmp_path / "nan.npy")


def test_label_maps(tmp_path: Path) -> None:
    label_map = pixels(8, 9)
    write_label_map(tmp_path / "a.mask.png", label_map)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.mask.png"), label_map)
    cv2.imwrite(str(tmp_path / "colour.png"), pixels(8, 9, 3))
    with pytest.raises(InputError, match="3 channels"):
        read_label_map(tmp_path / "colour.png")
    np.save(tmp_path / "float.npy", np.full((2, 2), 0.5))
    with pytest.raises(InputError, match="float64"):
        read_label_map(tmp_path / "float.npy")


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def encoded(suffix: str) -> bytes:
    """A small picture in one of the formats, with an orientation where it can have one."""
    if suffix == ".npy":
        stream = io.BytesIO()
        np.save(stream, pixels(3, 4))
        return stream.getvalue()
    stream, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    options = {} if suffix == ".bmp" else {"exif": exif}
    Image.fromarray(pixels(3, 4, 3)).save(stream, suffix[1:].replace("jpg", "jpeg"), **options)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".npy"])
def test_a_file_cut_off_at_any_byte_is_told_or_whole(tmp_path: Path, suffix: str) -> None:
    path, data = tmp_path / f"a{suffix}", encoded(suffix)
    path.write_bytes(data)
    whole = read_image(path)
    refused = 0
    ends = [*range(min(len(data), 250)), *range(250, len(data), 25)]
    for end in ends:
        path.write_bytes(data[:end])
        try:
            assert np.array_equal(read_image(path), whole), end
        except InputError:
            refused += 1
    assert refused > 0.9 * len(ends)


def test_a_boolean_array_is_a_label_map_of_one_structure(tmp_path: Path) -> None:
    mask = pixels(4, 5) > 99
    np.save(tmp_path / "a.npy", mask)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.npy"), mask.astype(np.uint8))
    np.save(tmp_path / "a.npy", np.repeat(mask[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.npy"), mask.astype(np.uint8))


@pytest.mark.parametrize("dtype", ["S3", "U2", "M8[s]", "complex64", "V2", [("a", "u1")]])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (0, 5)])
def test_an_array_of_other_things_is_no_label_map(
    tmp_path: Path, shape: tuple[int, ...], dtype: object
) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype))
    with pytest.raises(InputError, match="a label map must have"):
        read_label_map(tmp_path / "a.npy")


def test_labels_in_half_floats_are_whole_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 7]], np.float16))
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.npy"), [[0, 7]])


def test_a_palette_that_is_damaged_is_told(tmp_path: Path) -> None:
    """Its numbers are read by giving each colour its own: a palette of another size has none."""
    image = Image.fromarray(pixels(4, 5) // 3).convert("P")
    image.save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    assert read_label_map(tmp_path / "a.tif").shape == (4, 5)
    entry = data.index(struct.pack("<HHI", 320, 3, 768))
    for kind, count in ((3, 1500), (3, 3), (1, 768), (2, 768)):
        changed = data[:entry] + struct.pack("<HHI", 320, kind, count) + data[entry + 8 :]
        (tmp_path / "a.tif").write_bytes(changed + bytes(4000))
        with pytest.raises(InputError, match="does not hold 256 colours"):
            read_label_map(tmp_path / "a.tif")
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    begin = data.index(b"PLTE") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    chunk = b"PLTE" + bytes(3 * 300)
    long = struct.pack(">I", 900) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data[:begin] + long + data[end:])
    # Numbers do not depend on the colours.
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), np.asarray(image))


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
@pytest.mark.parametrize("suffix", ["", ".png", ".npy"])
def test_a_name_that_no_file_can_have_is_an_input_error(name: str, suffix: str) -> None:
    for read in (read_image, read_label_map):
        with pytest.raises(InputError):
            read(name + suffix)
