"""What is done to a library as a whole, or to many of its exemplars without encoding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from recallseg.engines.bundle import Bundle
from recallseg.engines.signing import SigningKey
from recallseg.runtime.library import (
    anonymising,
    backups,
    changing,
    maintenance,
    merging,
    releases,
    renaming,
)
from recallseg.runtime.library.anonymising import AnonymisingReport
from recallseg.runtime.library.binding import Binding
from recallseg.runtime.library.encoding import ExemplarEncoder
from recallseg.runtime.library.exemplar import Exemplar, LibraryReport
from recallseg.runtime.library.history import Change, history
from recallseg.runtime.library.merging import MergeReport
from recallseg.runtime.library.releases import Release
from recallseg.runtime.library.store import Store
from recallseg.runtime.library.tracing import Trace

__all__ = ["UpkeepDoor"]

Progress = Callable[[int, int], None]


class UpkeepDoor:
    """The part of :class:`recallseg.Library` that keeps it in order."""

    _store: Store
    _binding: Binding

    # Out of use and back

    def retire(self, keys: str | Iterable[str]) -> None:
        """Take exemplars out of use, all or none: they are not recalled, counted or iterated over.

        Everything of them stays, and :meth:`reinstate` brings them back; :meth:`remove` erases.
        The library's digest is that of a library without them.

        Parameters
        ----------
        keys : one key, or several.

        Raises
        ------
        InputError
            If there is no such key, or it is retired already.
        LibraryWriteError
            If the library is open for reading only or cannot be written.

        Examples
        --------
        >>> with Library.create("first", "demo") as library:
        ...     image = np.zeros((64, 64), np.uint8)
        ...     image[16:48, 16:48] = 255
        ...     _ = library.add(image, {"square": image > 0}, key="a")
        ...     library.retire("a")
        ...     print(len(library), library.retired[0].key)
        ...     library.reinstate("a")
        ...     print(len(library), [change.what for change in library.history()])
        0 a
        1 ['add', 'retire', 'reinstate']
        """
        changing.retire(self._store, keys)

    def reinstate(self, keys: str | Iterable[str]) -> None:
        """Take retired exemplars into use again, as they were, all or none.

        A calibration that was made meanwhile counts them as not made with.

        Parameters
        ----------
        keys : one key, or several.

        Raises
        ------
        InputError
            If there is no such key, or it is not retired.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        changing.retire(self._store, back=keys)

    @property
    def retired(self) -> tuple[Exemplar, ...]:
        """The exemplars that are retired, in order of addition."""
        catalog = self._store.catalog
        with catalog.database.snapshot():
            return tuple(exemplar for _, exemplar in catalog.exemplars(retired=True))

    def history(self) -> tuple[Change, ...]:
        """Return every change that was made to the library, oldest first: when, by whom and what.

        It is stored with each change, in the same commit. What programs did that kept no history
        is told as one entry, ``unrecorded``, with the exemplars that they added. Of exemplars that
        were removed it keeps how many they were, and nothing else.

        Raises
        ------
        LibraryCorruptError
            If it is damaged.
        """
        return history(self._store.catalog)

    def trace(self, detail: str) -> Trace:
        """Return what tells of which things the exemplars in use are.

        That is what ``details`` of :meth:`add_many` said of them. Asked again and again, it reads
        only what was committed meanwhile.

        Parameters
        ----------
        detail : a name of the details of changes.

        Examples
        --------
        >>> with Library.create("traced", "demo") as library:
        ...     image = np.zeros((64, 64), np.uint8)
        ...     image[16:48, 16:48] = 255
        ...     trace = library.trace("image")
        ...     item = {"image": image, "masks": {"square": image > 0}, "key": "a"}
        ...     _ = library.add_many([item], details={"image": "first.png"})
        ...     print([*trace.look()])
        ...     library.retire("a")
        ...     print([*trace.look()])
        ['first.png']
        []
        """
        return Trace(self._store.catalog, detail)

    # Names, other libraries, copies

    def rename_structure(self, old: str, new: str) -> None:
        """Give a structure another name in every exemplar, retired ones too; all or nothing.

        The library is what it would be had the exemplars been added with that name, keys excepted;
        calibrations follow. Without stored images the digests of their contents are made from the
        former ones, and a library of the same images added anew has others.

        Parameters
        ----------
        old : a structure that some exemplar shows, or lacks.
        new : a name that no exemplar has.

        Raises
        ------
        InputError
            If there is no such structure, ``new`` is in use, or is no name.
        LibraryCorruptError
            If a stored image is damaged.
        LibraryWriteError
            If the library is open for reading only or cannot be written.

        Examples
        --------
        >>> with Library.create("named", "demo") as library:
        ...     image = np.zeros((64, 64), np.uint8)
        ...     image[16:48, 16:48] = 255
        ...     _ = library.add(image, {"sqare": image > 0}, key="a")
        ...     library.rename_structure("sqare", "square")
        ...     print(library.structures, [*library.source("a")[1]])
        ('square',) ['square']
        """
        renaming.rename(self._store, old, new)

    def merge(
        self, other: UpkeepDoor | str | Path, *, progress: Progress | None = None
    ) -> MergeReport:
        """Add the exemplars of another library of the same bundle, all in one commit or none.

        Exemplars with equal key, content and tags are passed over, and so are those that this
        library has under another key and those that are retired there; the report names them.
        Values of tags that identify, and groups, are hashed with this library's secret, and its
        table of identifiers takes in the other's rows; groups whose names are not there stay as
        they are, and the report names them. Memories are copied where this library would make them
        alike (engine, precision, format), or the image to make them anew was not kept; else they
        are made anew. Calibrations stay as they are.

        Parameters
        ----------
        other : an open library, or the folder of one; it is only read.
        progress : told how many exemplars are written, of how many.

        Raises
        ------
        LibraryMismatchError
            If the other belongs to another bundle or has another intensity rule.
        InputError
            If it is this library; if an exemplar with a key that both have differs, or one has no
            stored image and needs it, all of them named; or if tags are hashed with a secret that
            is not there. Nothing is added.
        LibraryCorruptError
            If a memory or image of the other is damaged.
        LibraryError
            If the other is changed meanwhile.
        LibraryWriteError, EngineRunError
            As :meth:`recallseg.Library.add`; nothing was added.

        Examples
        --------
        >>> image = np.zeros((64, 64), np.uint8)
        >>> image[16:48, 16:48] = 255
        >>> with Library.create("one", "demo") as one, Library.create("two", "demo") as two:
        ...     _ = one.add(image, {"square": image > 0}, key="a")
        ...     _ = two.add(image, {"square": image > 0}, key="a")
        ...     _ = two.add(255 - image, {"square": image > 0}, key="b")
        ...     report = one.merge(two)
        ...     print(report.added, report.equal, len(one))
        ('b',) ('a',) 2
        """
        if isinstance(other, UpkeepDoor):
            return merging.merge(self._store, self._binding, other._store, progress)
        opened = Store.open(Path(other), "read")
        try:
            return merging.merge(self._store, self._binding, opened, progress)
        finally:
            opened.abandon()

    def release(
        self,
        path: str | Path,
        *,
        version: str,
        key: SigningKey,
        images: bool = False,
        evaluation: Mapping[str, Any] | None = None,
        sbom: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Release:
        """Write the library as it is now to one signed file, for others to install.

        Parameters
        ----------
        path : file to write.
        version : ``MAJOR.MINOR.PATCH``.
        key : that signs it.
        images : take the annotated images along, so that it can be rebuilt for another bundle.
        evaluation : on held-out images, see :func:`recallseg.runtime.reports.released.released`.
        sbom : of what made it, as CycloneDX.
        progress : told how many exemplars are compared with their digests, of how many.

        Raises
        ------
        InputError
            If ``version`` is none.
        LibraryError
            If a tag says whose image an exemplar is.
        LibraryCorruptError
            If the library is damaged.
        LibraryWriteError
            If ``path`` cannot be written.
        """
        return releases.release(
            self._store,
            Path(path),
            version=version,
            key=key,
            name=self._store.path.resolve().name,
            images=images,
            evaluation=evaluation,
            sbom=sbom,
            progress=progress,
        )

    def backup(self, path: str | Path, *, progress: Progress | None = None) -> LibraryReport:
        """Copy the library to a new folder, as it is at one moment, and verify the copy.

        The copy is a library: it can be opened, or put back by :meth:`restore`. Others may read and
        write meanwhile. Search indexes are left out: they are built anew when needed; and so is
        ``identifiers.jsonl``, what keys and hashed tags stand for: keep a copy of that elsewhere.

        Parameters
        ----------
        path : a folder that is not there yet, or is empty; it appears when the copy is whole.
        progress : told how many exemplars of the copy are verified, of how many.

        Raises
        ------
        LibraryError
            If something is in ``path`` already.
        LibraryCorruptError
            If the library is damaged; there is no copy then.
        LibraryLockedError
            If others remove from it faster than it can be copied.
        LibraryWriteError
            If ``path`` cannot be written.
        """
        return backups.backup(self._store, Path(path), progress)

    @staticmethod
    def restore(
        backup: str | Path,
        path: str | Path,
        *,
        over_newer: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Put a backup in the place of a library, or where there is none.

        It is copied and verified first, and takes the library's place in the end; until then
        nothing has changed. The backup stays, and so does the library's ``identifiers.jsonl``, if
        there is one. Who has the former library open keeps reading that: open it again.

        Parameters
        ----------
        backup : a folder that :meth:`backup` made.
        path : of the library; it must not be open for writing.
        over_newer : replace a library that has exemplars which the backup has not (by key, content
            and tags), that was changed since, that has another head, other calibrations, groups or
            exemplars in use, or that cannot be read.

        Raises
        ------
        LibraryError
            If the library is newer, or ``path`` holds something else.
        LibraryNotFoundError, LibraryVersionError, LibraryCorruptError
            If ``backup`` is no library, a newer program's, or damaged.
        LibraryLockedError
            If the library is open for writing.
        LibraryWriteError
            If it cannot be written.

        Examples
        --------
        >>> with Library.create("kept", "demo") as library:
        ...     image = np.zeros((64, 64), np.uint8)
        ...     image[16:48, 16:48] = 255
        ...     _ = library.add(image, {"square": image > 0}, key="a")
        ...     print(library.backup("kept-monday").exemplars)
        1
        >>> Library.restore("kept-monday", "kept")
        """
        backups.restore(Path(backup), Path(path), over_newer=over_newer, progress=progress)

    # Care

    def anonymise(self) -> AnonymisingReport:
        """Give exemplars keys that say nothing, and hash tags that identify, in one commit.

        For libraries of earlier versions, whose keys came from file names. Keys that are random or
        made from the content stay. :meth:`recallseg.Library.whois` knows the former ones. Keys and
        tags are part of the digest, which changes; memories and calibrations do not.

        Where values were hashed by whoever made the library, and their table is not here, those
        stay as they are, and new ones are hashed with a secret of one's own.

        Raises
        ------
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        return anonymising.anonymise(self._store)

    def compact(self) -> int:
        """Write the memories in use to new shards, delete the old ones, return the bytes freed."""
        return maintenance.compact(self._store)

    def rebuild(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        encoder: ExemplarEncoder | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encode every exemplar anew from its source, for another bundle or the same.

        Until the one commit at the end the library is what it was. When interrupted, the next call
        for the same bundle goes on where this one was. Other processes must open it again.

        Parameters
        ----------
        bundle : what it shall belong to; None for its own.
        encoder : used instead of the bundle's own.
        progress : told how many exemplars are done, of how many.

        Raises
        ------
        LibraryError
            If sources were not kept.
        LibraryCorruptError
            If a source is damaged; remove that exemplar to go on.
        LibraryWriteError, EngineRunError
        """
        maintenance.rebuild(self._store, self._binding, bundle, encoder, progress)

    def rebuild_index(self) -> None:
        """Build the search indexes anew."""
        maintenance.rebuild_index(self._store)

    def verify(self, progress: Progress | None = None) -> LibraryReport:
        """Compare everything stored with its digest, and report what is wrong. Reads every byte."""
        return maintenance.verify(self._store, progress)
