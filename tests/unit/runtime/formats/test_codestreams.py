from __future__ import annotations

import io

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.encaps import generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless
from support.dicom_series import make_slice

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.codestreams import stated_size
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
