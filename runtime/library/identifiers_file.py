"""The file of identifiers: JSON lines of 0600, written over in place.

The secret, then a row for each exemplar that something is known of. A row that goes is written over
with spaces, from its first byte on: that takes no room on a full disk, and leaves nothing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recallseg.engines.errors import LibraryCorruptError, LibraryError, LibraryWriteError
from recallseg.engines.inside import open_inside, sync_inside
from recallseg.engines.ownership import foreign
from recallseg.engines.reading import is_there, reason
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library.storage import unreadable, write_all, writing

__all__ = ["IDENTIFIERS", "IdentifiersFile", "Identity", "Row"]

IDENTIFIERS = "identifiers.jsonl"
"""The file in a library's folder; whatever copies a library leaves it out."""
FORMAT_VERSION = 1
MOST_BYTES = 2**30
_SECRET_BYTES = 32
_TAIL = 2**16


@dataclass(frozen=True)
class Identity:
    """What a key stands for.

    Attributes
    ----------
    key : of the exemplar; it says nothing by itself.
    name : where the exemplar came from, e.g. its file; empty if that was not told.
    tags : values of its tags that are hashed in the library, by name.
    group : that it belongs to; empty if none.
    former : the key that it had before ``recallseg library anonymise``; empty if none.
    """

    key: str
    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    former: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", FrozenMap(self.tags))

    def __bool__(self) -> bool:
        return bool(self.name or self.tags or self.group or self.former)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "tags": dict(self.tags)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """Rebuild from :meth:`to_json`; ValueError for anything else."""
        texts = [data["key"], *(data.get(name, "") for name in ("name", "group", "former"))]
        tags = data.get("tags", {})
        if not isinstance(tags, dict) or not all(
            isinstance(text, str) for text in (*texts, *tags, *tags.values())
        ):
            raise ValueError("it has other values than texts")
        return cls(texts[0], texts[1], tags, texts[2], texts[3])


@dataclass(frozen=True)
class Row:
    """What a key stands for, and where in the file that is written."""

    identity: Identity
    offset: int
    size: int


class IdentifiersFile:
    """The file of one library, and what was read of it; who uses it takes turns.

    Parameters
    ----------
    folder : the library's.

    Attributes
    ----------
    secret : for keyed hashes; empty where there is none yet.
    rows : by key, the newest last; more than one after a crash.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / IDENTIFIERS
        self._folder = folder
        self._seen: tuple[int, ...] | None = None
        self.secret = b""
        self.rows: dict[str, list[Row]] = {}
        self._end = 0

    @property
    def exists(self) -> bool:
        """Whether the file is there; copies of a library have none."""
        try:
            return is_there(self.path)
        except OSError as error:
            raise unreadable(str(self.path), error, _MEND) from error

    def load(self) -> None:
        """Read the table if it is not the one that was read; none at all is an empty one."""
        try:
            with self._file(os.O_RDONLY) as descriptor:
                found = os.fstat(descriptor)
                if _state(found) == self._seen:
                    return
                if told := foreign(self.path, found, secret=True):
                    raise LibraryError(
                        f"a library's table of identifiers is its owner's alone. {told}"
                    )
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    data = file.read(min(found.st_size, MOST_BYTES) + 1)  # which it sets aside
        except FileNotFoundError:
            self.secret, self.rows, self._end, self._seen = b"", {}, 0, None
            return
        except OSError as error:
            raise unreadable(str(self.path), error, _MEND) from error
        try:
            self._parse(data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._seen = None
            raise LibraryCorruptError(
                f"{self.path} is damaged: {reason(error)}. {_MEND}"
            ) from error
        self._seen = _state(found)

    def _parse(self, data: bytes) -> None:
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        self.secret, self.rows, self._end = b"", {}, 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # its writer died; it was never acknowledged
            if not line.startswith(b" "):  # else it is being written over, or was
                row = json.loads(line)
                if self.secret:
                    identity = Identity.from_json(row)
                    place = Row(identity, self._end, len(line))
                    self.rows.setdefault(identity.key, []).append(place)
                else:
                    if row["format_version"] != FORMAT_VERSION:
                        raise ValueError(f"its format is {row['format_version']!r}")
                    self.secret = bytes.fromhex(row["secret"])
                    if len(self.secret) != _SECRET_BYTES:
                        raise ValueError(f"its secret has {len(self.secret)} bytes")
            self._end += len(line)
        if self._end and not self.secret:
            raise ValueError("it has no secret")

    def make(self) -> None:
        """Make the file with a new secret, where there is none; an unfinished one is finished."""
        if self.secret:
            return
        secret = secrets.token_bytes(_SECRET_BYTES)
        line = _line({"format_version": FORMAT_VERSION, "secret": secret.hex()})
        with self._changing(os.O_RDWR | os.O_CREAT) as descriptor:
            os.ftruncate(descriptor, 0)
            write_all(descriptor, line, 0)
            os.fsync(descriptor)
            sync_inside(self._folder)
            self.secret, self._end = secret, len(line)

    def append(self, identities: Sequence[Identity]) -> list[Row]:
        """Write rows, durably; the file is made where there is none."""
        if not identities:
            return []
        self.load()
        self.make()
        rows, lines, offset = [], [], self._end
        for identity in identities:
            lines.append(_line(identity.to_json()))
            rows.append(Row(identity, offset, len(lines[-1])))
            offset += len(lines[-1])
        if offset > MOST_BYTES:
            raise LibraryWriteError(
                f"{self.path} would have {offset} bytes, and at most {MOST_BYTES} are read again. "
                "Nothing was added. Make another library, or give shorter names."
            )
        with self._changing() as descriptor:
            os.ftruncate(descriptor, self._end)  # of a row whose writer died
            write_all(descriptor, b"".join(lines), self._end)
            os.fsync(descriptor)
            self._end = offset
        for row in rows:
            self.rows.setdefault(row.identity.key, []).append(row)
        return rows

    def of_keys(self, keys: Iterable[str]) -> list[Row]:
        """Return the rows of keys, of the file as it is now."""
        if not self.exists:
            return []
        self.load()
        return [row for key in keys for row in self.rows.get(key, ())]

    def forget(self, rows: Sequence[Row]) -> None:
        """Write spaces over rows: first bytes first, so that a row half gone is passed over."""
        if not rows:
            return
        with self._changing() as descriptor:
            for row in rows:
                write_all(descriptor, b" ", row.offset)
            os.fsync(descriptor)
            for row in rows:
                write_all(descriptor, b" " * (row.size - 1), row.offset)
            os.fsync(descriptor)
        for row in rows:
            left = self.rows[row.identity.key]
            left.remove(row)
            if not left:
                del self.rows[row.identity.key]

    def last_key(self) -> str | None:
        """Return the key of the last row, without reading others; None unless it ends with one."""
        try:
            with self._file(os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
            last = next(line for line in reversed(tail.splitlines()) if line.strip())
            key = json.loads(last)["key"]
            return key if tail.endswith(b"\n") and isinstance(key, str) else None
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError, OSError):
            return None

    def cut_off(self) -> None:
        """Drop what is behind the last whole row: its writer died."""
        with writing(self.path), self._file(os.O_RDWR) as descriptor:
            os.ftruncate(descriptor, self._end)

    @contextmanager
    def _changing(self, flags: int = os.O_RDWR) -> Iterator[int]:
        """Open the file to write, and take what it is afterwards for what was read."""
        with writing(self.path), self._file(flags) as descriptor:
            yield descriptor
            self._seen = _state(os.fstat(descriptor))

    @contextmanager
    def _file(self, flags: int) -> Iterator[int]:
        descriptor = open_inside(self._folder, IDENTIFIERS, flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


_MEND = (
    "Restore it from a backup. Without it the library works, but what its keys and hashed values "
    "stand for is lost; then remove the file, and run 'recallseg library anonymise'."
)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
