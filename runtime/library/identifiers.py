"""Who an exemplar is of, kept apart from everything that travels.

Keys, tags and groups of exemplars stand in records, pages, logs and audit entries of *other*
patients, and in every copy of a library. So a key says nothing, and what identifies is replaced by
a keyed hash: equal values stay equal within one library, and nobody without its secret can try
patients' numbers until one fits. What they stand for is in one file of the library, of 0600
whatever the folder's permissions, with the secret: copies are made without it.

The file is JSON lines: the secret, then a row for each exemplar that something is known of. Rows
are written before the catalog's commit, so a name is never lost; what a commit that failed left is
at the end, and is cleared when the library is next opened for writing. A row that goes is written
over with spaces, from its first byte on: that takes no room on a full disk, and leaves nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recallseg.engines.errors import InputError, LibraryCorruptError, LibraryError
from recallseg.engines.inside import open_inside, sync_inside
from recallseg.engines.ownership import foreign
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library.identifying import identifies
from recallseg.runtime.library.storage import unreadable, write_all, writing

if TYPE_CHECKING:
    from recallseg.runtime.library.catalog import Catalog

__all__ = [
    "IDENTIFIERS",
    "NOTE",
    "Identifiers",
    "Identity",
    "is_hashed",
]

IDENTIFIERS = "identifiers.jsonl"
"""The file in a library's folder; whatever copies a library leaves it out."""
NOTE = "identifiers"
"""The catalog's note: which secret hashed what is hashed in it."""
FORGET = "forget"
"""The catalog's note: the key of an exemplar that is removed, and whose row is to go now."""
FORMAT_VERSION = 1
MOST_BYTES = 2**30
_CONTEXT = b"recallseg-identifier-1\0"
_HASHED = re.compile("keyed:[0-9a-f]{64}")
_PREFIX, _AFTER = "keyed:", "keyed;"  # all that begins with the prefix sorts between the two
_SECRET_BYTES = 32
_TAIL = 2**16


def is_hashed(value: str) -> bool:
    """Whether a tag's value is a keyed hash already."""
    return _HASHED.fullmatch(value) is not None


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


class Identifiers:
    """The table of one library. It is read when it is first needed; one process writes it.

    Parameters
    ----------
    folder : the library's.
    catalog : the library's.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.path = folder / IDENTIFIERS
        self._folder = folder
        self._catalog = catalog
        self._lock = threading.RLock()
        self._seen: tuple[int, ...] | None = None
        self._secret = b""
        self._rows: dict[str, list[_Row]] = {}  # the newest last; more than one after a crash
        self._end = 0

    # What is known

    def of(self, key: str, tags: Mapping[str, str]) -> Identity:
        """Return what a key stands for, as far as it is known.

        Parameters
        ----------
        tags : as they are in the catalog: a value of the table that does not hash to what is there
            is of a change that was cut off, and is not told.

        Raises
        ------
        LibraryError
            If the table is not this user's alone, or damaged.
        """
        with self._lock:
            self._load()
            identities = [row.identity for row in reversed(self._rows.get(key, ()))]
            for told in identities:
                if all(self._stands(*tag, tags) for tag in told.tags.items()):
                    return told
        return replace(identities[0], tags={}) if identities else Identity(key)

    def _stands(self, name: str, value: str, tags: Mapping[str, str]) -> bool:
        return tags.get(name) == self._hash(f"tag {name}", value)

    def formerly(self, key: str) -> str | None:
        """Return the key of the exemplar that had this one before it was made anonymous."""
        with self._lock:
            self._load()
            told = (row.identity for rows in self._rows.values() for row in rows)
            return next((each.key for each in told if each.former == key), None)

    def knows(self, key: str) -> bool:
        """Whether anything is known of a key."""
        with self._lock:
            return bool(self._of_keys([key]))

    @property
    def exists(self) -> bool:
        """Whether the table is there; copies of a library have none."""
        return os.path.lexists(self.path)

    # Hashing

    def conceal(
        self, tags: Mapping[str, str], *, adding: bool = False, beside_clear: bool = False
    ) -> dict[str, str]:
        """Return tags with a keyed hash in place of each value that identifies.

        Parameters
        ----------
        tags : checked ones; values that are hashed already stay.
        adding : they are to be stored, so the secret is made where there is none.
        beside_clear : also where the library has such values in the clear, which equal ones would
            no longer be equal to.

        Raises
        ------
        InputError
            If the secret is not here, or the library has such values in the clear.
        """
        hashed = dict(tags)
        for name, value in tags.items():
            if identifies(name, value) and not is_hashed(value):
                if not beside_clear:
                    self._refuse_clear(name, value)
                hashed[name] = self.keyed_hash(f"tag {name}", value, adding=adding)
        return hashed

    def keyed_hash(self, kind: str, value: str, *, adding: bool = False) -> str:
        """Return ``keyed:`` and the HMAC-SHA256 of a value under the library's secret, as hex.

        Parameters
        ----------
        kind : of the value, e.g. ``group``; equal values of two kinds have different hashes.
        adding : it is to be stored: the secret is made where there is none, and the catalog is
            marked as one with hashed values.

        Raises
        ------
        InputError
            If the secret is not here.
        LibraryError
            If the table is not this user's alone, damaged, or cannot be written.
        """
        with self._lock:
            self._need_secret(adding)
            return self._hash(kind, value)

    def _hash(self, kind: str, value: str) -> str:
        message = _CONTEXT + kind.encode() + b"\0" + value.encode()
        return _PREFIX + hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def _refuse_clear(self, name: str, value: str) -> None:
        """Raise InputError if the library has such a value in the clear."""
        probes = [("value < ?", _PREFIX), ("value >= ?", _AFTER)]
        if not identifies(name, ""):
            probes = [("value = ?", value)]
        for condition, bound in probes:
            if self._catalog.database.execute(
                f"SELECT 1 FROM tags WHERE name = ? AND {condition} LIMIT 1",  # noqa: S608
                (name, bound),
            ):
                raise InputError(
                    f"the library {self._folder} has the tag '{name}' in the clear, from an "
                    "earlier RecallSeg; such values are hashed now. Run 'recallseg library "
                    "anonymise' on it once."
                )

    def _need_secret(self, adding: bool) -> None:
        self._load()
        noted = self._catalog.note(NOTE)
        if noted is None:
            if adding:
                self.adopt()
            elif not self._secret:
                raise InputError(
                    f"no exemplar of the library {self._folder} has a tag that identifies somebody."
                )
        elif noted != self._secret_id:
            whose = "is another library's" if self._secret else "is not here"
            raise InputError(
                f"values that identify are hashed in the library {self._folder}, and its table of "
                f"them ({IDENTIFIERS}) {whose}: copies are made without it. Ask for a value by its "
                "hash ('recallseg library list'). To add new ones, restore the table from a "
                "backup, or begin one of your own with 'recallseg library anonymise'."
            )

    @property
    def own(self) -> bool:
        """Whether what is hashed in the catalog is so with this table's secret."""
        with self._lock:
            self._load()
            return bool(self._secret) and self._catalog.note(NOTE) == self._secret_id

    @property
    def _secret_id(self) -> str:
        """What tells secrets apart, and says nothing of them."""
        return hashlib.sha256(_CONTEXT + self._secret).hexdigest()[:16]

    def adopt(self) -> None:
        """Note in the catalog that values in it are hashed with this table's secret."""
        with self._lock, self._catalog.database.transaction():
            self._load()
            self._make()
            self._catalog.database.upgrade()
            self._catalog.set_note(NOTE, self._secret_id)

    # Change

    @contextmanager
    def telling(
        self, identities: Sequence[Identity], *, instead: Iterable[str] = ()
    ) -> Iterator[None]:
        """Store what keys stand for, durably; the block then commits the exemplars.

        If it raises, what was told is forgotten; else what had been told of the same keys is, and
        of those that they take the place of.

        Raises
        ------
        LibraryWriteError
            If the table cannot be written.
        """
        keys = [*(identity.key for identity in identities), *instead]
        told = [identity for identity in identities if identity]
        with self._lock:
            before = self._of_keys(keys)
            now = self._append(told)
        try:
            yield
        except BaseException:
            with self._lock, suppress(LibraryError):  # or the next who opens it does
                self._forget(now)
            raise
        with self._lock:
            self._forget(before)

    def forget(self) -> None:
        """Forget what the key of an exemplar stood for that is removed: the catalog notes which."""
        key = self._catalog.note(FORGET)
        if key is not None:
            with self._lock:
                self._forget(self._of_keys([key]))
            self._catalog.set_note(FORGET, None)

    def clear_remains(self) -> None:
        """Forget what a writer that died told of exemplars that are not there."""
        self.forget()
        if not self.exists:
            return
        with self._lock:
            if self._ends_well():
                return
            self._load()
            unknown: list[_Row] = []
            for key, rows in reversed(self._rows.items()):
                if self._catalog.number(key) is not None:
                    break
                unknown += rows
            self._forget(unknown)
            with writing(self.path), self._file(os.O_RDWR) as descriptor:
                os.ftruncate(descriptor, self._end)

    def _ends_well(self) -> bool:
        """Whether the last row is of an exemplar that is there; a short look."""
        try:
            with self._file(os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
            last = next(line for line in reversed(tail.splitlines()) if line.strip())
            whole = tail.endswith(b"\n")
            return whole and self._catalog.number(json.loads(last)["key"]) is not None
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError, OSError):
            return False

    # The file

    def _load(self) -> None:
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
                    data = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            self._secret, self._rows, self._end, self._seen = b"", {}, 0, None
            return
        except OSError as error:
            raise unreadable(str(self.path), error, _MEND) from error
        try:
            self._parse(data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._seen = None
            raise LibraryCorruptError(f"{self.path} is damaged: {error!r}. {_MEND}") from error
        self._seen = _state(found)

    def _parse(self, data: bytes) -> None:
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        self._secret, self._rows, self._end = b"", {}, 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # its writer died; it was never acknowledged
            if not line.startswith(b" "):  # else it is being written over, or was
                row = json.loads(line)
                if self._secret:
                    identity = Identity.from_json(row)
                    place = _Row(identity, self._end, len(line))
                    self._rows.setdefault(identity.key, []).append(place)
                else:
                    if row["format_version"] != FORMAT_VERSION:
                        raise ValueError(f"its format is {row['format_version']!r}")
                    self._secret = bytes.fromhex(row["secret"])
                    if len(self._secret) != _SECRET_BYTES:
                        raise ValueError(f"its secret has {len(self._secret)} bytes")
            self._end += len(line)
        if self._end and not self._secret:
            raise ValueError("it has no secret")

    def _make(self) -> None:
        """Make the file with a new secret, where there is none; an unfinished one is finished."""
        if self._secret:
            return
        secret = secrets.token_bytes(_SECRET_BYTES)
        line = _line({"format_version": FORMAT_VERSION, "secret": secret.hex()})
        with self._changing(os.O_RDWR | os.O_CREAT) as descriptor:
            os.ftruncate(descriptor, 0)
            write_all(descriptor, line, 0)
            os.fsync(descriptor)
            sync_inside(self._folder)
            self._secret, self._end = secret, len(line)

    def _append(self, identities: Sequence[Identity]) -> list[_Row]:
        if not identities:
            return []
        self._load()
        self._make()
        rows, lines, offset = [], [], self._end
        for identity in identities:
            lines.append(_line(identity.to_json()))
            rows.append(_Row(identity, offset, len(lines[-1])))
            offset += len(lines[-1])
        with self._changing() as descriptor:
            os.ftruncate(descriptor, self._end)  # of a row whose writer died
            write_all(descriptor, b"".join(lines), self._end)
            os.fsync(descriptor)
            self._end = offset
        for row in rows:
            self._rows.setdefault(row.identity.key, []).append(row)
        return rows

    def _of_keys(self, keys: Iterable[str]) -> list[_Row]:
        if not self.exists:
            return []
        self._load()
        return [row for key in keys for row in self._rows.get(key, ())]

    def _forget(self, rows: Sequence[_Row]) -> None:
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
            left = self._rows[row.identity.key]
            left.remove(row)
            if not left:
                del self._rows[row.identity.key]

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


@dataclass(frozen=True)
class _Row:
    """What a key stands for, and where in the file that is written."""

    identity: Identity
    offset: int
    size: int


_MEND = (
    "Restore it from a backup. Without it the library works, but what its keys and hashed values "
    "stand for is lost; then remove the file, and run 'recallseg library anonymise'."
)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
