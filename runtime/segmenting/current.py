"""A segmenter that is of its library as that is now, for whoever keeps one for long."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.segmenting.structures import carried

__all__ = ["Current"]


class Current:
    """Makes a segmenter of an open library, and another when that would be another one now.

    So it is after a head was fitted or removed, or a structure came or went. Exemplars that are
    added, retired or removed are seen by every segmenter by itself. May be shared by threads; a
    question that is under way keeps the segmenter that it was asked of.

    Parameters
    ----------
    library : what it is made of.
    make : makes one, of the library as it is then.
    made : one that was just made.
    """

    def __init__(
        self, library: Library, make: Callable[[], Segmenter], made: Segmenter | None = None
    ) -> None:
        self._library, self._make = library, make
        self._lock = Lock()
        self._commits: object = library.commits
        self._made = made
        self._of = None if made is None else self._state(made)

    def get(self) -> Segmenter:
        """Return it; costs some microseconds where the library is as it was.

        Raises
        ------
        InputError
            If none can be made now, e.g. since a structure that was asked for is gone.
        LibraryMismatchError
            If the library has been rebuilt for another bundle.
        LibraryError, BundleError, EngineError
        """
        with self._lock:
            self._library.refresh()
            while self._made is None or self._commits != self._library.commits:
                commits = self._library.commits
                if self._made is None or self._of != self._state(self._made):
                    made = self._make()
                    self._made, self._of = made, self._state(made)
                    if commits != self._library.commits:  # it may be older than its state
                        self._of = None
                self._commits = commits
            return self._made

    def _state(self, made: Segmenter) -> object:
        """Return what a segmenter like this is made of now."""
        library, tags = self._library, made.tags
        names = library.structures
        # Twice as many exemplars: room for their memories on a GPU is made anew.
        return (
            carried(library, names, tags),
            len(library).bit_length(),
            library.generation,
            library.heads.mark,
        )
