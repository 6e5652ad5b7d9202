"""Bring a folder of pairs into a library, one exemplar at a time, so that it can be resumed.

What is in the library already (same pixels, same masks, same absences) is skipped: after an
interruption the same command continues. A file that cannot be used does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Missing, Pair, read_pair
from recallseg.runtime.library.sources import content_digest

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["ImportReport", "import_pairs"]


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes
    ----------
    added : key by pair.
    skipped : pairs that were in the library already.
    failed : message by pair.
    """

    added: Mapping[str, str]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]


def import_pairs(
    library: Library,
    pairs: Sequence[Pair],
    labels: Mapping[int, str],
    *,
    missing: Missing = "absent",
    tags: Mapping[str, str] | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Add every pair to a library that is open for writing.

    Each exemplar's key is its pair's name, or, where that is taken, one that the library gives.

    Parameters
    ----------
    missing : see :func:`read_pair`.
    tags : given to every exemplar.
    strict : stop at the first pair that cannot be used; what was added before stays.
    progress : called after each pair with its name.

    Raises
    ------
    InputError
        If ``strict`` and a pair cannot be used.
    LibraryWriteError
        If the library cannot be written.
    """
    known = {exemplar.content for exemplar in library}
    added: dict[str, str] = {}
    skipped: list[str] = []
    failed: dict[str, str] = {}
    for pair in pairs:
        try:
            annotated = read_pair(pair, labels, missing)
            content = content_digest(annotated.image, annotated.masks, annotated.absent)
            if content in known:
                skipped.append(pair.name)
            else:
                key = None if pair.name in library else pair.name
                added[pair.name] = library.add(
                    annotated.image,
                    annotated.masks,
                    absent=annotated.absent,
                    tags=dict(tags or {}),
                    key=key,
                )
                known.add(content)
        except InputError as error:
            if strict:
                raise
            failed[pair.name] = str(error)
        if progress is not None:
            progress(pair.name)
    return ImportReport(added, tuple(skipped), failed)
