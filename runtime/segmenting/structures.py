"""Which structures are asked for, and which of them a library's exemplars can answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recallseg.engines.errors import InputError
from recallseg.engines.pixels.interface import MOST_STRUCTURES

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["carried", "check_structures"]


def check_structures(
    library: Library, structures: Sequence[str] | None, tags: Mapping[str, str]
) -> tuple[str, ...]:
    """Return what is to be segmented, in the order of the label values.

    Parameters
    ----------
    structures : as a caller names them; None for all that exemplars with these tags show.
    tags : as the library has them, see :meth:`recallseg.Library.conceal`.

    Raises
    ------
    InputError
        For names that are no list of distinct ones, a structure that no exemplar shows, or none
        that carries the tags; or if the library is empty.
    """
    known = library.structures
    if isinstance(structures, str):
        raise InputError(f"structures must be a list of names, got the string '{structures}'.")
    if structures is not None and not isinstance(structures, Sequence):
        raise InputError(
            "structures must be a list or tuple of names, in the order of their label values, "
            f"got {structures!r} ({type(structures).__name__})."
        )
    if not known:
        raise InputError("the library is empty: add annotated images before segmenting.")
    chosen = tuple(_required(library, known, tags) if structures is None else structures)
    if not chosen:
        raise InputError(
            "structures is empty: name what to segment, or leave it out (None) for all of "
            f"{', '.join(known)}."
        )
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(
            f"the library has no exemplar of '{unknown[0]}'; it knows {', '.join(known)}. "
            "Annotate one, or ask for another structure."
        )
    if len(set(chosen)) < len(chosen) or len(chosen) > MOST_STRUCTURES:
        raise InputError(
            f"structures must be distinct and at most {MOST_STRUCTURES}, got {len(chosen)}."
        )
    found = _required(library, chosen, tags)
    if len(found) < len(chosen):
        missing = next(name for name in chosen if name not in found)
        raise InputError(
            f"no exemplar that shows '{missing}' carries the tags {dict(tags)}. Ask for "
            "other tags or structures, or tag an exemplar."
        )
    return chosen


def carried(library: Library, structures: Sequence[str], tags: Mapping[str, str]) -> list[str]:
    """Return those of ``structures`` that exemplars with these tags show."""
    return [name for name in structures if not tags or library.count(name, tags=tags)]


def _required(library: Library, structures: Sequence[str], tags: Mapping[str, str]) -> list[str]:
    """Return :func:`carried`; raise InputError if that is none at all."""
    found = carried(library, structures, tags)
    if found:
        return found
    for name, value in tags.items():
        if not any(library.count(one, tags={name: value}) for one in structures):
            raise InputError(
                f"no exemplar of {', '.join(structures)} carries the tag {name}={value}; "
                "'recallseg library list' shows the tags of each."
            )
    raise InputError(
        f"no exemplar of {', '.join(structures)} carries all of the tags {dict(tags)}; "
        "'recallseg library list' shows the tags of each."
    )
