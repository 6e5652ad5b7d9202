"""Bringing a library's exemplars in use back to what they were after an earlier change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recallseg.engines.errors import InputError
from recallseg.runtime.library import changing
from recallseg.runtime.library.history import UNRECORDED, Change

if TYPE_CHECKING:
    from recallseg.runtime.library.library import Library

__all__ = ["Reverted", "revert"]

_ADDING = ("add", "merge", UNRECORDED)


@dataclass(frozen=True)
class Reverted:
    """What a revert did, and what it could not do.

    Attributes
    ----------
    retired : keys of exemplars that came later; they are out of use now, and nothing of them is
        lost.
    reinstated : keys of exemplars that were retired later; they are in use again.
    lost : how many exemplars that were there then have been removed since, at most: those do not
        come back.
    kept : what was done later that is no matter of which exemplars are in use, and stays as it is.
    """

    retired: tuple[str, ...]
    reinstated: tuple[str, ...]
    lost: int
    kept: tuple[Change, ...]


def revert(library: Library, revision: int) -> Reverted:
    """Take into use the exemplars that were in use after a change, and only those; all or none.

    What is taken out of use is retired, so that a revert can be reverted. Masks, tags and names
    that were changed since stay as they are.

    Parameters
    ----------
    library : open for writing.
    revision : of the change, as :meth:`recallseg.Library.history` tells it.

    Raises
    ------
    InputError
        If there was no such change.
    LibraryWriteError
        If the library is open for reading only or cannot be written.
    """
    library.check_writable("revert")
    changes = library.history()
    known = [change.revision for change in changes]
    if revision not in known:
        raise InputError(
            f"the library {library.path} has no change of revision {revision}; it has "
            f"{', '.join(map(str, known)) or 'none'}. 'recallseg library history' shows them."
        )
    then: set[str] = set()
    for change in changes:
        if change.revision > revision:
            break
        if change.what in _ADDING or change.what == "reinstate":
            then |= {*change.exemplars}
        elif change.what == "retire":
            then -= {*change.exemplars}
    later = [change for change in changes if change.revision > revision]
    in_use = [exemplar.key for exemplar in library]
    retired = tuple(key for key in in_use if key not in then)
    reinstated = tuple(one.key for one in library.retired if one.key in then)
    added = sum(change.erased for change in later if change.what in _ADDING)
    removed = sum(change.erased for change in later if change.what == "remove")
    changing.retire(library._store, retired, reinstated)
    kept = [one for one in later if one.what not in (*_ADDING, "retire", "reinstate", "remove")]
    return Reverted(retired, reinstated, max(0, removed - added), tuple(kept))
