"""What a picture file says of itself, read without decoding a pixel.

Its size, and where it ends: a few kilobytes can declare billions of pixels, which are refused
before memory is set aside, and some decoders (OpenCV 4 with JPEG) fill what is missing of a file
that was cut off with grey. And what its values mean: OpenCV decides about orientation, inversion
and palettes by itself, of some formats and depths and not of others, so :func:`plain` leaves it
nothing to decide.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from recallseg.runtime.formats.tiff import (
    MAGIC,
    MOST_DIRECTORIES,
    Directory,
    directories,
    replaced,
)

__all__ = [
    "Meaning",
    "declared_bytes",
    "declared_size",
    "is_complete",
    "meaning",
    "most_parts",
    "plain",
]

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
MOST_SCANS, MOST_SCANNED = 500, 2**33
"""Of a progressive JPEG file, and pixels in all of them: 32 of the largest image. Encoders write
about ten."""
MOST_PARTS, MOST_DATA_PARTS = 5000, 2**20
"""Of a picture beside its pixels, and of a PNG file's pixels: encoders write 8 KiB into each."""
_PNG_DECODED = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_FILL = re.compile(b"\xff*")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG_GREY, _PNG_PALETTE, _PNG_GREY_ALPHA = 0, 3, 4
_REDUCED, _MASK = 1, 4  # kinds of TIFF page
# TIFF tags
_KIND, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 254, 256, 257, 258, 262
_DESCRIPTION, _ORIENTATION, _SAMPLES, _PLANAR, _EXTRA, _FORM = 270, 274, 277, 284, 338, 339
_COLOUR_MAP = 320
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_CHANNELS = {
    _WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _SEPARATED: 4, _YCBCR: 3,
}  # fmt: skip
_OPACITY = (1, 2)
_UNSIGNED, _SIGNED, _FLOATING = 1, 2, 3
_DEPTHS = {_UNSIGNED: (1, 2, 4, 8, 10, 12, 14, 16, 32), _SIGNED: (8, 16, 32), _FLOATING: (32, 64)}


@dataclass(frozen=True)
class Meaning:
    """What a picture's stored values mean.

    Attributes
    ----------
    orientation : as in EXIF and TIFF, 1 (as stored) to 8.
    inverted : whether 0 is white.
    palette : whether values are numbers of colours.
    grey : whether there is one channel, beside a possible opacity.
    bits : of a stored value.
    pages : images in the file; smaller copies of one do not count.
    unreadable : why the decoder would give wrong values; empty if it gives right ones.
    """

    orientation: int = 1
    inverted: bool = False
    palette: bool = False
    grey: bool = False
    bits: int = 8
    pages: int = 1
    unreadable: str = ""


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) that a PNG, JPEG, BMP or TIFF file declares.

    None when the format is another one or the header is cut off.
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
    except struct.error:
        return None
    page = next(directories(data), None)
    if page is None or not {_WIDTH, _HEIGHT} <= page.values.keys():
        return None
    return page.first(_HEIGHT, 0), page.first(_WIDTH, 0)


def declared_bytes(data: bytes) -> int:
    """Return the most bytes that one pixel of such a file takes once it is decoded."""
    if data.startswith(_PNG):
        depth, colour = data[24:25], data[25:26]
        return (2 if depth == b"\x10" else 1) * (1 if colour == b"\0" else 4)
    page = next(directories(data), None)
    if page is None:
        return 4
    return max(1, min(page.first(_BITS, 8), 64) // 8) * max(1, page.first(_SAMPLES, 1))


def most_parts(data: bytes) -> str:
    """Return what a file has more of than is read; empty if it has not.

    Each part beside the pixels is cheap to store, and work for whoever looks at it.
    """
    if data.startswith(_PNG):
        pixels = others = 0
        for name, _, _ in _png_chunks(data):
            pixels, others = pixels + (name == b"IDAT"), others + (name != b"IDAT")
            if others > MOST_PARTS:
                return f"more than {MOST_PARTS} chunks beside its pixels"
            if pixels > MOST_DATA_PARTS:
                return f"its pixels in more than {MOST_DATA_PARTS} chunks"
    elif data.startswith(_JPEG):
        if next(islice(_jpeg_segments(data), MOST_PARTS, None), None) is not None:
            return f"more than {MOST_PARTS} segments before its pixels"
        height, width = _jpeg_size(data) or (0, 0)
        scans = data.count(_JPEG_SCAN)
        if scans > MOST_SCANS or scans * height * width > MOST_SCANNED:
            return f"{scans} scans of {height}x{width} pixels, each as much work as a whole image"
    elif next(islice(directories(data), MOST_DIRECTORIES - 1, None), None) is not None:
        return f"{MOST_DIRECTORIES} pages or more"
    return ""


def is_complete(data: bytes) -> bool:
    """Whether a PNG or JPEG file has its end mark; True for other formats, whose decoders check."""
    if data.startswith(_PNG):
        return _PNG_END in data
    if data.startswith(_JPEG):  # after the last scan: an embedded preview has an end of its own
        return data.find(_JPEG_END, max(0, data.rfind(_JPEG_SCAN))) >= 0
    return True


def meaning(data: bytes) -> Meaning:
    """Return what the values of a PNG, JPEG, BMP or TIFF file mean."""
    if data.startswith(MAGIC):
        return _tiff_meaning(data)
    if data.startswith(_PNG):
        exif = next(
            (data[at + 8 : end - 4] for name, at, end in _png_chunks(data) if name == b"eXIf"), b""
        )
        bits, colours = data[24:25], data[25:26]
        kind = colours[0] if colours else 0
        return Meaning(
            _exif_orientation(exif),
            palette=kind == _PNG_PALETTE,
            grey=kind in (_PNG_GREY, _PNG_GREY_ALPHA),
            bits=bits[0] if bits else 8,
        )
    if data.startswith(_JPEG):
        return Meaning(_jpeg_orientation(data))
    if data.startswith(b"BM"):
        depth = int.from_bytes(data[28:30], "little")
        return Meaning(palette=depth <= 8, bits=depth)
    return Meaning()


def plain(data: bytes, *, numbers: bool = False) -> bytes:
    """Return the file with a header that leaves its decoder nothing to decide.

    Orientation and inversion are taken out of a TIFF header (those of JPEG and PNG are in EXIF,
    which ``IMREAD_UNCHANGED`` leaves alone), and from a PNG file whatever is not decoded: texts and
    colour profiles may unpack to gigabytes, and are looked at by nobody.

    Parameters
    ----------
    numbers : make each colour of a palette the grey of its own number, and opaque, so that the
        decoded picture holds the numbers.
    """
    if data.startswith(MAGIC):
        page = next(directories(data), None)
        if page is None:
            return data
        if page.first(_ORIENTATION, 1) != 1:
            data = replaced(data, page, _ORIENTATION, 1)
        if page.first(_PHOTOMETRIC, -1) == _WHITE_IS_ZERO:
            data = replaced(data, page, _PHOTOMETRIC, _BLACK_IS_ZERO)
        if numbers and page.first(_PHOTOMETRIC, -1) == _PALETTE:
            data = _tiff_numbers(data, page)
    elif data.startswith(_PNG):
        data = _plain_png(data, numbers)
    elif numbers and data.startswith(b"BM"):
        data = _bmp_numbers(data)
    return data


def _tiff_meaning(data: bytes) -> Meaning:
    every = list(directories(data))
    pages = [page for page in every if not page.first(_KIND, 0) & (_REDUCED | _MASK)]
    if not every:
        return Meaning()
    page, count = every[0], len(pages)
    described = page.text(_DESCRIPTION)
    if described.startswith("ImageJ=") and "\nimages=" in described:  # may hold all in one page
        number = described.partition("\nimages=")[2].split("\n")[0].strip()
        count = max(count, int(number) if number.isascii() and number.isdecimal() else 1)
    photometric = page.first(_PHOTOMETRIC, _BLACK_IS_ZERO)
    bits, form = page.first(_BITS, 1), page.first(_FORM, _UNSIGNED)
    return Meaning(
        page.first(_ORIENTATION, 1),
        photometric == _WHITE_IS_ZERO,
        photometric == _PALETTE,
        photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO),
        bits,
        count,
        _tiff_trouble(page, photometric, bits, form),
    )


def _tiff_trouble(page: Directory, photometric: int, bits: int, form: int) -> str:
    if page.first(_KIND, 0) & (_REDUCED | _MASK):
        return "its first image is a smaller copy of another; save that one alone"
    samples = page.first(_SAMPLES, 1)
    extra = page.values.get(_EXTRA, ())
    colours = _CHANNELS.get(photometric)
    if colours is None:
        return f"its colours are of a kind ({photometric}) that is not read; save it as RGB or grey"
    if samples != colours and not (
        photometric in (_RGB, _YCBCR) and samples == colours + 1 and extra and extra[0] in _OPACITY
    ):
        return f"it has {samples} channels, and which of them to take is not said; save one image"
    if photometric == _PALETTE:
        if bits not in (1, 2, 4, 8):
            return f"it has a palette of {bits} bits; save it with one of 8"
        _, form_of_colours = page.places.get(_COLOUR_MAP, (0, ""))
        if len(page.values.get(_COLOUR_MAP, ())) != 3 << bits or form_of_colours[1:] != "H":
            return f"its palette does not hold {1 << bits} colours; save it anew"
    if bits not in _DEPTHS.get(form, ()) or len(set(page.values.get(_BITS, (1,)))) > 1:
        kinds = {_UNSIGNED: "whole", _SIGNED: "signed", _FLOATING: "floating-point"}
        return (
            f"its values are {kinds.get(form, 'complex or undefined')} numbers of {bits} bits; "
            "save them with 8 or 16 bits, or as 32-bit floating-point"
        )
    if photometric != _PALETTE and bits in (2, 4):
        return f"its grey values have {bits} bits; save them with 8"
    if samples > 1 and page.first(_PLANAR, 1) != 1 and bits != 8:
        return "its channels lie one after the other (planar); save it with interleaved channels"
    if photometric == _WHITE_IS_ZERO and (form != _UNSIGNED or bits == 32):
        return "white is its zero, and which value is black cannot be told; save it inverted"
    return ""


def _tiff_numbers(data: bytes, page: Directory) -> bytes:
    place, form = page.places[_COLOUR_MAP]
    count = len(page.values[_COLOUR_MAP]) // 3
    ramp = [number * 257 for number in range(count)] * 3
    changed = bytearray(data)
    struct.pack_into(f"{form[0]}{len(ramp)}H", changed, place, *ramp)
    return bytes(changed)


def _plain_png(data: bytes, numbers: bool) -> bytes:
    parts, begin, position = [], 0, 8
    for name, at, end in _png_chunks(data):
        position = end
        if name in _PNG_DECODED and not (numbers and name in (b"PLTE", b"tRNS")):
            continue
        parts.append(data[begin:at])
        begin = end
        if numbers and name == b"PLTE":
            count = min(256, (end - at - 12) // 3)
            ramp = bytes(number for number in range(count) for _ in range(3))
            checked = zlib.crc32(name + ramp)
            parts += [struct.pack(">I", len(ramp)), name + ramp, struct.pack(">I", checked)]
    return b"".join([*parts, data[begin:position]]) if parts else data


def _bmp_numbers(data: bytes) -> bytes:
    try:
        (size,) = struct.unpack_from("<I", data, 14)
        (pixels,) = struct.unpack_from("<I", data, 10)
        (bits,) = struct.unpack_from("<H", data, 28)
    except struct.error:
        return data
    start = 14 + size
    count = min(1 << min(bits, 8), (pixels - start) // 4)  # colours, four bytes each
    if bits > 8 or size < 40 or count < 1 or start + 4 * count > len(data):
        return data
    ramp = b"".join(bytes((number, number, number, 0)) for number in range(count))
    return data[:start] + ramp + data[start + len(ramp) :]


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, begin, end) of each chunk, up to where the file is cut off."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            return
        yield data[position + 4 : position + 8], position, end
        position = end


def _exif_orientation(exif: bytes) -> int:
    page = next(directories(exif), None)
    return 1 if page is None else page.first(_ORIENTATION, 1)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, position, length) of each segment before the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        filled = _FILL.match(data, position)
        assert filled is not None
        position = filled.end() - 1
        if position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            yield marker, position, 0
            position += 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        yield marker, position, length
        if marker == _JPEG_SCAN[1] or length < 2:
            return
        position += 2 + length


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, position, _ in _jpeg_segments(data):
        if marker in _JPEG_FRAMES and position + 9 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 5)
            return height, width
    return None


def _jpeg_orientation(data: bytes) -> int:
    for marker, position, length in _jpeg_segments(data):
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _exif_orientation(data[position + 10 : position + 2 + length])
    return 1
