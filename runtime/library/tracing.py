"""Of which things the exemplars in use are, as a detail of the history says; kept up to date.

A look reads what was committed since the one before. Where that cannot be told, because the newest
note that was read is not there any more or is another, all is read anew; where somebody changed the
library without a note, all exemplars are looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Set
from threading import Lock

from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.history import PREFIX, Note, next_note, parse_note
from recallseg.runtime.library.values import LARGEST

__all__ = ["Trace"]

_ALL = range(1, LARGEST)


class Trace:
    """The values of one detail, of changes whose exemplars are in use; from :meth:`Library.trace`.

    May be shared between threads.
    """

    def __init__(self, catalog: Catalog, detail: str) -> None:
        self._catalog, self._detail = catalog, detail
        self._lock = Lock()
        self._commits: tuple[int, int] | None = None
        self._begin()

    def _begin(self) -> None:
        self._newest: tuple[str, str] | None = None
        self._revision = 0
        self._values: dict[int, str] = {}  # of exemplars, whether in use or not
        self._used: set[int] = set()
        self._counts: Counter[str] = Counter()

    def look(self) -> Set[str]:
        """Return the values as of now; the set changes with the next look.

        Raises
        ------
        LibraryCorruptError
            If the history is damaged.
        """
        database = self._catalog.database
        with self._lock:
            commits = database.commits
            if commits != self._commits:
                try:
                    with database.snapshot():
                        self._read()
                except BaseException:
                    self._begin()
                    raise
                self._commits = commits  # of before: a commit between the two is read again
            return self._counts.keys()

    def _read(self) -> None:
        if self._newest is None or self._catalog.note(self._newest[0]) != self._newest[1]:
            self._begin()
        newest = self._newest
        found = self._catalog.notes(PREFIX, None if newest is None else next_note(newest[0]))
        notes = [parse_note(text) for _, text in found]
        revision = self._catalog.state().revision
        spans: list[range] = [_ALL] if newest is None else []
        for note in notes:
            if note.before != self._revision:
                spans.append(_ALL)
            spans += note.spans
            self._take(note)
            self._revision = note.revision
        if revision != self._revision:
            spans.append(_ALL)
        for span in [_ALL] if _ALL in spans else spans:
            self._look_up(span)
        self._newest, self._revision = found[-1] if found else newest, revision

    def _take(self, note: Note) -> None:
        """Note which exemplars have a value."""
        former = note.former
        if former is not None and former in self._values:  # the same exemplar, under another number
            self._count(former, used=False)
            self._values[note.spans[0].start] = self._values.pop(former)
        if self._detail in note.details:
            for span in note.spans:
                self._values.update(dict.fromkeys(span, note.details[self._detail]))

    def _look_up(self, span: range) -> None:
        known: Collection[int] = self._values
        if len(span) < len(self._values):
            known = [number for number in span if number in self._values]
        elif span != _ALL:
            known = [number for number in self._values if number in span]
        if known:
            used = self._catalog.in_use(span.start, span.stop - 1)
            for number in known:
                self._count(number, used=number in used)

    def _count(self, number: int, *, used: bool) -> None:
        if used == (number in self._used):
            return
        value = self._values[number]
        if used:
            self._used.add(number)
            self._counts[value] += 1
        else:
            self._used.remove(number)
            self._counts[value] -= 1
            if not self._counts[value]:
                del self._counts[value]
