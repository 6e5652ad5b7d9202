"""Bring annotated images into a library, one exemplar at a time, so that it can be resumed.

What is in the library already (same pixels, same masks, same absences) is skipped: after an
interruption the same command continues. A file that cannot be used does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated, Missing, Pair, read_pair
from recallseg.runtime.library.sources import content_digest

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["ImportReport", "import_annotated", "import_pairs"]


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes
    ----------
    added : key by name.
    skipped : names of those that were in the library already.
    failed : message by name.
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
    """Add every pair to a library; ``missing`` as :func:`read_pair` takes it, the rest as below."""
    return import_annotated(
        library,
        [(pair.name, partial(read_pair, pair, labels, missing)) for pair in pairs],
        tags=tags,
        strict=strict,
        progress=progress,
    )


def import_annotated(
    library: Library,
    sources: Sequence[tuple[str, Callable[[], Annotated]]],
    *,
    tags: Mapping[str, str] | None = None,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ImportReport:
    """Add annotated images to a library that is open for writing, each read when its turn comes.

    Parameters
    ----------
    sources : names, and what gives the image. A name becomes the exemplar's key, or, where that is
        taken, the library gives one.
    tags : given to every exemplar.
    strict : stop at the first that cannot be used; what was added before stays.
    progress : called after each with its name.

    Raises
    ------
    InputError
        If ``strict`` and one cannot be used.
    LibraryWriteError
        If the library cannot be written.
    """
    known = {exemplar.content for exemplar in library}
    added: dict[str, str] = {}
    skipped: list[str] = []
    failed: dict[str, str] = {}
    for name, read in sources:
        try:
            annotated = read()
            content = content_digest(annotated.image, annotated.masks, annotated.absent)
            if content in known:
                skipped.append(name)
            else:
                added[name] = library.add(
                    annotated.image,
                    annotated.masks,
                    absent=annotated.absent,
                    tags=dict(tags or {}),
                    key=None if name in library else name,
                )
                known.add(content)
        except InputError as error:
            if strict:
                raise
            failed[name] = str(error)
        if progress is not None:
            progress(name)
    return ImportReport(added, tuple(skipped), failed)
