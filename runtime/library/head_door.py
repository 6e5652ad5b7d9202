"""The library's door to its head, and to what that is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from recallseg.engines import defaults
from recallseg.runtime.checks import check_origin
from recallseg.runtime.library.heads import Head, Heads
from recallseg.runtime.library.store import Store

if TYPE_CHECKING:
    from recallseg.runtime.library.library import Library

__all__ = ["HeadDoor"]

Progress = Callable[[int, int], None]


class HeadDoor:
    """The part of :class:`recallseg.Library` that has a head."""

    _store: Store

    def fit(
        self,
        structures: Sequence[str] | None = None,
        *,
        k: int = defaults.K,
        by: str | None = None,
        progress: Progress | None = None,
        **asked: Any,
    ) -> Head:
        """Fit a head on the exemplars, store it, and return it with what was chosen and expected.

        Each exemplar is segmented without those of its group (patient, series, volume: see
        :meth:`add`), and what memory attention makes of it is kept: a fit that was interrupted, or
        one after exemplars were added, goes on from there. On that and on filters of the images a
        small head is fitted; where exemplars that it had not seen say that it is surely no worse,
        segmenters use it from then on, unless made with ``refine=False``. With fewer than four
        groups that show a structure it stays out, and says so in :class:`Choice`.

        Parameters
        ----------
        structures : None for all.
        k : exemplars to recall at most; as queries will.
        by : a tag: exemplars that have equal values of it are a group, instead of what was told
            when they were added.
        progress : is told how many steps are done, of how many.
        asked : what :class:`recallseg.Segmenter` takes beside: ``reach``, ``engine``, ...

        Raises
        ------
        InputError
            If the library did not keep its images, or fewer than two exemplars or groups show the
            structures.
        LibraryWriteError
            If the library is open for reading only or cannot be written; what was stored stays.
        LibraryCorruptError
            If a stored image is damaged.
        EngineRunError
            If an engine fails, or filters give numbers that are not finite.
        """
        from recallseg.runtime.segmenting.fitting import fit_head
        from recallseg.runtime.segmenting.segmenter import Segmenter

        self._store.check_writable("fit a head")
        with Segmenter(
            cast("Library", self), structures=structures, k=k, refine=False, **asked
        ) as segmenter:
            return fit_head(segmenter, progress, by=by)

    @property
    def head(self) -> Head | None:
        """What :meth:`fit` stored; raises LibraryCorruptError if it is damaged or another's."""
        return self.heads.head()

    def remove_head(self) -> None:
        """Forget the head; what it was fitted on is kept."""
        self._store.check_writable("remove a head")
        self.heads.remove()

    @property
    def heads(self) -> Heads:
        """Groups, kept logits and the head, as the catalog has them."""
        return Heads(self._store)

    @property
    def generation(self) -> int:
        """Counts how often all exemplars were encoded anew, from 1."""
        return self._store.state.generation

    def number(self, key: str) -> int:
        """Return an exemplar's number in the catalog; raises InputError if there is no such key."""
        return self._store.number(key)

    def keys_of(self, numbers: Sequence[int]) -> list[str]:
        """Return the keys of exemplars, by number, that are still there."""
        return self._store.catalog.keys_there(numbers)

    @property
    def newest(self) -> int:
        """The number of the exemplar that was added last."""
        return self._store.catalog.next_number() - 1

    def head_older(self, head: Head) -> str:
        """Say how the library has changed since a head was fitted; empty if it has not."""
        count = len(cast("Library", self))
        if (count, self.newest) == (head.of, head.last):
            return ""
        return (
            f"the head was fitted with {len(head.fold_of)} exemplars when there were {head.of}; "
            f"there are {count} now"
        )

    @property
    def tells_groups(self) -> bool:
        """Whether :meth:`grouped` can answer: copies are made without the table that it needs."""
        return not self.heads.groups() or self._store.identifiers.own

    def grouped(self, group: str) -> frozenset[str]:
        """Return the keys of the exemplars that were said to belong to a group, see :meth:`add`."""
        known = self.heads.groups()
        if not known:
            return frozenset()
        hashed = self._store.identifiers.keyed_hash("group", check_origin(group))
        return frozenset(self.keys_of([number for number, name in known.items() if name == hashed]))

    def set_group(self, key: str, group: str | None) -> None:
        """Say to which group an exemplar belongs, see :meth:`add`; None: it stands by itself."""
        self._store.check_writable("set a group")
        with self._store.changing, self._store.lock:
            self.heads.set_group(key, group)
