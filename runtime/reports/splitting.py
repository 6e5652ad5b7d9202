"""Who may be recalled for a query: no exemplar of its own group, and no more than a budget.

Memories do not depend on the query, so one library serves every split: what a query must not see is
passed over when it is segmented.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import MAX_KEY
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library.sources import content_digest
from recallseg.runtime.reports.annotated_sources import Source

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.choosing import SAME_IMAGE

__all__ = ["Split", "check_leaks", "fill_pool"]

SHOWN = 5
"""Names in a message."""


class Split:
    """Decides which exemplars a query may recall.

    Parameters
    ----------
    library : the exemplars.
    groups : group by key of an exemplar; None where there is nothing to split.
    folds : groups are dealt to so many parts, and a query recalls nothing of its own part; None:
        nothing of its own group.
    draws : random orders of the exemplars, of which a budget takes the first.
    """

    def __init__(
        self,
        library: Library,
        groups: Mapping[str, str] | None = None,
        folds: int | None = None,
        draws: int = 1,
    ) -> None:
        self._keys = sorted(exemplar.key for exemplar in library)
        self.groups = groups
        self._folds: dict[str, int] = {}
        if groups is not None:
            unknown = [key for key in self._keys if key not in groups]
            if unknown:
                raise InputError(
                    f"{len(unknown)} exemplars of the library are not of the data that is split: "
                    f"{', '.join(unknown[:SHOWN])}. Use a library of its own."
                )
            names = sorted(set(groups.values()))
            if len(names) < 2 or (folds is not None and not 2 <= folds <= len(names)):
                raise InputError(
                    f"a split needs two groups and from two to as many folds, got {len(names)} "
                    f"groups{'' if folds is None else f' and {folds} folds'}."
                )
            order = np.random.default_rng(0).permutation(len(names))
            self._folds = {names[int(i)]: n % (folds or len(names)) for n, i in enumerate(order)}
        self._orders = [
            [self._keys[int(i)] for i in np.random.default_rng(draw).permutation(len(self._keys))]
            for draw in range(draws)
        ]
        self._secret = secrets.token_bytes(16)

    def own(self, group: str) -> frozenset[str]:
        """Return keys that a query of this group must not recall."""
        if self.groups is None or group not in self._folds:
            return frozenset()
        fold = self._folds[group]
        return frozenset(key for key in self._keys if self._folds[self.groups[key]] == fold)

    def without(self, group: str, annotated: int, draw: int) -> frozenset[str]:
        """Return keys that are passed over, with a budget of annotated images (0: all)."""
        own = self.own(group)
        if not annotated:
            return own
        allowed = [key for key in self._orders[draw] if key not in own][:annotated]
        return frozenset(self._keys).difference(allowed)

    def hashed(self, group: str) -> str:
        """Return what stands for a group in a report, with a key of this run: it leads nowhere."""
        text = group.encode(errors="surrogateescape")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:12]


def check_leaks(
    library: Library,
    sources: Sequence[Source],
    structures: Sequence[str],
    split: Split,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Raise if a query is an exemplar that it may recall: it would be given its own mask.

    Returns
    -------
    str
        What could not be found out; empty if nothing.

    Raises
    ------
    InputError
        Naming the cases.
    """
    keys: list[str] = []
    rows = []
    for name in library.structures:
        for absent in (False, True):
            found, vectors = library.embeddings(name, absent=absent)
            keys += found
            rows.append(vectors)
    matrix = np.concatenate(rows)
    told = any(source.group for source in sources) and not split.groups
    known = told and library.tells_groups
    leaks: dict[str, str] = {}
    for source in sources:
        ours = library.grouped(_told(source.group)) if source.group and known else ()
        if ours:
            leaks[source.name] = f"of the same group as exemplar '{min(ours)}'"
            continue
        try:
            images = source.read().annotated
            own = split.own(source.group or source.name)
            for annotated in images:
                if any(name in annotated.masks or name in annotated.absent for name in structures):
                    near = 1.0 - matrix @ library.embed(annotated.image) <= SAME_IMAGE
                    same = {keys[int(i)] for i in np.flatnonzero(near)} - own
                    alike = [key for key in sorted(same) if _same(library, key, annotated)]
                    if alike:
                        leaks[annotated.name] = f"exemplar '{alike[0]}'"
        except InputError:
            continue  # told, by its name, when it is evaluated
        if progress is not None:
            progress(source.name)
    if leaks:
        these = ", ".join(f"{case} is {what}" for case, what in [*leaks.items()][:SHOWN])
        more = f" and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
        raise InputError(
            f"{len(leaks)} images are exemplars that would be recalled for them, or of the same "
            f"patient or group as one: {these}{more}. Give images that were held out, or split one "
            "pool of data with --split-by."
        )
    if told and not known:
        return (
            "whether images are of patients or groups that the library has exemplars of is not "
            "known: it came without the table of identifiers, in which alone it says whose they are"
        )
    return ""


def fill_pool(
    library: Library,
    sources: Sequence[Source],
    structures: Sequence[str],
    progress: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Add what shows a structure to a library; what is there already is kept.

    Everything is read once before anything is added.

    Parameters
    ----------
    structures : any of these; empty: any at all.

    Returns
    -------
    dict
        Group by key, for :class:`Split`.

    Raises
    ------
    InputError
        If the library holds what is not among the sources, or one image is in two groups; nothing
        was added then.
    """
    first: dict[str, tuple[str, str]] = {}
    for source, annotated, content in _showing(sources, structures):
        name, group = first.setdefault(content, (annotated.name, source.group or source.name))
        if group != (source.group or source.name):
            raise InputError(
                f"{annotated.name} is the same image as {name}, of another group: it would be on "
                "both sides. Remove one."
            )
    held = {exemplar.content: exemplar.key for exemplar in library}
    others = [key for content, key in held.items() if content not in first]
    if others:
        raise InputError(
            f"{len(others)} exemplars of the library {library.path} are not of the data that is "
            f"split: {', '.join(others[:SHOWN])}. Name a new folder for a library of its own."
        )
    for _, annotated, content in _showing(sources, structures, progress):
        if content not in held:
            held[content] = library.add(
                annotated.image,
                annotated.masks,
                absent=annotated.absent,
                name=annotated.name,
                group=_told(first[content][1]),
            )
    return {held[content]: group for content, (_, group) in first.items()}


def _told(group: str) -> str:
    """Return what a library is told of a group: the text, or a hash of what it would refuse."""
    if group.isprintable() and len(group) <= MAX_KEY:
        return group
    return hashlib.sha256(group.encode(errors="surrogateescape")).hexdigest()


def _showing(
    sources: Sequence[Source],
    structures: Sequence[str],
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[Source, Annotated, str]]:
    """Yield what shows a structure, with the digest of its content."""
    for source in sources:
        try:
            images = source.read().annotated
        except InputError:
            images = ()  # told, by its name, when it is evaluated
        for annotated in images:
            if any(not structures or name in structures for name in annotated.masks):
                yield (
                    source,
                    annotated,
                    content_digest(annotated.image, annotated.masks, annotated.absent),
                )
        if progress is not None:
            progress(source.name)


def _same(library: Library, key: str, annotated: Annotated) -> bool:
    """Whether an exemplar is the same image: pixel by pixel where those are kept."""
    try:
        if not library.get(key).has_source:
            return True
        source, _ = library.source(key)
    except InputError:  # removed by another process meanwhile
        return False
    return bool(np.array_equal(source, annotated.image))
