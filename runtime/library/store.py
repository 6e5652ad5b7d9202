"""An open library's files, and the state of them that this process has seen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from recallseg.engines.digest import digest_json
from recallseg.engines.durable import make_folder
from recallseg.engines.errors import (
    InputError,
    LibraryError,
    LibraryMismatchError,
    LibraryNotFoundError,
    LibraryWriteError,
)
from recallseg.engines.ownership import foreign
from recallseg.engines.reading import is_there
from recallseg.runtime.forked import Opener, OwnLock
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.identifiers import Identifiers
from recallseg.runtime.library.identifiers_file import Identity
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.records import Settings, State, StructureRow
from recallseg.runtime.library.retrieval import Retrieval
from recallseg.runtime.library.shards import ShardReader, ShardWriter
from recallseg.runtime.library.sources import SourceStore
from recallseg.runtime.library.storage import WriterLock, unreadable, writing

__all__ = ["CATALOG", "INDEX", "LOCK", "MEMORIES", "SOURCES", "Store"]

CATALOG, LOCK, MEMORIES, SOURCES, INDEX = (
    "library.sqlite",
    "writer.lock",
    "memories",
    "sources",
    "index",
)

Value = TypeVar("Value")


class Store:
    """Everything of a library that is on the disk; what works on it takes ``lock`` meanwhile.

    Attributes
    ----------
    path : the library's folder.
    asked : what it was opened as: the folder, or a link to it.
    catalog, sources, identifiers, reader, writer, retrieval : its files.
    settings, state, structures : what the catalog said when it was last looked at.
    changing : held by whoever changes the library, while a model encodes too; taken before a turn
        of the model and before ``lock``.
    lock : held by whoever looks at the fields or the files, for moments; nothing is waited for
        meanwhile. Both may be taken again by the thread that has them.
    """

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        writer_lock: WriterLock | None,
        asked: Path | None = None,
    ) -> None:
        self.path, self.asked = path, asked or path
        self._file = _identity(path)
        self.catalog = catalog
        self.opener = Opener(f"the library {path}")
        self.changing, self.lock = OwnLock(self.opener), OwnLock(self.opener)
        self.sources = SourceStore(path / SOURCES)
        self.identifiers = Identifiers(path, catalog)
        self._writer_lock = writer_lock
        if writer_lock is not None:
            writer_lock.hold_room()
        self.load()

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Store:
        """Make an empty library in a new or empty folder, open for writing."""
        with writing(folder):
            if is_there(folder) and not folder.is_dir():
                raise LibraryError(f"{folder} is a file; a library needs a folder of its own.")
            make_folder(folder, mode=0o700)  # patients' images
            # An interrupted creation leaves an empty catalog, its journal and the lock.
            left = {item.name for item in folder.iterdir()} - {LOCK, CATALOG, CATALOG + "-journal"}
        if left:
            _refuse_second(folder, writable=False)
            raise LibraryError(
                f"{folder} is not empty: it holds '{sorted(left)[0]}'. Choose another folder."
            )
        lock = WriterLock(folder / LOCK)
        try:
            _refuse_second(folder, writable=True)
            return cls(folder, Catalog.create(folder / CATALOG, settings), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: Path, mode: Literal["read", "write"]) -> Store:
        """Open a library's folder."""
        if mode not in ("read", "write"):
            raise InputError(f"mode must be 'read' or 'write', got {mode!r}.")
        asked = folder
        with suppress(OSError, RuntimeError):  # no access, or a loop: said by the catalog below
            # Followed once: all files are of one library, wherever it points.
            folder = folder.resolve() if folder.is_symlink() else folder
        database = Database.open(folder / CATALOG, writable=mode == "write")
        lock = None
        try:
            _warn_of_others(folder)
            lock = WriterLock(folder / LOCK) if mode == "write" else None
            return cls(folder, Catalog(database), lock, asked)
        except BaseException:
            database.close()
            if lock is not None:
                lock.release()
            raise

    def load(self) -> None:
        """Read everything as it is now; after opening, and when it was encoded anew."""
        self.catalog.forget()
        with self.catalog.database.snapshot():  # of one state, and locked once
            self.settings = self.catalog.settings()
            self.state = self.catalog.state()
            self._commits = self.catalog.database.commits
            self.structures = {row.name: row for row in self.catalog.structures()}
            place, dimension = self.path / INDEX, self.settings.embedding_dim
            self.retrieval = Retrieval(self.catalog, place, dimension)
        self._origins: tuple[tuple[Origin | None, int], ...] | None = None
        self.reader = ShardReader(self.memories, self.settings.layout)
        self.writer = ShardWriter(self.memories, self.settings.layout, self.settings.shard_bytes)

    def close(self) -> None:
        """Save worn search indexes, close the files, let others write. Harmless if repeated.

        In a forked process nothing is saved: the library is its parent's.
        """
        if self.opener.elsewhere:
            self.abandon()
            return
        with self.changing, self.lock:
            try:
                if self.writable and self.catalog.database.is_open:
                    self.retrieval.save_worn()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close the files and let others write, whatever is unsaved."""
        self.catalog.database.close()
        if self._writer_lock is not None:
            self._writer_lock.release()

    @property
    def replaced(self) -> bool:
        """Whether another library, or none, is found now where this one was."""
        return _identity(self.asked) != self._file

    @property
    def memories(self) -> Path:
        """The folder of the shards."""
        return self.path / MEMORIES

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writer_lock is not None

    @property
    def digest(self) -> str:
        """Digest over exemplars and intensity rule, in the state seen: hex."""
        return digest_json(
            [dict(self.settings.intensity), self.state.exemplars, f"{self.state.digest_sum:x}"]
        )

    def origins(self) -> tuple[tuple[Origin | None, int], ...]:
        """Return what made the memories, and of how many exemplars; call within a snapshot."""
        if self._origins is None:
            self._origins = tuple(self.catalog.count_origins(self.state.generation))
        return self._origins

    def refresh(self) -> bool:
        """See what was committed since, by others or here; return whether there was anything."""
        with self.lock:
            return self.catalog.database.commits != self._commits and self.see_newest()

    def see_newest(self) -> bool:
        """See the newest state, or that of the snapshot in which this is called; as above."""
        with self.catalog.database.snapshot():
            commits, state = self.catalog.database.commits, self.catalog.state()
            changed = state != self.state
            if changed:
                self._see(state)
        self._commits = commits
        return changed

    def _see(self, state: State) -> None:
        """Read what belongs to a state; call within its snapshot."""
        settings = self.catalog.settings()
        if settings.identity != self.settings.identity:
            raise LibraryMismatchError(
                f"the library {self.path} has been rebuilt for bundle '{settings.bundle_name}' "
                "since it was opened. Open it again."
            )
        if state.generation != self.state.generation:
            self.catalog.forget()
        self.structures = {row.name: row for row in self.catalog.structures()}
        self.retrieval.refresh(state)
        self._origins = None
        self.state = state

    def structure(self, name: str) -> StructureRow:
        """Return a structure's row; raises InputError if no exemplar names it."""
        row = self.structures.get(name)
        if row is None:
            known = ", ".join(self.structures) or "none yet"
            raise InputError(f"no exemplar is annotated for '{name}'; the library knows: {known}.")
        return row

    def number(self, key: str) -> int:
        """Return an exemplar's number; raises InputError if there is no such key."""
        number = self.catalog.number(key)
        if number is None:
            raise unknown_key(key)
        return number

    def whois(self, key: str) -> Identity:
        """Return what a key stands for, or one that it had; raises InputError if there is none."""
        exemplar = self.catalog.exemplar(key)
        if exemplar is None:
            now = self.identifiers.formerly(key)
            exemplar = None if now is None else self.catalog.exemplar(now)
        if exemplar is None:
            raise unknown_key(key)
        return self.identifiers.of(exemplar.key, exemplar.tags)

    def on_a_full_disk(self, change: Callable[[], Value]) -> Value:
        """Make a change that must be possible on a full disk, with the room held back for it.

        An error may come when all is committed, and what is done is not done again.
        """
        before = self.catalog.state().revision
        try:
            return change()
        except LibraryWriteError:
            if self.catalog.state().revision != before:
                raise
            if self._writer_lock is None or not self._writer_lock.give_room():
                raise
            try:
                return change()
            finally:
                self._writer_lock.hold_room()

    def check_writable(self, what: str) -> None:
        """Raise LibraryWriteError if it was opened for reading, ForkedError by another process."""
        self.opener.check()
        if not self.writable:
            raise LibraryWriteError(
                f"cannot {what}: the library {self.path} is open for reading. Open it with "
                "mode='write'."
            )


def _warn_of_others(folder: Path) -> None:
    """Warn of a library that somebody else could change: it may be shared on purpose."""
    try:
        found, catalog = folder.stat(), (folder / CATALOG).lstat()
    except OSError as error:
        raise unreadable(str(folder), error, "Restore it from a backup.") from error
    told = foreign(folder, found)
    if not told:
        told = foreign(folder / CATALOG, catalog, closed=not found.st_mode & 0o011)
    if told:
        warnings.warn(
            f"what the library {folder} recalls is not yours alone to say: {told}. If it is shared "
            "on purpose, that is whom you trust.",
            RuntimeWarning,
            stacklevel=4,
        )


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return which file a folder's catalog is; None if there is none."""
    try:
        found = os.stat(folder / CATALOG)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_second(folder: Path, *, writable: bool) -> None:
    """Raise LibraryError if there is a library; what an interrupted creation left may stay."""
    with writing(folder):
        there = is_there(folder / CATALOG)
    if there:
        try:
            database = Database.open(folder / CATALOG, writable=writable)
        except LibraryNotFoundError:
            return
        try:
            catalog = Catalog(database)
            count, made_by = catalog.state().exemplars, catalog.settings().bundle_name
        finally:
            database.close()
        raise LibraryError(
            f"there is a library in {folder} already: {count} exemplars, made with bundle "
            f"'{made_by}'. Open it (to add to it, with mode='write'), or choose another folder."
        )
