"""Who changed a library, when and how: a note in the catalog for each commit that changed it.

Notes and no table: what older programs wrote has none, and they open a library that has them. The
revisions that nobody noted are told as such. An entry names exemplars by number: of one that was
removed nothing is left but that there was one. Another mask gives an exemplar another number, and
the note on that says which one it had.
"""

from __future__ import annotations

import json
import os
import pwd
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.engines.reading import reason
from recallseg.runtime.checks import check_tags
from recallseg.runtime.library.values import LARGEST, integer, timestamp

if TYPE_CHECKING:
    from recallseg.runtime.library.catalog import Catalog

__all__ = [
    "PREFIX",
    "UNRECORDED",
    "Change",
    "Note",
    "history",
    "next_note",
    "note_text",
    "parse_note",
]

PREFIX = "at "
"""Of the notes' names. It sorts before those that every query looks for."""
UNRECORDED = "unrecorded"
_ADDING = {"add", "merge", "replace_mask"}
_PAGE = 256
_DIGITS = 12


@dataclass(frozen=True)
class Change:
    """One commit that changed a library.

    Attributes
    ----------
    revision : of the library after it; every exemplar that is added or removed counts as one.
    time : ISO 8601, UTC; empty where it is not known.
    who : name of the user that the program ran as; empty where it is not known.
    what : the method's name, e.g. ``add``, ``retire``, ``remove``; ``unrecorded`` for all that
        programs without a history did, up to this revision.
    exemplars : keys of those that it was done to and that are still in the library, retired ones
        too, in order of addition.
    erased : how many of those that it was done to have been removed.
    details : what else is known, e.g. the names of a renamed structure.
    """

    revision: int
    time: str
    who: str
    what: str
    exemplars: tuple[str, ...] = ()
    erased: int = 0
    details: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "exemplars": [*self.exemplars], "details": dict(self.details)}


@dataclass(frozen=True)
class Note:
    """A change as it is stored: made to revision ``before``, to exemplars in ascending spans."""

    before: int
    revision: int
    time: str
    who: str
    what: str
    spans: tuple[range, ...]
    details: Mapping[str, str]
    former: int | None = None

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Return which of ascending numbers it was done to."""
        ends = ((bisect_left(numbers, s.start), bisect_left(numbers, s.stop)) for s in self.spans)
        return [number for first, end in ends for number in numbers[first:end]]

    def change(self, keys: Mapping[int, str], numbers: Sequence[int]) -> Change:
        """Return it with the keys of the exemplars that are there; ``numbers`` are all of them."""
        named = tuple(keys[number] for number in self.of(numbers))
        erased = sum(map(len, self.spans)) - len(named)
        return Change(self.revision, self.time, self.who, self.what, named, erased, self.details)


def next_note(newest: str | None) -> str:
    """Return the name of the note that follows ``newest``; LibraryCorruptError if that is none."""
    number = "0" if newest is None else newest.removeprefix(PREFIX)
    if not (number.isascii() and number.isdecimal() and len(number) <= _DIGITS):
        raise LibraryCorruptError(
            f"the library's history has a note {newest!a:.80}, which RecallSeg did not make. "
            "Restore the library from a backup, or ask for it anew from who made it."
        )
    return f"{PREFIX}{1 + int(number):0{_DIGITS}d}"


def note_text(
    what: str,
    before: int,
    revision: int,
    numbers: Iterable[int],
    details: Mapping[str, str],
    former: int | None = None,
) -> str:
    """Return the text of the note on a change that is made now, by this user.

    ``former`` is the number that the one exemplar of the change had before.
    """
    return json.dumps(
        {
            **({} if former is None else {"former": former}),
            "what": what,
            "revisions": [before, revision],
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "who": _who(),
            "exemplars": _spans(numbers),
            "details": dict(details),
        }
    )


def parse_note(text: str) -> Note:
    """Return a note of :func:`note_text`; LibraryCorruptError if it is none."""
    try:
        data = json.loads(text)
        before, revision = (integer(value, "a revision") for value in data["revisions"])
        ends = [
            (integer(a, "a number", 1), integer(b, "a number", a)) for a, b in data["exemplars"]
        ]
        spans = tuple(range(first, last + 1) for first, last in ends)
        what, who, details = data["what"], data["who"], data["details"]
        if any(one.stop > other.start for one, other in pairwise(spans)):
            raise ValueError("its spans overlap")
        if what in _ADDING and not spans:
            raise ValueError("it added nothing")
        check_tags({"what": what, **({"who": who} if who else {})})
        details = check_tags(details)
        former = data.get("former")
        if former is not None:
            former = integer(former, "the former number of an exemplar", 1)
            if not spans:
                raise ValueError("it is about none")
        time = timestamp(data["time"], "the time of a change")
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise LibraryCorruptError(
            f"a note on the library's history is damaged: {reason(error)}. Restore the library "
            "from a backup; what it recalls is not concerned."
        ) from error
    return Note(before, revision, time, who, what, spans, details, former)


def history(catalog: Catalog) -> tuple[Change, ...]:
    """Return all that is known of a library's changes, oldest first."""
    keys: dict[int, str] = {}
    created: dict[int, str] = {}
    after = 0
    with catalog.database.snapshot():
        revision = catalog.state().revision
        notes = [parse_note(text) for _, text in catalog.notes(PREFIX)]
        while page := catalog.exemplars(after, _PAGE):
            keys.update((number, exemplar.key) for number, exemplar in page)
            created.update((number, exemplar.created) for number, exemplar in page)
            after = page[-1][0]
    for late in reversed(notes):  # a mask may have been replaced twice
        if late.former is not None and late.spans[0].start in keys:
            keys.setdefault(late.former, keys[late.spans[0].start])
    numbers = sorted(keys)
    added = {n for note in notes if note.what in _ADDING for n in note.of(numbers)}
    unknown = [number for number in numbers if number not in added]
    # Of each note on, the first exemplar that one is about: unknown ones before it came before.
    firsts = [note.spans[0].start if note.what in _ADDING else LARGEST for note in notes]
    firsts = [*accumulate(reversed(firsts), min, initial=LARGEST)][::-1]
    changes: list[Change] = []
    seen = 0
    for note, first in zip([*notes, None], firsts, strict=True):
        before = revision if note is None else note.before
        if before > seen:
            end = bisect_left(unknown, first)
            found, unknown = unknown[:end], unknown[end:]
            time = max((created.get(number, "") for number in found), default="")
            named = tuple(keys[number] for number in found)
            changes.append(Change(before, time, "", UNRECORDED, named))
        if note is not None:
            changes.append(note.change(keys, numbers))
            seen = note.revision
    return tuple(changes)


def _who() -> str:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a user without a name, as in some containers
        return ""
    return name if name.isprintable() else ""


def _spans(numbers: Iterable[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return spans
