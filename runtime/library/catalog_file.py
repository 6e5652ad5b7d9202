"""What a catalog must be before SQLite opens it, and what may stand in it.

A received library cannot be told from one's own: what was unpacked belongs to who unpacked it. So
one rule holds for all. What SQLite does with a file it did not write, merely to read it: it follows
a link; it takes pages from a write-ahead log; it rolls a journal back, and where that names a
super-journal it *deletes* the files that are named. Ours never has a write-ahead log or a
super-journal. An ordinary journal is left to SQLite, because a commit that was cut off must be
undone: it can only change the catalog, which its sender wrote anyway.
https://www.sqlite.org/fileformat2.html, sections 1.3 and 3.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from recallseg.engines.errors import LibraryCorruptError
from recallseg.engines.reading import is_there, naming

__all__ = ["Hold", "check_schema", "hold_catalog_file"]

JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_JOURNAL = struct.Struct(">8sIIIII")  # magic, records, nonce, pages before, sector, page size
_HEADER_BYTES = 100
_WAL_VERSION = 2
_BLOCK = 2**20
MOST_BYTES = 2**38
"""A catalog of a hundred million exemplars; SQLite would make a file of 281 TB."""


class Hold:
    """A hold of this process on a catalog, given back when a connection to it is closed.

    Closing any descriptor of a file gives up every POSIX lock that the process has on it, SQLite's
    own included (https://www.sqlite.org/howtocorrupt.html, 2.2). Another process would then take a
    commit that is under way for one that was cut off, and undo it. So a catalog is not just opened
    and closed: what this process opened of it is closed when nothing holds it any more.

    Parameters
    ----------
    path : of the catalog; a link is refused.
    mode : permissions of the file that is made if there is none; None: there must be one.

    Raises
    ------
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: Path, mode: int | None = None) -> None:
        try:
            with _guard:
                try:
                    key = _key(os.lstat(path))
                except FileNotFoundError:
                    key = None
                if key not in _open:
                    key = self._add(path, mode)
                self._key, self._file = key, _open[key]
                self._file.holds += 1
        finally:
            _close_what_nothing_holds()

    @staticmethod
    def _add(path: Path, mode: int | None) -> tuple[int, int]:
        flags = os.O_RDONLY if mode is None else os.O_RDWR | os.O_CREAT
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, mode or 0)
        key = _key(os.fstat(descriptor))
        _open.setdefault(key, _Open()).descriptors.append(descriptor)
        return key

    def header(self) -> bytes:
        """Return the first 100 bytes, fewer of a shorter file."""
        return os.pread(self._file.descriptors[0], _HEADER_BYTES, 0)

    @property
    def bytes(self) -> int:
        """How many it has now; 0 if nothing was ever written to it."""
        return os.fstat(self._file.descriptors[0]).st_size

    def read_through(self) -> None:
        """Read all of it; OSError as the system gives it."""
        place = 0
        while part := os.pread(self._file.descriptors[0], _BLOCK, place):
            place += len(part)

    def give_back(self) -> None:
        """Close what was opened, unless others of this process hold the file; call once.

        It waits for nothing: the garbage collector may call it while this thread has the guard.
        """
        _given_back.append((self._key, self._file))
        _close_what_nothing_holds()


@dataclass
class _Open:
    """A file: one descriptor, or more if it was put in another's place while that was opened."""

    descriptors: list[int] = field(default_factory=list)
    holds: int = 0


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


_guard = threading.Lock()
_open: dict[tuple[int, int] | None, _Open] = {}
_given_back: deque[tuple[tuple[int, int] | None, _Open]] = deque()


def _close_what_nothing_holds() -> None:
    """Count what was given back; whoever has the guard meanwhile does it when done."""
    while _given_back and _guard.acquire(blocking=False):
        try:
            while _given_back:
                key, file = _given_back.popleft()
                file.holds -= 1
                if not file.holds:
                    del _open[key]
                    for descriptor in file.descriptors:
                        os.close(descriptor)
        finally:
            _guard.release()


def _begin_anew() -> None:
    """In a forked process: holds are its parent's, and the lock may be a thread's that is gone."""
    global _guard
    _guard = threading.Lock()
    _open.clear()
    _given_back.clear()


os.register_at_fork(after_in_child=_begin_anew)


def hold_catalog_file(path: Path, *, create: bool = False) -> Hold:
    """Check a catalog that SQLite is to open, and hold it.

    Parameters
    ----------
    create : make the empty file, with the permissions of its folder: SQLite itself would make it
        readable for all, and would follow a link. What an interrupted creation left is taken.

    Raises
    ------
    LibraryCorruptError
        If catalog or journal is a link or no ordinary file, has a second name, or is too large;
        there is a write-ahead log, or the header asks for one; or the journal names other files.
    OSError
        If there is none, or it cannot be opened.
    """
    if not create:
        _regular(path)  # says more than that it cannot be opened
    hold = Hold(path, path.parent.stat().st_mode & 0o666 if create else None)
    try:
        _check(path, hold.header())
    except BaseException:
        hold.give_back()
        raise
    return hold


def _check(path: Path, header: bytes) -> None:
    size = _regular(path)
    for suffix in ("-wal", "-shm"):
        side = path.with_name(path.name + suffix)
        if is_there(side):
            raise _refused(
                side,
                "write-ahead logs belong to no library of RecallSeg. If another program wrote "
                "to the catalog, let that program close it",
            )
    if len(header) >= 20 and _WAL_VERSION in (header[18], header[19]):
        raise _refused(path, "it asks for a write-ahead log, which no library of RecallSeg has")
    journal = path.with_name(path.name + "-journal")
    with suppress(FileNotFoundError):  # there is none, or its writer has committed meanwhile
        _check_journal(journal, header, size)


def _check_journal(path: Path, catalog: bytes, catalog_bytes: int) -> None:
    size = _regular(path)
    with naming(path), path.open("rb") as file:
        head = file.read(_JOURNAL.size)
        file.seek(max(0, size - 16))
        tail = file.read(16)
    # ... name, its length, its checksum, the magic: section 3, "super-journal".
    if len(tail) == 16 and tail.endswith(JOURNAL_MAGIC):
        raise _refused(path, "it names another journal, which SQLite would read and then delete")
    if len(head) < _JOURNAL.size or not head.startswith(JOURNAL_MAGIC):
        return  # not hot: SQLite passes it over
    _, _, _, pages, _, page_size = _JOURNAL.unpack(head)
    stated = struct.unpack_from(">H", catalog, 16)[0] if len(catalog) >= 18 else 0
    stated = 65536 if stated == 1 else stated
    if not stated and not pages:
        return  # the power was cut while it was made: its first page came later than others
    if catalog_bytes and (page_size != stated or pages * page_size > catalog_bytes + size):
        raise _refused(
            path,
            f"it would make {pages} pages of {page_size} bytes of a catalog of {catalog_bytes} "
            f"bytes in pages of {stated}",
        )


def check_schema(path: Path, found: Iterable[tuple[str, str, str, str | None]], ours: str) -> None:
    """Refuse anything in a catalog that this package did not put there.

    Parameters
    ----------
    found : type, name, table and SQL of every object, from ``sqlite_master``.
    ours : the statements that make a catalog.

    Raises
    ------
    LibraryCorruptError
        Naming the first trigger, view, table or index that is none of ours.
    """
    known = _statements(ours)
    for kind, name, table, sql in found:
        automatic = sql is None and kind == "index" and name == f"sqlite_autoindex_{table}_1"
        if not automatic and (kind not in ("table", "index") or _normal(sql or "") not in known):
            raise _refused(path, f"it has the {kind} '{name}', which RecallSeg did not make")


@cache
def _statements(ours: str) -> frozenset[str]:
    """Return the statements that make a catalog, and the one that SQLite adds."""
    known = {_normal(statement) for statement in re.sub(r"--[^\n]*", "", ours).split(";")}
    return frozenset(known | {"CREATE TABLE sqlite_sequence(name,seq)"})


def _normal(statement: str) -> str:
    return " ".join(statement.split())


def _regular(path: Path) -> int:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, "it is a link or no ordinary file")
    if found.st_nlink > 1:
        raise _refused(path, f"it has {found.st_nlink} names (hard links)")
    if found.st_size > MOST_BYTES:
        raise _refused(path, f"it has {found.st_size} bytes")
    return found.st_size


def _refused(path: Path, why: str) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"{path} is not opened: {why}. Ask for the library anew from who made it, or restore it "
        "from a backup."
    )
