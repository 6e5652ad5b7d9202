"""What an image file says of itself, read without decoding a pixel: its size, and where it ends.

A few kilobytes can declare billions of pixels; they are refused before memory is set aside. And
some decoders (OpenCV 4 with JPEG) fill what is missing of a file that was cut off with grey.
"""

from __future__ import annotations

import struct

__all__ = ["declared_size", "is_complete"]

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_SHORT = 3


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) that a PNG, JPEG, BMP or TIFF file declares.

    None when the format is another one or the header is cut off: the decoder then has its say.
    """
    try:
        if data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        if data.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(height), abs(width)
        if data.startswith(_JPEG):
            return _jpeg_size(data)
        if data.startswith((b"II*\0", b"MM\0*")):
            return _tiff_size(data)
    except struct.error:
        return None
    return None


def is_complete(data: bytes) -> bool:
    """Whether a PNG or JPEG file has its end mark; True for other formats, whose decoders check."""
    if data.startswith(_PNG):
        return _PNG_END in data
    if data.startswith(_JPEG):  # after the last scan: an embedded preview has an end of its own
        return data.find(_JPEG_END, max(0, data.rfind(_JPEG_SCAN))) >= 0
    return True


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    position = 2
    while True:
        if data[position : position + 1] != b"\xff":
            return None
        (marker,) = struct.unpack_from(">B", data, position + 1)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return height, width
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # fill, or without a length
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int(struct.unpack_from(">H", data, position + 2)[0])


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    found = {}
    for i in range(count):
        entry = directory + 2 + 12 * i
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT):
            form = "H" if kind == _TIFF_SHORT else "I"
            (found[tag],) = struct.unpack_from(f"{order}{form}", data, entry + 8)
    if len(found) < 2:
        return None
    return found[_TIFF_HEIGHT], found[_TIFF_WIDTH]
