"""Append-only files of memories, memory-mapped for reading.

::

    memories/000001.shard
      0      header: magic, format version, layout, bytes per record (64 bytes used of 4096)
      4096   record 0: T x memory_dim fp16 tokens, pointer_dim fp32 pointer, padding to 64 bytes
             record 1: ...

A record's slot is never used again while its shard exists, so a reader with an older view of the
catalog never sees another exemplar's memory under a name it knows. Which slots are in use is the
catalog's business: bytes beyond them, left by a writer that died, are overwritten by the next.
Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import LibraryCorruptError, LibraryVersionError
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.storage import sync_directory, write_all, writing

__all__ = ["DEFAULT_SHARD_BYTES", "Place", "ShardReader", "ShardWriter", "record_bytes"]

MAGIC = b"RSEGMEM\0"
VERSION = 1
HEADER = struct.Struct("<8sIIIII")
HEADER_BYTES = 4096
ALIGNMENT = 64
DEFAULT_SHARD_BYTES = 1 << 30
"""A shard is closed when the next record would pass this: large enough that a big library needs few
open files, small enough to copy and compact."""


@dataclass(frozen=True)
class Place:
    """Where a memory lies: shard number and slot in it."""

    shard: int
    slot: int


def record_type(layout: MemoryLayout) -> np.dtype[Any]:
    """Return the structured dtype of one record, padding included."""
    tokens = layout.tokens * layout.memory_dim * 2
    pointer_at = -(-tokens // 4) * 4
    used = pointer_at + layout.pointer_dim * 4
    return np.dtype(
        {
            "names": ["tokens", "pointer"],
            "formats": [
                ("<f2", (layout.tokens, layout.memory_dim)),
                ("<f4", (layout.pointer_dim,)),
            ],
            "offsets": [0, pointer_at],
            "itemsize": -(-used // ALIGNMENT) * ALIGNMENT,
        }
    )


def record_bytes(layout: MemoryLayout) -> int:
    """Return the bytes that one memory takes on disk."""
    return record_type(layout).itemsize


def digest_record(tokens: NDArray[Any], pointer: NDArray[Any]) -> bytes:
    """Return the SHA-256 of a record's tokens and pointer, padding left out."""
    state = hashlib.sha256(np.ascontiguousarray(tokens, "<f2").data)
    state.update(np.ascontiguousarray(pointer, "<f4").data)
    return state.digest()


class ShardReader:
    """Memory maps of a library's shards, opened when they are first needed."""

    def __init__(self, folder: Path, layout: MemoryLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._type = record_type(layout)
        self._maps: dict[int, NDArray[Any]] = {}

    def record(self, place: Place) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Return views of the tokens (T x memory_dim) and the pointer at ``place``.

        Raises
        ------
        LibraryCorruptError
            If the shard is missing, cut off, or has another layout.
        LibraryVersionError
            If the shard's format is newer.
        """
        records = self._maps.get(place.shard)
        if records is None or place.slot >= len(
            records
        ):  # a writer has appended since it was mapped
            records = self._maps[place.shard] = self._map(place.shard)
            if place.slot >= len(records):
                raise LibraryCorruptError(
                    f"shard {shard_file(self._folder, place.shard)} is cut off: it holds "
                    f"{len(records)} memories, number {place.slot} is wanted. Restore it, or "
                    "rebuild the library with 'recallseg library rebuild'."
                )
        record = records[place.slot]
        return record["tokens"], record["pointer"]

    def _map(self, shard: int) -> NDArray[Any]:
        path = shard_file(self._folder, shard)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER.size)
                size = os.fstat(file.fileno()).st_size
                _check_header(path, header, self._layout)
                count = (size - HEADER_BYTES) // self._type.itemsize
                if count <= 0:
                    return np.empty(0, self._type)
                return np.memmap(file, self._type, "r", HEADER_BYTES, (count,))
        except OSError as error:
            raise LibraryCorruptError(
                f"shard {path} cannot be read: {error.strerror or error}. Restore it, or rebuild "
                "the library with 'recallseg library rebuild'."
            ) from error


class ShardWriter:
    """Appends memories. Nothing it writes counts before the catalog names it."""

    def __init__(
        self, folder: Path, layout: MemoryLayout, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._type = record_type(layout)
        self.capacity = max(1, (shard_bytes - HEADER_BYTES) // self._type.itemsize)

    def append(self, place: Place, tokens: NDArray[Any], pointer: NDArray[Any]) -> bytes:
        """Write a record at ``place`` and return its digest. :meth:`sync` makes it durable.

        Slot 0 begins a new shard, replacing what a writer that died may have left under its number.
        """
        record = np.zeros((), self._type)
        record["tokens"] = tokens
        record["pointer"] = pointer
        path = shard_file(self._folder, place.shard)
        with writing(path):
            if place.slot == 0:
                self._begin(path)
            descriptor = os.open(path, os.O_WRONLY)
            try:
                write_all(
                    descriptor, record.tobytes(), HEADER_BYTES + place.slot * self._type.itemsize
                )
            finally:
                os.close(descriptor)
        return digest_record(record["tokens"], record["pointer"])

    def sync(self, shard: int) -> None:
        """Return when everything appended to ``shard`` survives a power loss."""
        path = shard_file(self._folder, shard)
        with writing(path):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _begin(self, path: Path) -> None:
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self._layout.tokens,
            self._layout.memory_dim,
            self._layout.pointer_dim,
            self._type.itemsize,
        )
        path.parent.mkdir(exist_ok=True)
        # A new file, not the old one emptied: somebody may have it mapped.
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.write(header.ljust(HEADER_BYTES, b"\0"))
        sync_directory(path.parent)


def shard_file(folder: Path, shard: int) -> Path:
    """Return a shard's path from its number."""
    return folder / f"{shard:06d}.shard"


def _check_header(path: Path, header: bytes, layout: MemoryLayout) -> None:
    expected = (layout.tokens, layout.memory_dim, layout.pointer_dim, record_bytes(layout))
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise LibraryCorruptError(
            f"{path} is not a shard of memories. Restore it, or rebuild the library with "
            "'recallseg library rebuild'."
        )
    _, version, *found = HEADER.unpack(header)
    if version > VERSION:
        raise LibraryVersionError(
            f"{path} has shard format {version}; this RecallSeg reads up to {VERSION}. Update "
            "RecallSeg."
        )
    if tuple(found) != expected:
        raise LibraryCorruptError(
            f"{path} has layout {tuple(found)}, the catalog says {expected} (tokens, memory_dim, "
            "pointer, bytes per record). Restore it, or rebuild the library with 'recallseg "
            "library rebuild'."
        )
