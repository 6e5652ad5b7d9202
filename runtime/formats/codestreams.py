"""What a compressed image says of its own size, asked before a decoder takes memory and time.

JPEG and JPEG-LS: ISO/IEC 10918-1 B.2.2 and 14495-1 C.2.2 (frame header); JPEG 2000: ISO/IEC 15444-1
A.5.1 (SIZ).
"""

from __future__ import annotations

import struct

__all__ = ["stated_size"]

_START = b"\xff\xd8"
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # without tables
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_2000 = b"\xff\x4f\xff\x51"
_SIZ = struct.Struct(">HHIIII")  # length, capabilities, extent x and y, offset x and y


def stated_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states; None if it does not.

    Parameters
    ----------
    stream : one frame; only its headers are looked at.
    """
    if stream.startswith(_JPEG_2000):
        if len(stream) < len(_JPEG_2000) + _SIZ.size:
            return None
        _, _, width, height, left, top = _SIZ.unpack_from(stream, len(_JPEG_2000))
        return height - top, width - left
    if not stream.startswith(_START):
        return None
    at = len(_START)
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _FRAME_HEADERS:
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return rows, columns
        # 0xFF before a marker is padding.
        at += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + _length(stream, at + 2)
    return None


def _length(stream: bytes, at: int) -> int:
    (length,) = struct.unpack_from(">H", stream, at)
    return max(2, int(length))
