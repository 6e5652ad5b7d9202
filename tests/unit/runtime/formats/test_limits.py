"""Small files that would become large ones: each container, one limit."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path
from time import process_time
from tracemalloc import get_traced_memory, start, stop
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from support.dicom_series import write_series

from recallseg.engines.errors import InputError
from recallseg.engines.limits import DEFAULT_BYTES, max_bytes
from recallseg.runtime.formats.headers import declared_size, meaning
from recallseg.runtime.formats.images import read_image
from recallseg.runtime.formats.reading import read_volume

LIMIT = 2**24


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLSEG_MAX_BYTES", "16M")


def test_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("16M", LIMIT), ("16 MiB", LIMIT), ("1g", 2**30), ("77", 77)):
        monkeypatch.setenv("RECALLSEG_MAX_BYTES", text)
        assert max_bytes() == expected
    for text in ("0", "-1", "many", "1e9", "9" * 40):
        monkeypatch.setenv("RECALLSEG_MAX_BYTES", text)
        with pytest.raises(InputError, match="must be a size like"):
            max_bytes()
    monkeypatch.delenv("RECALLSEG_MAX_BYTES")
    assert max_bytes() == DEFAULT_BYTES


def refused(path: Path, match: str, copies: int = 1) -> None:
    start()
    with pytest.raises(InputError, match=match):
        read_volume(path)
    peak = get_traced_memory()[1]
    stop()
    assert peak < copies * LIMIT + 2**23


def nifti(*, offset: float = 352, extension: int = 0, body: int = 2**28) -> bytes:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    header = bytearray(image.to_bytes()[:352])
    struct.pack_into("<f", header, 108, offset)
    if extension:
        header[348] = 1
        header += struct.pack("<ii", extension, 4)
    return gzip.compress(bytes(header) + bytes(body), 1)


@pytest.mark.parametrize(
    ("offset", "extension", "match"),
    [
        (2.0**24, 0, "expands to more than 16 MiB .*RECALLSEG_MAX_BYTES"),
        (2.0**30, 0, "voxels begin at byte 1073741824"),
        (2.0**27, 2**27 - 352, "voxels begin at byte 134217728"),
        (float("nan"), 0, "voxels begin at byte nan"),
    ],
)
def test_a_nifti_file_expands_within_the_limit(
    tmp_path: Path, offset: float, extension: int, match: str
) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nifti(offset=offset, extension=extension))
    assert path.stat().st_size < LIMIT
    refused(path, match)


def test_a_good_nifti_file_is_read_as_before(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for name in ("a.nii", "a.nii.gz"):
            image = kind(array, np.eye(4))
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 1000))
            nibabel.save(image, tmp_path / name)
            assert np.array_equal(read_volume(tmp_path / name).array, array)
    for data in (b"", b"\x1f\x8b", gzip.compress(b"abcd" * 100), gzip.compress(b"")):
        (tmp_path / "b.nii.gz").write_bytes(data)
        with pytest.raises(InputError):
            read_volume(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_nifti_header_of_a_million_extensions_takes_no_time(
    tmp_path: Path, name: str, kind: Any
) -> None:
    image = kind(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    start = 544 if kind is nibabel.Nifti2Image else 352
    header, count = bytearray(image.to_bytes()[:start]), 2**20 - 40
    form, at = ("<q", 168) if kind is nibabel.Nifti2Image else ("<f", 108)
    struct.pack_into(form, header, at, start + 16 * count)
    header[start - 4] = 1
    data = bytes(header) + struct.pack("<ii8x", 16, 4) * count + bytes(8)
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    began = process_time()
    with pytest.raises(InputError, match="more than 1000 extensions"):
        read_volume(tmp_path / name)
    assert process_time() - began < 1  # an object of each takes seconds


def tiff(pages: list[tuple[int, int]], order: str = "<", big: bool = False) -> bytes:
    """Return a TIFF whose pages are headers only."""
    offset = f"{order}{'Q' if big else 'I'}"
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    head += struct.pack(f"{order}HHQ", 8, 0, 16) if big else struct.pack(f"{order}I", 8)
    data = bytearray(head)
    for index, (height, width) in enumerate(pages):
        tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1}
        data += struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
        for tag, value in tags.items():
            data += struct.pack(f"{order}HH", tag, 4)
            data += (
                struct.pack(f"{order}QII", 1, value, 0)
                if big
                else struct.pack(f"{order}II", 1, value)
            )
        end = len(data) + struct.calcsize(offset)
        data += struct.pack(offset, 0 if index == len(pages) - 1 else end)
    return bytes(data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_pages_are_counted_without_decoding_one(tmp_path: Path, order: str, big: bool) -> None:
    data = tiff([(4, 5), (100_000, 100_000), (3, 3)], order, big)
    assert declared_size(data) == (4, 5)
    assert meaning(data).pages == 3
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    refused(path, "3 pages")
    path.write_bytes(tiff([(100_000, 100_000)], order, big))
    refused(path, r"10000000000 pixels, or 10000000000 bytes; at most 16 MiB")
    loop = bytearray(tiff([(4, 5)], "<"))
    loop[-4:] = struct.pack("<I", 8)
    assert meaning(bytes(loop)).pages == 1


@pytest.mark.parametrize("kind", [4, 16, 17])
def test_of_two_sizes_the_first_counts_as_for_the_decoder(tmp_path: Path, kind: int) -> None:
    data = tiff([(8, 8)], big=True)
    count = struct.unpack_from("<Q", data, 16)[0]
    first = struct.pack("<HHQQ", 256, kind, 1, 60_000) + struct.pack("<HHQQ", 257, kind, 1, 60_000)
    path = tmp_path / "a.tif"
    path.write_bytes(data[:16] + struct.pack("<Q", count + 2) + first + data[24:])
    assert declared_size(path.read_bytes()) == (60_000, 60_000)
    refused(path, "3600000000 pixels")


@pytest.mark.parametrize(
    ("name", "head"),
    [("a.png", b"\x89PNG\r\n\x1a\n"), ("a.tif", b"II*\0"), ("a.nrrd", b"NRRD0004\n")],
)
def test_a_file_of_holes_is_not_read(tmp_path: Path, name: str, head: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(head)
    os.truncate(path, 2**28)
    refused(path, "has 268435456 bytes; at most 16 MiB .*RECALLSEG_MAX_BYTES")


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((8, 8), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match="not a NumPy array file"):
        read_image(tmp_path / "a.npy")


def test_other_formats_do_not_hide_behind_a_name(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    for encoder in (".webp", ".ppm"):
        done, data = cv2.imencode(encoder, image)
        assert done
        (tmp_path / "a.png").write_bytes(data.tobytes())
        with pytest.raises(
            InputError, match="no PNG, JPEG, BMP or TIFF, or not what its name says"
        ):
            read_image(tmp_path / "a.png")


def test_a_jpeg_of_ten_thousand_scans_is_not_decoded(tmp_path: Path) -> None:
    data = cv2.imencode(".jpg", np.zeros((16, 16), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[
        1
    ].tobytes()
    (tmp_path / "good.jpg").write_bytes(data)
    assert read_image(tmp_path / "good.jpg").shape == (16, 16)
    at = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:at] + data[at:-2] * 10_000 + data[-2:])
    with pytest.raises(InputError):
        read_image(tmp_path / "a.jpg")


def test_a_png_of_16_bits_and_colours_counts_its_bytes(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2000, 2000, 16, 6, 0, 0, 0)  # 32 MB, of 4 million pixels
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2000 * (2000 * 8 + 1)))) + chunk(b"IEND", b"")
    )  # fmt: skip
    refused(path, "4000000 pixels, or 32000000 bytes; at most 16 MiB")


def test_large_dicom_is_refused(tmp_path: Path) -> None:
    import pydicom

    (path,) = write_series(tmp_path, np.zeros((1, 64, 48), np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.Rows = dataset.Columns = 30_000
    dataset.save_as(path)
    refused(path, "at most 16 MiB")


def test_deflated_dicom_unpacks_within_the_limit(tmp_path: Path) -> None:
    import pydicom

    (path,) = write_series(tmp_path, np.zeros((1, 64, 48), np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x00091010, "OB", bytes(2**28))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path, implicit_vr=False, little_endian=True)
    refused(path, "unpacks to more than 16 MiB .*RECALLSEG_MAX_BYTES", copies=2)
