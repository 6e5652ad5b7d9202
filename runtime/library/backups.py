"""Copies of a whole library: made while it is in use, and put back.

A copy is a library itself. The catalog comes first, in one piece; files that it names never change
their contents, so only those that somebody removes meanwhile (a compaction, a removal) are missed,
and then there is a newer catalog to copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from recallseg.engines.durable import replace_folder
from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
)
from recallseg.engines.inside import make_folder_inside, open_inside
from recallseg.engines.reading import is_there
from recallseg.runtime.library import calibrations, maintenance
from recallseg.runtime.library.catalog import ADDING, Catalog
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.exemplar import LibraryReport
from recallseg.runtime.library.heads import Heads
from recallseg.runtime.library.identifiers_file import IDENTIFIERS
from recallseg.runtime.library.shards import shard_file
from recallseg.runtime.library.storage import WriterLock, unreadable, writing
from recallseg.runtime.library.store import CATALOG, LOCK, Store

__all__ = ["backup", "restore"]

_ATTEMPTS = 5
_PAGE = 1000
_BLOCK = 1 << 20

Progress = Callable[[int, int], None]


def backup(
    store: Store, target: Path, progress: Progress | None, *, images: bool = True
) -> LibraryReport:
    """Copy a library to a new folder, with its images or not, whatever is done to it meanwhile."""
    place = Path(os.path.realpath(target))
    if place.is_relative_to(os.path.realpath(store.path)):
        raise InputError(f"{target} lies in the library itself. Choose another folder.")
    with writing(target):
        used = is_there(target) and not (target.is_dir() and not any(target.iterdir()))
    if used:
        raise LibraryError(f"{target} is there already. Choose a folder that is not, or is empty.")
    with store.changing, writing(target), replace_folder(target) as work:
        return _copy(store, work, progress, images=images)


def restore(copy: Path, target: Path, *, over_newer: bool, progress: Progress | None) -> None:
    """Put a copy in the place of a library, or where there is none."""
    if os.path.realpath(copy) == os.path.realpath(target):
        raise InputError(f"{copy} is the library itself; name the folder of its backup.")
    store = Store.open(copy, "read")
    lock = None
    try:
        with writing(target):
            found = is_there(target) and (not target.is_dir() or any(target.iterdir()))
            another = found and not (target / CATALOG).is_file()
        if another:
            raise LibraryError(
                f"{target} holds something that is no library. Choose another folder."
            )
        if found:
            lock = WriterLock(target / LOCK)
            if not over_newer:
                _check_loses_nothing(store, target)
        with writing(target), replace_folder(target) as work:
            _copy(store, work, progress, what="restore")
            if found and is_there(target / IDENTIFIERS):
                _copy_file(target, work, IDENTIFIERS, again=False)  # backups are made without it
    finally:
        store.abandon()
        if lock is not None:
            lock.release()


def _check_loses_nothing(store: Store, target: Path) -> None:
    """Raise LibraryError if a library has what its backup has not."""
    mend = "Restore it to another folder; or over this one, if that shall go ('--over-newer')."
    try:
        there = Store.open(target, "read")
    except LibraryError as error:
        raise LibraryError(
            f"{target} cannot be read, so nobody can tell what would be lost: {error} {mend}"
        ) from error
    try:
        mine, theirs = _held(store), _held(there)
        lost = {*theirs.exemplars.items()} - {*mine.exemplars.items()}
        if lost:
            names = ", ".join(f"'{key}'" for key, _ in sorted(lost)[:5])
            names += ", ..." if len(lost) > 5 else ""
            raise LibraryError(
                f"{len(lost)} exemplars of the library {target} are not so in the backup "
                f"{store.path}, and would be lost: {names}. {mend}"
            )
        if there.state.revision > store.state.revision:
            raise LibraryError(
                f"the library {target} is newer than the backup {store.path}: its revision is "
                f"{there.state.revision}, not {store.state.revision}. What was removed or retired "
                f"since would come back. {mend}"
            )
        same = there.state.revision == store.state.revision
        others = [
            what
            for what, value in theirs.beside.items()
            if what not in mine.beside or (same and mine.beside[what] != value)
        ]
        if others:
            told = f"{'; '.join(others[:5])}{'; ...' if len(others) > 5 else ''}"
            raise LibraryError(
                f"the library {target} is not as in the backup {store.path} in what it has beside "
                f"images, and that would be lost: {told}. {mend}"
            )
    finally:
        there.abandon()


class _Held(NamedTuple):
    """Digests of exemplars by key; what else a library has, by what people call it."""

    exemplars: dict[str, bytes]
    beside: dict[str, object]


def _held(store: Store) -> _Held:
    found, after, catalog = _Held({}, {}), 0, store.catalog
    with catalog.database.snapshot():
        groups = catalog.groups()
        while page := catalog.exemplars(after, _PAGE):
            for number, one in page:
                found.exemplars[one.key] = catalog.exemplar_digest(number)
                found.beside[f"whether exemplar '{one.key}' is in use"] = not one.retired
                if number in groups:
                    found.beside[f"the group of exemplar '{one.key}'"] = groups[number]
            after = page[-1][0]
        for name, text in catalog.notes(calibrations.PREFIX):
            recipe, structure = calibrations.split_name(name)
            found.beside[f"the calibration of '{structure}' for recipe {recipe[:12]}"] = text
        if (mark := Heads(store).mark) is not None:
            found.beside["the head"] = mark
    return found


def _copy(
    store: Store, work: Path, progress: Progress | None, what: str = "", *, images: bool = True
) -> LibraryReport:
    """Fill an empty folder with a copy, and compare that with its digests.

    Raises
    ------
    LibraryCorruptError
        If the library is damaged, so that its copy would be.
    LibraryLockedError
        If others remove from it faster than it can be copied.
    """
    work.chmod(0o700)  # patients' images
    for _ in range(_ATTEMPTS):
        try:
            _copy_once(store, work, images)
            break
        except FileNotFoundError:  # removed since the catalog was copied, or lost
            (work / CATALOG).unlink()
    else:
        _copy_once_or_say(store, work, images)
    copied = Store.open(work, "write")
    try:
        maintenance.reclaim(copied)  # what an attempt before took, and is removed since
        if what:
            revision = str(copied.state.revision)
            with copied.catalog.change(what, details={"revision": revision}):
                pass  # which leaves it the revision of its backup
        report = maintenance.verify(copied, progress)
    finally:
        copied.abandon()
    if not report.ok:
        raise LibraryCorruptError(
            f"the library {store.path} is damaged, so no copy was made: "
            f"{'; '.join(report.problems[:3])}. Run 'recallseg library verify'."
        )
    (work / LOCK).unlink(missing_ok=True)
    return report


def _copy_once_or_say(store: Store, work: Path, images: bool) -> None:
    try:
        _copy_once(store, work, images)
    except FileNotFoundError as error:
        (work / CATALOG).unlink()
        lost = maintenance.verify(store, None).problems
        if lost:
            raise LibraryCorruptError(
                f"the library {store.path} is damaged, so no copy was made: {lost[0]}"
            ) from error
        raise LibraryLockedError(
            f"others remove exemplars of {store.path} faster than it is copied. Try again."
        ) from error


def _copy_once(store: Store, work: Path, images: bool) -> None:
    """Copy the catalog and all that it names; FileNotFoundError if some of that is gone."""
    store.catalog.database.copy(work / CATALOG)
    catalog = Catalog(Database.open(work / CATALOG, writable=True))
    try:
        with catalog.database.transaction():
            pending = catalog.state().generation
            for (generation,) in catalog.database.execute("SELECT DISTINCT generation FROM shards"):
                if generation != pending:
                    catalog.discard(generation)  # of a rebuild that is not done
            catalog.set_note("rebuild", None)
            catalog.set_note(ADDING, None)
            catalog.database.execute("DELETE FROM indexes")  # every machine builds its own
            if not images:
                catalog.database.execute("UPDATE exemplars SET source = NULL")
        for shard in catalog.shards():
            name = f"{store.memories.name}/{shard_file(store.memories, shard).name}"
            _copy_file(store.path, work, name, again=True)
        after = 0
        while page := catalog.exemplars(after, _PAGE):
            for number, one in page:
                if one.has_source:
                    name = store.sources.file(number).relative_to(store.path).as_posix()
                    _copy_file(store.path, work, name, again=False)
            after = page[-1][0]
    finally:
        catalog.database.close()


def _copy_file(root: Path, work: Path, name: str, *, again: bool) -> None:
    """Copy a file by its name; one that is there is kept, unless ``again``."""
    if not again and (work / name).exists():
        return
    try:
        descriptor = open_inside(root, name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(str(root / name), error, "Restore the file.") from error
    with os.fdopen(descriptor, "rb") as source:
        make_folder_inside(work, name.rpartition("/")[0])
        mode = os.fstat(descriptor).st_mode & 0o777
        made = open_inside(work, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(made, "wb") as target:
            while block := _read(source, root / name):
                target.write(block)


def _read(source: IO[bytes], path: Path) -> bytes:
    """Return the next block of a file of the library, which is not the one that is written."""
    try:
        return source.read(_BLOCK)
    except OSError as error:
        raise unreadable(str(path), error, "Restore the file.") from error
