"""What a compressed image says of its own size, asked before a decoder takes memory and time.

JPEG and JPEG-LS: ISO/IEC 10918-1 B.2.2 and 14495-1 C.2.2 (frame header); JPEG 2000: ISO/IEC 15444-1
A.5.1 (SIZ), also within a JP2 file (I.4); RLE: DICOM PS3.5 annex G.
"""

from __future__ import annotations

import struct

__all__ = ["MOST_SCANS", "rle_fits", "scans", "stated_size"]

MOST_SCANS = 32
"""Of a JPEG frame in DICOM: one for each colour, some ten of a progressive one. Each is as much
work as a whole image."""

_START = b"\xff\xd8"
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # without tables
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_SCAN, _END = 0xDA, 0xD9
_JPEG_2000 = b"\xff\x4f\xff\x51"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_SIZ = struct.Struct(">HHIIII")  # length, capabilities, extent x and y, offset x and y
_RLE_HEADER = struct.Struct("<16I")
_RLE_COUNTED = 2**20  # bytes of a segment, which may unpack to 64 times as many


def stated_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states; None if it does not.

    Of several frame headers before the first scan, the largest: decoders differ in which they take.

    Parameters
    ----------
    stream : one frame; only its headers are looked at.
    """
    if stream.startswith(_JP2):
        stream = _boxed(stream)
    if stream.startswith(_JPEG_2000):
        if len(stream) < len(_JPEG_2000) + _SIZ.size:
            return None
        _, _, width, height, left, top = _SIZ.unpack_from(stream, len(_JPEG_2000))
        return height - top, width - left
    if not stream.startswith(_START):
        return None
    at, sizes = len(_START), []
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _FRAME_HEADERS:
            sizes.append(struct.unpack_from(">HH", stream, at + 5))
        if marker in (_SCAN, _END):
            break
        # 0xFF before a marker is padding.
        at += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + _length(stream, at + 2)
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def scans(stream: bytes) -> int:
    """Return how many scans a JPEG or JPEG-LS stream has; 0 of another. Fast."""
    return stream.count(bytes((0xFF, _SCAN))) if stream.startswith(_START) else 0


def rle_fits(stream: bytes, size: int) -> bool:
    """Whether no segment of an RLE frame unpacks to much more than the bytes of a plane.

    The worst encoder takes two bytes for one. What is longer than that is refused, and what could
    still unpack to a lot is counted.
    """
    if len(stream) < _RLE_HEADER.size:
        return True  # which its decoder says
    count, *offsets = _RLE_HEADER.unpack_from(stream)
    ends = [*offsets[1:count], len(stream)]
    for start, end in zip(offsets[:count], ends, strict=False):
        length = end - start
        if length > 2 * size + _RLE_HEADER.size:
            return False
        if length > _RLE_COUNTED and _rle_length(stream, start, end, size) > size + 1:
            return False
    return True


def _rle_length(stream: bytes, at: int, end: int, size: int) -> int:
    """Return how many bytes a segment unpacks to; more than ``size`` are not counted further."""
    found = 0
    while at < end and found <= size + 1:
        head = stream[at]
        found += 257 - head if head > 128 else head + 1 if head < 128 else 0
        at += 2 if head > 128 else head + 2 if head < 128 else 1
    return found


def _boxed(stream: bytes) -> bytes:
    """Return the code stream in a JP2 file; nothing if there is none."""
    at = 0
    while at + 8 <= len(stream):
        length, kind = struct.unpack_from(">I4s", stream, at)
        head = 8
        if length == 1 and at + 16 <= len(stream):  # a length of 8 bytes follows
            (length,) = struct.unpack_from(">Q", stream, at + 8)
            head = 16
        if kind == b"jp2c":
            return stream[at + head :]
        if length < head:
            break
        at += length
    return b""


def _length(stream: bytes, at: int) -> int:
    (length,) = struct.unpack_from(">H", stream, at)
    return max(2, int(length))
