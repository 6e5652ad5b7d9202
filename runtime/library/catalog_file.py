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
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from recallseg.engines.errors import LibraryCorruptError

__all__ = ["check_catalog_file", "check_schema", "create_catalog_file"]

JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_JOURNAL = struct.Struct(">8sIIIII")  # magic, records, nonce, pages before, sector, page size
_HEADER_BYTES = 100
_WAL_VERSION = 2
MOST_BYTES = 2**38
"""A catalog of a hundred million exemplars; SQLite would make a file of 281 TB."""


def create_catalog_file(path: Path) -> None:
    """Make the empty file, for SQLite to fill, with the permissions of its folder.

    SQLite itself would make it readable for all, and would follow a link. What an interrupted
    creation left is taken.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(path, flags, path.parent.stat().st_mode & 0o666))
    check_catalog_file(path)


def check_catalog_file(path: Path) -> None:
    """Refuse what SQLite must not open.

    Raises
    ------
    LibraryCorruptError
        If catalog or journal is a link or no ordinary file, has a second name, or is too large;
        there is a write-ahead log, or the header asks for one; or the journal names other files.
    FileNotFoundError
        If there is no catalog.
    """
    size = _regular(path)
    for suffix in ("-wal", "-shm"):
        side = path.with_name(path.name + suffix)
        if os.path.lexists(side):
            raise _refused(
                side,
                "write-ahead logs belong to no library of RecallSeg. If another program wrote "
                "to the catalog, let that program close it",
            )
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) >= 20 and _WAL_VERSION in (header[18], header[19]):
        raise _refused(path, "it asks for a write-ahead log, which no library of RecallSeg has")
    journal = path.with_name(path.name + "-journal")
    if os.path.lexists(journal):
        _check_journal(journal, header, size)


def _check_journal(path: Path, catalog: bytes, catalog_bytes: int) -> None:
    size = _regular(path)
    with path.open("rb") as file:
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
