"""Append-only files of memories, memory-mapped for reading.

::

    memories/000001.shard
      0      header: magic, format version, layout, bytes per record (64 bytes used of 4096)
      4096   record 0: T x memory_dim fp16 tokens, pointer_dim fp32 pointer, padding to 64 bytes
             record 1: ...

A record of format version 2 (a library with int8 memories) is T x memory_dim int8 tokens, T fp32
scales and the pointer: a number is its int8 times its token's scale.

A record's slot is never used again while its shard exists, so a reader with an older view of the
catalog never sees another exemplar's memory under a name it knows. Which slots are in use is the
catalog's business: bytes beyond them, left by a writer that died, are overwritten by the next.
Numbers are little-endian.

What is read is what was stored: a record is compared with its digest when a process first reads
it, and again when the file has changed since. Before each read the file's size is looked at, so
that one that was cut short under a running process is an error. Reading by ``pread`` instead of
from the map would do without that look, and takes 1.5 times as long for 16 memories at 1024 px.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import LibraryCorruptError, LibraryVersionError
from recallseg.engines.inside import make_folder_inside, open_inside, remove_inside, sync_inside
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.storage import unreadable, write_all, writing
from recallseg.runtime.library.values import integer

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "MappedShard",
    "Place",
    "Record",
    "ShardReader",
    "ShardWriter",
    "pack",
    "record_bytes",
]

MAGIC = b"RSEGMEM\0"
VERSIONS = {"fp16": 1, "int8": 2}
"""Format version of a shard, by the format of its tokens."""
INT8_MAX = 127
HEADER = struct.Struct("<8sIIIII")
HEADER_BYTES = 4096
ALIGNMENT = 64
DEFAULT_SHARD_BYTES = 1 << 30
"""A shard is closed when the next record would pass this: large enough that a big library needs few
open files, small enough to copy and compact."""


Record = Any
"""A numpy scalar or 0-d array of :func:`record_type`, whose fields go by their names."""


@dataclass(frozen=True)
class Place:
    """Where a memory lies: shard number and slot in it."""

    shard: int
    slot: int

    def __post_init__(self) -> None:
        integer(self.shard, "the number of a shard", 1)
        integer(self.slot, "the slot of a memory")


def record_type(layout: MemoryLayout) -> np.dtype[Any]:
    """Return the structured dtype of one record, padding included."""
    number = "<f2" if layout.format == "fp16" else "i1"
    fields = {"tokens": np.dtype((number, (layout.tokens, layout.memory_dim)))}
    if layout.format == "int8":
        fields["scales"] = np.dtype(("<f4", (layout.tokens,)))
    fields["pointer"] = np.dtype(("<f4", (layout.pointer_dim,)))
    offsets, end = [], 0
    for field in fields.values():
        offsets.append(_rounded_up(end, 4))
        end = offsets[-1] + field.itemsize
    return np.dtype(
        {
            "names": [*fields],
            "formats": [*fields.values()],
            "offsets": offsets,
            "itemsize": _rounded_up(end, ALIGNMENT),
        }
    )


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def record_bytes(layout: MemoryLayout) -> int:
    """Return the bytes that one memory takes on disk."""
    return record_type(layout).itemsize


def pack(layout: MemoryLayout, tokens: NDArray[Any], pointer: NDArray[Any]) -> Record:
    """Return a record of tokens T x memory_dim and pointer C, floats rounded as stored.

    int8: each number is rounded to the nearest of 255 steps of its token's scale, which is the
    token's largest magnitude / 127. So it is off by half a scale at most.
    """
    record = np.zeros((), record_type(layout))
    record["pointer"] = pointer
    if layout.format == "fp16":
        record["tokens"] = tokens
        return record
    scales = np.abs(tokens).max(axis=1).astype(np.float32) / np.float32(INT8_MAX)
    # A token so small that its scale is subnormal may divide to more than 127.
    steps = np.divide(tokens, scales[:, None], out=np.zeros_like(tokens), where=scales[:, None] > 0)
    record["tokens"] = np.clip(np.rint(steps), -INT8_MAX, INT8_MAX)
    record["scales"] = scales
    return record


def digest_record(record: Record) -> bytes:
    """Return the SHA-256 of a record's fields, padding left out."""
    state = hashlib.sha256()
    for name in record.dtype.names or ():
        state.update(np.ascontiguousarray(record[name]).data)
    return state.digest()


class MappedShard:
    """One shard's records, mapped, with the file that they lie in."""

    def __init__(self, path: Path, descriptor: int, records: NDArray[Any]) -> None:
        self.path = path
        self.records = records
        self._descriptor = descriptor
        self._size = 0
        self._changed: tuple[int, int, int] | None = None
        self._intact: set[tuple[int, bytes]] = set()
        weakref.finalize(self, os.close, descriptor)

    @property
    def gone(self) -> bool:
        """Whether its file is no longer there under its name: nothing in use lies in it."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return True

    @property
    def memory_format(self) -> str:
        """How tokens are stored in it."""
        return "int8" if "scales" in (self.records.dtype.names or ()) else "fp16"

    def look(self) -> None:
        """Notice what became of the file since; call before records are read."""
        found = os.fstat(self._descriptor)
        changed = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if changed != self._changed:
            self._intact.clear()
            self._changed, self._size = changed, found.st_size

    def record(self, slot: int) -> Record:
        """Return a view of one record, as it is, after :meth:`look`."""
        end = HEADER_BYTES + (slot + 1) * self.records.itemsize
        if end > self._size:
            raise LibraryCorruptError(
                f"shard {self.path} is cut off: it has {self._size} bytes, memory number {slot} "
                f"ends at {end}. Restore it, or rebuild the library with 'recallseg library "
                "rebuild'."
            )
        return self.records[slot]

    def intact(self, slot: int, digest: bytes) -> bool:
        """Whether a record is what was stored, after :meth:`look`."""
        key = slot, digest
        if key not in self._intact:
            if digest_record(self.record(slot)) != digest:
                return False
            self._intact.add(key)
        return True


class ShardReader:
    """Memory maps of a library's shards, opened when they are first needed.

    One that was compacted away, by whichever process, is given up when the next is opened; what was
    recalled from it keeps it.
    """

    def __init__(self, folder: Path, layout: MemoryLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._type = record_type(layout)
        self._maps: dict[int, MappedShard] = {}

    def shard(self, place: Place) -> MappedShard:
        """Return the shard that has a record at ``place``.

        Raises
        ------
        LibraryCorruptError
            If the shard is missing, cut off, or has another layout.
        LibraryVersionError
            If the shard's format is newer.
        """
        mapped = self._maps.get(place.shard)
        if mapped is None or place.slot >= len(mapped.records):  # appended to since it was mapped
            for number in [number for number, other in self._maps.items() if other.gone]:
                del self._maps[number]
            mapped = self._maps[place.shard] = self._map(place.shard)
            if place.slot >= len(mapped.records):
                raise LibraryCorruptError(
                    f"shard {mapped.path} is cut off: it holds {len(mapped.records)} memories, "
                    f"number {place.slot} is wanted. Restore it, or rebuild the library with "
                    "'recallseg library rebuild'."
                )
        return mapped

    def record(self, place: Place) -> Record:
        """Return a view of what lies at ``place``: tokens T x memory_dim, pointer C, int8's scales.

        It is not compared with a digest. Errors are those of :meth:`shard`.
        """
        shard = self.shard(place)
        shard.look()
        return shard.record(place.slot)

    def _map(self, shard: int) -> MappedShard:
        path = shard_file(self._folder, shard)
        try:
            descriptor = _open(path)
            try:
                header = os.pread(descriptor, HEADER.size, 0)
                size = os.fstat(descriptor).st_size
                _check_header(path, header, self._layout)
                count = max(0, (size - HEADER_BYTES) // self._type.itemsize)
                records = np.empty(0, self._type)
                if count:
                    with os.fdopen(descriptor, "rb", closefd=False) as file:
                        records = np.memmap(file, self._type, "r", HEADER_BYTES, (count,))
                return MappedShard(path, descriptor, records)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            mend = "Restore it, or rebuild the library with 'recallseg library rebuild'."
            raise unreadable(f"shard {path}", error, mend) from error


class ShardWriter:
    """Appends memories. Nothing it writes counts before the catalog names it."""

    def __init__(
        self, folder: Path, layout: MemoryLayout, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self.layout = layout
        self._type = record_type(layout)
        self.capacity = max(1, (shard_bytes - HEADER_BYTES) // self._type.itemsize)

    def append(self, place: Place, record: Record) -> bytes:
        """Write a record at ``place`` and return its digest. :meth:`sync` makes it durable.

        Slot 0 begins a new shard, replacing what a writer that died may have left under its number.
        """
        path = shard_file(self._folder, place.shard)
        with writing(path):
            if place.slot == 0:
                self._begin(path)
            descriptor = _open(path, os.O_WRONLY)
            try:
                write_all(
                    descriptor, record.tobytes(), HEADER_BYTES + place.slot * self._type.itemsize
                )
            finally:
                os.close(descriptor)
        return digest_record(record)

    def sync(self, shard: int) -> None:
        """Return when everything appended to ``shard`` survives a power loss."""
        path = shard_file(self._folder, shard)
        with writing(path):
            descriptor = _open(path, os.O_WRONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _begin(self, path: Path) -> None:
        header = HEADER.pack(
            MAGIC,
            VERSIONS[self.layout.format],
            self.layout.tokens,
            self.layout.memory_dim,
            self.layout.pointer_dim,
            self._type.itemsize,
        )
        root, folder = path.parents[1], path.parent.name
        make_folder_inside(root, folder)
        # A new file, not the old one emptied: somebody may have it mapped.
        remove_inside(root, f"{folder}/{path.name}")
        with os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(header.ljust(HEADER_BYTES, b"\0"))
        sync_inside(root, folder)


def _open(path: Path, flags: int = os.O_RDONLY) -> int:
    return open_inside(path.parents[1], f"{path.parent.name}/{path.name}", flags)


def is_shard(name: str) -> bool:
    """Whether a file's name is one that :func:`shard_file` gives."""
    return re.fullmatch(r"[0-9]{6,19}\.shard", name) is not None


def shard_file(folder: Path, shard: int) -> Path:
    """Return a shard's path from its number."""
    return folder / f"{shard:06d}.shard"


def _check_header(path: Path, header: bytes, layout: MemoryLayout) -> None:
    expected = (
        VERSIONS[layout.format],
        layout.tokens,
        layout.memory_dim,
        layout.pointer_dim,
        record_bytes(layout),
    )
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise LibraryCorruptError(
            f"{path} is not a shard of memories. Restore it, or rebuild the library with "
            "'recallseg library rebuild'."
        )
    _, *found = HEADER.unpack(header)
    newest = max(VERSIONS.values())
    if found[0] > newest:
        raise LibraryVersionError(
            f"{path} has shard format {found[0]}; this RecallSeg reads up to {newest}. Update "
            "RecallSeg."
        )
    if tuple(found) != expected:
        raise LibraryCorruptError(
            f"{path} has layout {tuple(found)}, the catalog says {expected} (format, tokens, "
            "memory_dim, pointer, bytes per record). Restore it, or rebuild the library with "
            "'recallseg library rebuild'."
        )
