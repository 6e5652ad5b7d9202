"""What a file is packed with that is no image yet, by its first bytes or its name.

Nothing here unpacks: NIfTI in gzip and what NRRD files hold are, within limits, by their readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["HEAD_BYTES", "Packing", "packed_file", "packing", "packing_by_name"]

HEAD_BYTES = 8


class Packing(NamedTuple):
    """A way to pack files: its name, how they begin and end theirs, and what unpacks them."""

    name: str
    magic: bytes
    suffixes: tuple[str, ...]
    command: str

    @property
    def told(self) -> str:
        """What there is to say of such a file."""
        return f"packed with {self.name}: unpack it first ({self.command})"


_PACKINGS = (
    Packing("gzip", b"\x1f\x8b", (".gz", ".tgz"), "gunzip"),
    Packing("bzip2", b"BZh", (".bz2",), "bunzip2"),
    Packing("xz", b"\xfd7zXZ\0", (".xz",), "unxz"),
    Packing("Zstandard", b"\x28\xb5\x2f\xfd", (".zst",), "unzstd"),
    Packing("LZ4", b"\x04\x22\x4d\x18", (".lz4",), "unlz4"),
    Packing("lzip", b"LZIP", (".lz",), "lzip -d"),
    Packing("compress", b"\x1f\x9d", (".z",), "uncompress"),
    Packing("zip", b"PK\x03\x04", (".zip",), "unzip"),
    Packing("7-Zip", b"7z\xbc\xaf\x27\x1c", (".7z",), "7z x"),
)


def packing(head: bytes) -> Packing | None:
    """Return what a file is packed with that begins so; None if with nothing known."""
    return next((each for each in _PACKINGS if head.startswith(each.magic)), None)


def packing_by_name(path: Path) -> Packing | None:
    """Return what a file's name says that it is packed with; None if with nothing known."""
    name = path.name.lower()
    return next((each for each in _PACKINGS if name.endswith(each.suffixes)), None)


def packed_file(path: Path) -> Packing | None:
    """Return what a file is packed with; by its name where it cannot be looked into."""
    try:
        with path.open("rb") as file:
            return packing(file.read(HEAD_BYTES))
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return packing_by_name(path)
