"""What is done to a library as a whole, or to many of its exemplars without encoding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from recallseg.engines.bundle import Bundle
from recallseg.runtime.library import anonymising, changing, maintenance
from recallseg.runtime.library.anonymising import AnonymisingReport
from recallseg.runtime.library.binding import Binding
from recallseg.runtime.library.encoding import ExemplarEncoder
from recallseg.runtime.library.exemplar import Exemplar, LibraryReport
from recallseg.runtime.library.history import Change, history
from recallseg.runtime.library.store import Store

__all__ = ["Upkeep"]

Progress = Callable[[int, int], None]


class Upkeep:
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
        >>> with Library.create("cases", "demo") as library:
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
        changing.retire(self._store, keys, retired=True)

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
        changing.retire(self._store, keys, retired=False)

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
