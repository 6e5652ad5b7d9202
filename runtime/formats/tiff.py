"""TIFF directories, read without decoding a pixel: of TIFF files, and of EXIF in JPEG and PNG.

TIFF 6.0 (Adobe, 1992); BigTIFF; EXIF 2.3. A damaged entry is left out, not an error: the decoder
has its say about the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MAGIC", "Directory", "directories", "replaced"]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_DIRECTORIES = 5000
_MOST_VALUES = 4096  # of one entry: strips of a large image are counted, never needed
_MOST_ENTRIES, _MOST_READ = 1000, 4_000_000  # of one directory; values of all of them together
_FORMS = {
    1: "B",
    2: "B",
    3: "H",
    4: "I",
    6: "b",
    7: "B",
    8: "h",
    9: "i",
    13: "I",
    16: "Q",
    17: "q",
    18: "Q",
}


@dataclass(frozen=True)
class Directory:
    """The tags of one page: whole numbers by tag, and where each value lies in the file."""

    values: dict[int, tuple[int, ...]]
    places: dict[int, tuple[int, str]]

    def first(self, tag: int, default: int) -> int:
        """Return the first value of a tag."""
        return next(iter(self.values.get(tag, ())), default)

    def text(self, tag: int) -> str:
        """Return a tag's value as text, as far as it is read."""
        return bytes(v & 0xFF for v in self.values.get(tag, ())).decode("latin-1")


def directories(data: bytes) -> Iterator[Directory]:
    """Yield the directories of a file in the order of their chain, as far as they can be read."""
    if not data.startswith(MAGIC):
        return
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in (data[2], data[3])
    offset, seen = 16 if big else 8, set[int]()
    try:
        (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        read = 0
        while offset and offset not in seen and len(seen) < MOST_DIRECTORIES and read < _MOST_READ:
            seen.add(offset)
            directory, following = _directory(data, offset, order, big)
            read += 100 + sum(map(len, directory.values.values()))
            yield directory
            (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, following)
    except struct.error:
        return


def replaced(data: bytes, directory: Directory, tag: int, value: int) -> bytes:
    """Return the file with the first value of one tag set to another."""
    place, form = directory.places[tag]
    changed = bytearray(data)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


def _directory(data: bytes, offset: int, order: str, big: bool) -> tuple[Directory, int]:
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    first, length, inline = (offset + 8, 20, 8) if big else (offset + 2, 12, 4)
    if count > _MOST_ENTRIES or first + length * count > len(data):
        raise struct.error("the directory is cut off")
    values: dict[int, tuple[int, ...]] = {}
    places: dict[int, tuple[int, str]] = {}
    seen: set[int] = set()
    for entry in range(first, first + length * count, length):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        (number,) = struct.unpack_from(order + ("Q" if big else "I"), data, entry + 4)
        form = _FORMS.get(kind)
        if tag in seen:  # the first one counts, as it does for the decoder
            continue
        seen.add(tag)
        if form is None or not number:
            continue
        place = entry + (12 if big else 8)
        if struct.calcsize(order + form) * number > inline:
            (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, place)
        try:
            read = min(number, _MOST_VALUES)
            values[tag] = struct.unpack_from(f"{order}{read}{form}", data, place)
        except struct.error:
            continue
        places[tag] = (place, order + form)
    return Directory(values, places), first + length * count
