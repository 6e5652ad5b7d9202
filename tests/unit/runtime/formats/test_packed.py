"""What is packed otherwise or twice is called that; what is cheap to store is cheap to read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from recallseg.errors import InputError
from recallseg.runtime.formats import guards, images
from recallseg.runtime.formats.finding import find_in_folder, find_inputs
from recallseg.runtime.formats.pairs import find_pairs
from recallseg.runtime.formats.reading import count_item, count_volumes, read_item, read_volume

NRRD = (
    b"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 4 2\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: %s\n%s\n"
)
PIXELS = bytes(range(32))


def nifti(extensions: int = 0) -> bytes:
    image = nibabel.Nifti1Image(np.arange(32, dtype=np.int16).reshape(4, 4, 2), np.eye(4))
    image.header.set_sform(np.eye(4), 1)
    data = bytearray(image.to_bytes())
    if extensions:
        struct.pack_into("<f", data, 108, float(352 + 16 * extensions))
        data[348:352] = b"\1\0\0\0" + struct.pack("<ii8x", 16, 6) * extensions
    return bytes(data)


def zipped(data: bytes) -> bytes:
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.nii", data)
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    """A frame of one raw block, as RFC 8878 has it."""
    assert len(data) < 2**16
    header = b"\x28\xb5\x2f\xfd" + b"\x60" + struct.pack("<H", len(data) - 256)
    return header + (len(data) << 3 | 1).to_bytes(3, "little") + data


PACKED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a.nii.xz": (lzma.compress, r"xz: unpack it first \(unxz\)"),
    "a.nii.bz2": (bz2.compress, r"bzip2: unpack it first \(bunzip2\)"),
    "a.nii.zst": (zstd, r"Zstandard: unpack it first \(unzstd\)"),
    "a.nii.gz.gz": (
        lambda data: gzip.compress(gzip.compress(data)),
        r"gzip: unpack it first \(gunzip\)",
    ),
    "a.nii.zip": (zipped, r"zip: unpack it first \(unzip\)"),
}
MISNAMED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "twice.nii.gz": (lambda b: gzip.compress(gzip.compress(b)), "packed twice, inside with gzip"),
    "inside.nii.gz": (lambda b: gzip.compress(lzma.compress(b)), "packed twice, inside with xz"),
    "xz.nii.gz": (lzma.compress, r"packed with xz.*whatever its name says"),
    "gz.nii": (gzip.compress, "packed with gzip.* or name it .nii.gz"),
    "zst.nii": (zstd, "packed with Zstandard"),
    "plain.nii.gz": (bytes, r"not packed with gzip.*Name it \.nii then"),
}


@pytest.mark.parametrize("name", [*PACKED, *MISNAMED])
def test_what_is_packed_otherwise_is_called_that(tmp_path: Path, name: str) -> None:
    pack, told = (PACKED | MISNAMED)[name]
    path = tmp_path / name
    path.write_bytes(pack(nifti()))
    for kind in (None, "nifti"):
        with pytest.raises(InputError, match="packed" if kind else told):
            read_volume(path, kind=kind)
        with pytest.raises(InputError, match="pack"):
            count_volumes(path, kind=kind)
    (item,) = find_inputs([path]).items  # as a command takes it
    with pytest.raises(InputError, match=told):
        read_item(item)
    if name in MISNAMED:
        with pytest.raises(InputError, match="pack"):
            count_item(item)
    else:  # as a folder has it
        (passed,) = find_in_folder(tmp_path).passed
        assert passed.reason.startswith("packed with ")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_nrrd_and_pictures_that_are_packed_are_called_that(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    picture = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    for name, data in (("a.nrrd", NRRD % (b"raw", b"") + PIXELS), ("a.png", picture)):
        for packed in (name, f"{name}.packed"):
            (tmp_path / packed).write_bytes(pack(data))
            with pytest.raises(InputError, match=r"is packed with .*: unpack it first"):
                read_volume(tmp_path / packed)
    (tmp_path / "b.nrrd").write_bytes(NRRD % (b"gzip", b"") + gzip.compress(pack(PIXELS * 9)))
    with pytest.raises(InputError, match="pixels that are packed twice, inside with"):
        read_volume(tmp_path / "b.nrrd")


def test_nrrd_in_bzip2_and_gzip_is_read_and_no_more_than_it_says(tmp_path: Path) -> None:
    for encoding, pack in ((b"bzip2", bz2.compress), (b"gzip", gzip.compress)):
        path = tmp_path / "a.nrrd"
        path.write_bytes(NRRD % (encoding, b"") + pack(PIXELS))
        assert read_volume(path).array.ravel(order="F").tobytes() == PIXELS
        path.write_bytes(NRRD % (encoding, b"") + pack(bytes(50_000_000)))
        begin = time.process_time()
        with pytest.raises(InputError, match="more pixels than the 32 bytes"):
            read_volume(path)
        assert time.process_time() - begin < 1


def test_files_that_are_made_to_take_long_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(b"") * 300_000 + gzip.compress(nifti()))
    with pytest.raises(InputError, match="unpack to next to nothing"):
        read_volume(path)
    path.write_bytes(
        gzip.compress(b"") * 3 + gzip.compress(nifti()[:99]) + gzip.compress(nifti()[99:])
    )
    assert read_volume(path).array.sum() == 496  # in several parts, as some programs write it
    noise = np.random.default_rng(0).integers(0, 2**15, (128, 128, 100)).astype(np.int16)
    image = nibabel.Nifti1Image(noise, np.eye(4))
    image.header.set_sform(np.eye(4), 1)
    monkeypatch.setattr(guards, "_MOST_PACKED", 2**21)
    path.write_bytes(gzip.compress(image.to_bytes(), 0))  # not smaller than what it holds
    assert np.array_equal(read_volume(path).array, noise)
    (tmp_path / "a.nii").write_bytes(nifti(2_000_000))
    with pytest.raises(InputError, match="at most 16777216 bytes of header"):
        read_volume(tmp_path / "a.nii")
    lines = b"".join(b"key%d:=v\n" % number for number in range(400_000))
    (tmp_path / "a.nrrd").write_bytes(NRRD % (b"raw", lines) + PIXELS)
    with pytest.raises(InputError, match="header of more than 4194304 bytes"):
        read_volume(tmp_path / "a.nrrd")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
PNG = cv2.imencode(".png", GREY)[1].tobytes()
JPEG = cv2.imencode(".jpg", GREY)[1].tobytes()
LONG = zlib.compress(bytes(7_900_000), 9)
TEXTS = {
    "zTXt": b"a\0\0" + LONG,
    "iTXt": b"a\0\1\0\0\0" + LONG,
    "iCCP": b"a\0\0" + LONG,
    "tEXt": b"a\0" + b"b" * 20_000,
    "eXIf": b"nothing" * 3000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_and_profiles_of_a_png_file_take_no_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG[:33] + chunk(name.encode(), TEXTS[name]) * 600 + PNG[33:])
    begin = time.process_time()
    assert np.array_equal(images.read_image(path), GREY)
    assert np.array_equal(images.read_label_map(path), GREY)
    assert time.process_time() - begin < 2
    assert capfd.readouterr().err == ""  # libpng would warn of them


def tiff(pages: int) -> bytes:
    made = bytearray(b"II*\0" + struct.pack("<I", 8))
    for page in range(pages):
        place = len(made)
        tags = (
            *((254, int(page > 0)), (256, 8), (257, 8), (258, 8), (259, 1), (262, 1)),
            *((273, place + 2 + 12 * 9 + 4), (278, 8), (279, 64)),
        )
        made += struct.pack("<H", len(tags))
        for tag, value in tags:
            made += struct.pack("<HHII", tag, 4, 1, value)
        after = len(made) + 4 + 64
        made += struct.pack("<I", after if page + 1 < pages else 0) + GREY.tobytes()
    return bytes(made)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.png", PNG[:33] + chunk(b"tEXt", b"a\0b") * 6000 + PNG[33:], "5000 chunks beside"),
        (
            "b.png",
            PNG[:33] + chunk(b"IDAT", b"") * (2**20) + PNG[33:],
            "pixels in more than 1048576",
        ),
        ("a.jpg", JPEG[:2] + b"\xff\xe2\0\2" * 6000 + JPEG[2:], "5000 segments before"),
        ("b.jpg", JPEG[:2] + b"\xff\xd0" * 6000 + JPEG[2:], "5000 segments before"),
        ("a.tif", tiff(6000), "5000 pages or more"),
    ],
)
def test_pictures_of_countless_parts_are_refused(
    tmp_path: Path, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=told):
        images.read_image(tmp_path / name)


@pytest.mark.parametrize(("side", "scans"), [(8, 600), (6000, 300)])
def test_a_jpeg_file_of_countless_scans_is_refused(tmp_path: Path, side: int, scans: int) -> None:
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    data = cv2.imencode(".jpg", np.zeros((side, side), np.uint8), progressive)[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(data)
    assert images.read_image(tmp_path / "a.jpg").shape == (side, side)
    end = data.rfind(b"\xff\xd9")
    last = data[data.rfind(b"\xff\xda") : end]
    (tmp_path / "a.jpg").write_bytes(data[:end] + last * scans + data[end:])
    with pytest.raises(InputError, match=f"scans of {side}x{side} pixels"):
        images.read_image(tmp_path / "a.jpg")


def test_what_encoders_write_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(40))  # with smaller copies of itself
    assert np.array_equal(images.read_image(tmp_path / "a.tif"), GREY)
    (tmp_path / "a.jpg").write_bytes(JPEG[:2] + b"\xff" * 5_000_000 + JPEG[2:])  # filled up
    begin = time.process_time()
    assert images.read_image(tmp_path / "a.jpg").shape == GREY.shape
    assert time.process_time() - begin < 1


def test_what_was_passed_over_is_told_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a\n.nii.xz").write_bytes(lzma.compress(nifti()))
    (tmp_path / "b.nii.gz.gz").write_bytes(gzip.compress(nifti()))
    with pytest.raises(InputError) as told:
        find_pairs(tmp_path)
    lines = str(told.value).splitlines()
    assert [line.split(": ")[1] for line in lines[1:]] == ["packed with xz", "packed with gzip"]
