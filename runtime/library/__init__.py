"""A library: annotated images, encoded once, found again by similarity.

::

    LIBRARY/
      library.sqlite             the only truth: exemplars, structures, embeddings, tags, digests
      memories/NNNNNN.shard      memory tokens and object pointers, append-only, memory-mapped
      sources/NNNNNN/*.npz       images and masks as they were added, unless told not to keep them
      index/*.usearch            derived; may be deleted at any time
      writer.lock                held by the one process that writes
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import (
    InputError,
    LibraryError,
    LibraryNotFoundError,
)
from recallseg.runtime.library import maintenance
from recallseg.runtime.library.binding import (
    accept_bundle,
    bundle_settings,
    encoder_maker,
    open_bundle,
)
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.changing import LibraryChanging
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import MEMORY_FORMATS, ExemplarEncoder
from recallseg.runtime.library.reading import CATALOG, LOCK, MEMORIES
from recallseg.runtime.library.records import Settings
from recallseg.runtime.library.shards import DEFAULT_SHARD_BYTES
from recallseg.runtime.library.storage import WriterLock, writing
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["Library"]


class Library(LibraryChanging):
    """An open library. Make one with :meth:`create` or :meth:`open`; close it, or use ``with``.

    Any number of processes may read while one writes. Every method sees what others have committed.
    One object may be shared between threads.
    """

    @classmethod
    def create(
        cls,
        path: str | Path,
        bundle: Bundle | str | Path,
        *,
        intensity: Intensity | None = None,
        keep_sources: bool = True,
        memory_format: str = "fp16",
        encoder: ExemplarEncoder | None = None,
        engine: str = "onnxruntime-cpu",
        precision: str = "fp32",
        threads: int | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> Library:
        """Make an empty library in a new or empty folder, open for writing.

        Parameters
        ----------
        path : folder.
        bundle : whose encoders this library belongs to.
        intensity : rule from pixel values to 0..1, for exemplars and queries alike.
        keep_sources : store images and masks too; without them it cannot be rebuilt or calibrated.
        memory_format : ``fp16``, or ``int8`` with a scale per token: about half the bytes, rounded
            to 1/127 of the token's largest number.
        encoder : used instead of the bundle's own.
        engine, precision, threads : of the bundle's own encoder, which is loaded when first needed.
        shard_bytes : about how large a file of memories gets.

        Raises
        ------
        InputError
            If there is no such ``memory_format``.
        LibraryError
            If the folder holds something already.
        LibraryWriteError, LibraryLockedError, BundleError
        """
        if memory_format not in MEMORY_FORMATS:
            raise InputError(
                f"memory_format must be one of {', '.join(MEMORY_FORMATS)}, got {memory_format!r}."
            )
        folder, opened = Path(path), open_bundle(bundle)
        with writing(folder):
            if folder.exists() and not folder.is_dir():
                raise LibraryError(f"{folder} is a file; a library needs a folder of its own.")
            folder.mkdir(parents=True, exist_ok=True)
            # An interrupted creation leaves an empty catalog, its journal and the lock.
            left = {item.name for item in folder.iterdir()} - {LOCK, CATALOG, CATALOG + "-journal"}
        if left:
            raise LibraryError(
                f"{folder} is not empty: it holds '{sorted(left)[0]}'. Open the library there, or "
                "choose another folder."
            )
        lock = WriterLock(folder / LOCK)
        try:
            _refuse_second(folder)
            settings = Settings(
                **bundle_settings(opened, memory_format),
                intensity=(intensity or Intensity()).to_json(),
                keep_sources=keep_sources,
                shard_bytes=shard_bytes,
            )
            catalog = Catalog.create(folder / CATALOG, settings)
        except BaseException:
            lock.release()
            raise
        maker = encoder_maker(engine, precision, threads)
        return cls(folder, catalog, lock, opened, encoder, maker)

    @classmethod
    def open(
        cls,
        path: str | Path,
        bundle: Bundle | str | Path | None = None,
        *,
        mode: Literal["read", "write"] = "read",
        encoder: ExemplarEncoder | None = None,
        engine: str = "onnxruntime-cpu",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> Library:
        """Open a library.

        Parameters
        ----------
        path : folder.
        bundle : None for the one it was made with, which is looked for when it is first needed, at
            its old place and then by its name.
        mode : ``write`` to add, remove, rebuild or calibrate; one process at a time.
        encoder, engine, precision, threads : as for :meth:`create`.

        Raises
        ------
        LibraryNotFoundError, LibraryVersionError, LibraryCorruptError
            If there is none, a newer RecallSeg wrote it, or it is damaged.
        LibraryMismatchError
            If it was made with another bundle.
        LibraryLockedError, LibraryWriteError
            If another process is writing, or the folder cannot be written; with ``write`` only.
        """
        if mode not in ("read", "write"):
            raise InputError(f"mode must be 'read' or 'write', got {mode!r}.")
        folder = Path(path)
        database = Database.open(folder / CATALOG, writable=mode == "write")
        lock = None
        try:
            lock = WriterLock(folder / LOCK) if mode == "write" else None
            maker = encoder_maker(engine, precision, threads)
            library = cls(folder, Catalog(database), lock, None, encoder, maker)
            if bundle is not None:
                library._bundle = accept_bundle(open_bundle(bundle), library._settings, folder)
            if lock is not None:
                maintenance.reclaim(library._catalog, library._sources, folder / MEMORIES)
        except BaseException:
            database.close()
            if lock is not None:
                lock.release()
            raise
        return library

    # Life

    def close(self) -> None:
        """Save worn search indexes, close the files, let others write. Harmless if repeated."""
        with self._lock:
            try:
                if self._writer_lock is not None and self._catalog.database.is_open:
                    self._retrieval.save_worn()
            finally:
                self._catalog.database.close()
                if self._writer_lock is not None:
                    self._writer_lock.release()

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Library({str(self.path)!r}, {self._state.exemplars} exemplars of "
            f"{', '.join(self._structures) or 'nothing'}, digest {self.digest[:12]})"
        )


def _refuse_second(folder: Path) -> None:
    """Raise LibraryError if there is a library; what an interrupted creation left may stay."""
    if (folder / CATALOG).exists():
        try:
            Database.open(folder / CATALOG, writable=True).close()
        except LibraryNotFoundError:
            return
        raise LibraryError(
            f"there is a library in {folder} already. Open it, or choose another folder."
        )
