from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path
from time import process_time

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from support.dicom_series import make_slice

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.codestreams import rle_fits, stated_size
from recallseg.runtime.formats.dicom import read_dicom

PLANE = np.random.default_rng(0).integers(0, 900, (70, 48)).astype(np.uint16)


def frame(syntax: str) -> bytes:
    dataset = make_slice(PLANE)
    dataset.compress(syntax)
    return next(generate_frames(dataset.PixelData, number_of_frames=1))


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
def test_the_size_is_that_of_the_image(syntax: str) -> None:
    assert stated_size(frame(syntax)) == PLANE.shape


def test_the_size_of_a_jpeg_with_its_tables() -> None:
    stream = cv2.imencode(".jpg", (PLANE >> 2).astype(np.uint8))[1].tobytes()
    assert stated_size(stream) == PLANE.shape


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8", b"\xff\x4f\xff\x51"]))
def test_anything_else_is_answered_too(rest: bytes, start: bytes) -> None:
    size = stated_size(start + rest)
    assert size is None or len(size) == 2


def test_an_image_that_unpacks_to_something_huge_is_refused_first(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dataset = make_slice(PLANE)
    dataset.compress(JPEGLSLossless)
    data = bytearray(dataset.PixelData)
    at = data.find(b"\xff\xf7")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    dataset.PixelData = bytes(data)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    (tmp_path / "x.dcm").write_bytes(file.getvalue())
    assert pydicom.dcmread(tmp_path / "x.dcm").Rows == PLANE.shape[0]
    with pytest.raises(InputError, match="65535 x 65535"):
        read_dicom(tmp_path / "x.dcm")


# What is made to take the machine


def encoded(stream: bytes | list[bytes], syntax: str, **values: int) -> bytes:
    """Return a DICOM file of one compressed stream, whatever that is."""
    dataset = make_slice(PLANE)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream] if isinstance(stream, bytes) else stream)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    for name, value in values.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def stated(stream: bytes, mark: bytes, offset: int, form: str = ">HH", side: int = 60000) -> bytes:
    """Return a stream that states another size at an offset from a marker."""
    changed = bytearray(stream)
    struct.pack_into(form, changed, changed.index(mark) + offset, side, side)
    return bytes(changed)


def jp2(stream: bytes, long: bool = False) -> bytes:
    """Return a JP2 file, as some wrap what DICOM wants bare."""

    def box(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I4s", len(data) + 8, kind) + data

    rows, columns = PLANE.shape
    size = struct.pack(">IIHBBBB", rows, columns, 1, 15, 7, 0, 0)
    head = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    colour = box(b"colr", b"\1\0\0" + struct.pack(">I", 17))
    head += box(b"jp2h", box(b"ihdr", size) + colour) + box(
        b"free", b"\xff\x4f\xff\x51" + bytes(40)
    )
    last = struct.pack(">I4sQ", 1, b"jp2c", len(stream) + 16) if long else struct.pack(">I", 0)
    return head + last + (b"" if long else b"jp2c") + stream


EIGHT = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
JPEG = cv2.imencode(".jpg", (PLANE >> 2).astype(np.uint8))[1].tobytes()
HUGE_JPEG = stated(JPEG, b"\xff\xc0", 5)
RUN = b"\x81\0"  # 128 zeros
OTHER_SIZE, NO_SIZE = (
    "its compressed data 60000 x 60000",
    "does not begin as an image of its transfer",
)


def rle(*segments: bytes) -> bytes:
    at = [64 + sum(map(len, segments[:i])) for i in range(len(segments))]
    return struct.pack("<16I", len(segments), *at, *[0] * (15 - len(at))) + b"".join(segments)


def bombs() -> dict[str, tuple[bytes, str]]:
    jpeg_2000, jpeg_ls = frame(JPEG2000Lossless), frame(JPEGLSLossless)
    huge = stated(jpeg_2000, b"\xff\x51", 6, ">II")
    start = JPEG.index(b"\xff\xc0")
    twice = JPEG[:start] + JPEG[start : start + 13] + HUGE_JPEG[start:]
    scan = JPEG[JPEG.rindex(b"\xff\xda") : -2]
    many = (RUN * 2**20)[: 2**21]
    return {
        "jpeg 2000": (encoded(huge, JPEG2000Lossless), OTHER_SIZE),
        "jp2": (encoded(jp2(huge), JPEG2000Lossless), OTHER_SIZE),
        "jp2 of 8 bytes": (encoded(jp2(huge, long=True), JPEG2000Lossless), OTHER_SIZE),
        "behind zeros": (encoded(bytes(4) + huge, JPEG2000Lossless), NO_SIZE),
        "nothing": (encoded(b"\xff\x4f\xff\x51", JPEG2000Lossless), NO_SIZE),
        "jpeg-ls": (encoded(stated(jpeg_ls, b"\xff\xf7", 5), JPEGLSLossless), OTHER_SIZE),
        "jpeg": (encoded(HUGE_JPEG, JPEGBaseline8Bit, **EIGHT), OTHER_SIZE),
        "two headers": (encoded(twice, JPEGBaseline8Bit, **EIGHT), OTHER_SIZE),
        "after junk": (
            encoded(b"\xff\xd8\0\0" + HUGE_JPEG[2:], JPEGBaseline8Bit, **EIGHT),
            NO_SIZE,
        ),
        "of another kind": (encoded(huge, JPEGBaseline8Bit, **EIGHT), OTHER_SIZE),
        "scans": (
            encoded(JPEG[:-2] + scan * 3000 + b"\xff\xd9", JPEGBaseline8Bit, **EIGHT),
            "3001 scans of one image",
        ),
        "rle": (encoded(rle(many, many), RLELossless), "much more than 70 x 48 pixels"),
        "rle of few bytes": (
            encoded(rle(RUN * 2**20, b"\0\0"), RLELossless, Rows=1100, Columns=1000),
            "much more than 1100 x 1000 pixels",
        ),
        "rows": (encoded(jpeg_2000, JPEG2000Lossless, Rows=60000, Columns=60000), "26.8 GiB"),
        "frames": (encoded(jpeg_2000, JPEG2000Lossless, NumberOfFrames=10**9), "1000000000 frames"),
        "some frames": (
            encoded(jpeg_2000, JPEG2000Lossless, NumberOfFrames=200_000),
            "declares 200000 frames, and its .* bytes cannot hold them",
        ),
        "bare frames": (bare(NumberOfFrames=200_000), "declares 200000 frames, and its"),
        "bare rows": (bare(Rows=60000, Columns=60000), "26.8 GiB"),
    }


def bare(**values: int) -> bytes:
    dataset = make_slice(PLANE)
    for name, value in values.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_the_machine_is_refused_before(tmp_path: Path, name: str) -> None:
    """By the header alone: no decoder gets it, some of which end the process."""
    data, match = BOMBS[name]
    (tmp_path / "x.dcm").write_bytes(data)
    began = process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match):
            read_dicom(tmp_path / "x.dcm")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert process_time() - began < 1.5  # tracing takes its part
    assert peak < 4 * len(data) + 2**23


@pytest.mark.parametrize("long", [False, True])
def test_a_jp2_file_within_is_read(tmp_path: Path, long: bool) -> None:
    data = encoded(jp2(frame(JPEG2000Lossless), long), JPEG2000Lossless)
    (tmp_path / "x.dcm").write_bytes(data)
    assert (read_dicom(tmp_path / "x.dcm").array[0] == PLANE).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_honest_rle_fits(seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    plane = rng.integers(0, 2 + seed % 60000, (side, 64)).astype(np.uint16)
    dataset = make_slice(plane)
    dataset.compress(RLELossless)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    assert rle_fits(stream, plane.size)
    singles = b"".join(bytes((0, value)) for value in plane.ravel().tolist() if value < 256)
    assert rle_fits(rle(singles), max(1, len(singles) // 2))


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_rle_is_answered(stream: bytes, size: int) -> None:
    assert rle_fits(stream, size) in (True, False)
