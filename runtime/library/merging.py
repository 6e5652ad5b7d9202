"""The exemplars of one library, taken into another of the same bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    LibraryMismatchError,
)
from recallseg.runtime.library import maintenance
from recallseg.runtime.library.binding import Binding
from recallseg.runtime.library.changing import Made, Make, write_all
from recallseg.runtime.library.encoding import Origin, check_encoded
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.library.identifiers import NOTE, is_hashed
from recallseg.runtime.library.identifiers_file import IDENTIFIERS, Identity
from recallseg.runtime.library.records import NewExemplar, exemplar_digest
from recallseg.runtime.library.shards import Place, digest_record
from recallseg.runtime.library.storage import unreadable
from recallseg.runtime.library.store import Store

__all__ = ["MergeReport", "merge"]

_PAGE = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """What became of another library's exemplars: their keys, in the order of that library.

    Attributes
    ----------
    added : that this library has now.
    equal : that it had, with equal content and tags.
    retired : that are retired there, and were passed over.
    encoded : those of ``added`` whose memories were made anew; of the others they were copied.
    apart : those of ``added`` whose group is known by the other library's hash only. They are still
        a group among themselves; but whether this library has others of it cannot be told.
    same : that this library has under another key, the same image with the same masks, and were
        passed over.
    """

    added: tuple[str, ...]
    equal: tuple[str, ...]
    retired: tuple[str, ...]
    encoded: tuple[str, ...]
    apart: tuple[str, ...]
    same: tuple[str, ...]


@dataclass(frozen=True)
class _Other:
    """An exemplar of the other library, and whether its memories can be taken as they are.

    ``tags`` and ``group`` are hashed with this library's secret, unless the latter is ``apart``;
    ``identity`` is what they stand for.
    """

    number: int
    exemplar: Exemplar
    origin: Origin | None
    copied: bool
    tags: Mapping[str, str]
    identity: Identity
    group: str | None
    apart: bool


def merge(store: Store, binding: Binding, other: Store, progress: Progress | None) -> MergeReport:
    """Add another library's exemplars; see :meth:`recallseg.Library.merge`."""
    store.check_writable("merge")
    other.refresh()
    _check_of_one_kind(store, binding, other)
    with store.changing:
        store.refresh()
        revision = other.state.revision
        new, equal, retired, same = _sort(store, binding, other)

        def check_unchanged() -> None:
            other.refresh()
            if other.state.revision != revision:
                raise LibraryError(
                    f"the library {other.path} was changed while it was merged; nothing was added. "
                    "Try again."
                )

        def commit(written: list[NewExemplar]) -> None:
            check_unchanged()
            with store.identifiers.telling([one.identity for one in new]), store.lock:
                store.catalog.add(*written, what="merge", details={"digest": other.digest})

        if new:
            makes = (_maker(store, binding, other, one) for one in new)
            memories = sum(len(one.exemplar.structures) for one in new)
            try:
                write_all(store, makes, len(new), memories, commit, progress or _no_progress)
            except LibraryCorruptError:
                check_unchanged()  # then that is why a file is not what was read
                raise
    return MergeReport(
        tuple(one.exemplar.key for one in new),
        equal,
        retired,
        tuple(one.exemplar.key for one in new if not one.copied),
        tuple(one.exemplar.key for one in new if one.apart),
        same,
    )


def _check_of_one_kind(store: Store, binding: Binding, other: Store) -> None:
    try:
        same = Path(other.path).samefile(store.path)
    except OSError as error:
        raise unreadable(str(other.path), error, "Restore a backup.") from error
    if same:
        raise InputError(f"the library {store.path} cannot be merged with itself.")
    mine, theirs = store.settings, other.settings
    if theirs.identity != mine.identity and not binding.bundle.known_as(theirs.identity):
        mend = (
            f" Encode it anew for this one first: 'recallseg library rebuild {other.path} --bundle "
            f"{mine.bundle_name}'."
            if theirs.keep_sources
            else ""
        )
        raise LibraryMismatchError(
            f"the library {other.path} belongs to bundle '{theirs.bundle_name}' (identity "
            f"{theirs.identity[:12]}), {store.path} to '{mine.bundle_name}' "
            f"({mine.identity[:12]}); memories of two bundles cannot be mixed.{mend}"
        )
    if dict(theirs.intensity) != dict(mine.intensity):
        raise LibraryMismatchError(
            f"the library {other.path} scales pixel values by {dict(theirs.intensity)}, "
            f"{store.path} by {dict(mine.intensity)}: the same image would be another. Add its "
            "images to this one instead."
        )


def _sort(
    store: Store, binding: Binding, other: Store
) -> tuple[list[_Other], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return what is to be added, is here already, is retired there, is here under another key."""
    own = {
        (origin.engine, origin.precision)
        for origin, _ in store.catalog.count_origins(store.state.generation)
        if origin is not None
    } or {(binding.choice.engine, binding.choice.precision)}
    same_layout = other.settings.layout == store.settings.layout
    origins = other.catalog.origins(other.state.generation)
    new: list[_Other] = []
    equal: list[str] = []
    differing: list[str] = []
    retired, without, same, after = [], [], [], 0
    contents = store.catalog.contents()
    while page := other.catalog.exemplars(after, _PAGE):
        for number, exemplar in page:
            after, key = number, exemplar.key
            if exemplar.retired:
                retired.append(key)
                continue
            mine = store.catalog.number(key)
            identity = other.identifiers.of(key, exemplar.tags)
            tags = _own_tags(store, other, exemplar, identity)
            if mine is not None:
                digest = exemplar_digest(key, exemplar.content, tags)
                known = store.catalog.exemplar_digest(mine) == digest
                (equal if known else differing).append(key)
                continue
            if exemplar.content in contents:
                same.append(key)
                continue
            origin = origins.of(number)
            alike = origin is not None and (origin.engine, origin.precision) in own
            copied = same_layout and (alike or not exemplar.has_source)
            if not exemplar.has_source and (store.settings.keep_sources or not copied):
                without.append(key)
            group, apart = _own_group(store, other, number, identity)
            new.append(_Other(number, exemplar, origin, copied, tags, identity, group, apart))
    if differing:
        raise InputError(
            f"{len(differing)} exemplars of {other.path} have keys of other exemplars of "
            f"{store.path}: {_some(differing)}. Nothing was added. Remove one of each two, or add "
            "them under other keys."
        )
    if without:
        why = (
            "this library keeps images"
            if store.settings.keep_sources
            else f"this library keeps memories as {store.settings.layout.format}"
        )
        raise InputError(
            f"{len(without)} exemplars of {other.path} come without the image, and {why}: "
            f"{_some(without)}. Nothing was added."
        )
    return new, tuple(equal), tuple(retired), tuple(same)


def _own_tags(
    store: Store, other: Store, exemplar: Exemplar, identity: Identity
) -> Mapping[str, str]:
    """Return tags whose values are hashed with this library's secret where they identify.

    Two secrets in one library would make one patient two: a query by tag would miss half.
    """
    hashed = {name for name, value in exemplar.tags.items() if is_hashed(value)}
    if store.catalog.note(NOTE) == other.catalog.note(NOTE):
        hashed = set()
    if not hashed <= {*identity.tags}:
        raise InputError(
            f"exemplar '{exemplar.key}' of {other.path} has tags whose values are hashed with a "
            f"secret of that library ({', '.join(sorted(hashed))}), and its table of them "
            f"({IDENTIFIERS}) is not there. Nothing was added. Merge where the table is, or give "
            "the exemplar other tags first."
        )
    clear = {name: identity.tags[name] for name in hashed}
    return store.identifiers.conceal({**exemplar.tags, **clear}, adding=True)


def _own_group(
    store: Store, other: Store, number: int, identity: Identity
) -> tuple[str | None, bool]:
    """Return a group hashed with this library's secret, or else as it is and that it is so.

    One patient with two hashes would be two: who is left out with an exemplar is then half of them.
    """
    hashed = other.catalog.group(number)
    if hashed is None or store.catalog.note(NOTE) == other.catalog.note(NOTE):
        return hashed, False
    told = identity.group if other.identifiers.own else ""
    if not told or other.identifiers.keyed_hash("group", told) != hashed:
        return hashed, True
    return store.identifiers.keyed_hash("group", told, adding=True), False


def _maker(store: Store, binding: Binding, other: Store, one: _Other) -> Make:
    exemplar, catalog = one.exemplar, other.catalog

    def make(number: int, places: Iterator[Place]) -> Made:
        image: NDArray[Any] = np.empty(0)
        masks: dict[str, NDArray[np.bool_]] = {}
        digest = catalog.source_digest(one.number)
        if digest is not None and (store.settings.keep_sources or not one.copied):
            names = catalog.names_in_source(one.number)
            image, masks = other.sources.read(one.number, digest, exemplar.key, names)
        if one.copied:
            embedding = catalog.embeddings_of([one.number])[1][0]
            memories = _copy_memories(store, other, one, places)
            origin = one.origin
        else:
            encoded = check_encoded(
                binding.encoder().encode(image, masks),
                exemplar.structures,
                store.settings.embedding_dim,
                store.settings.layout,
            )
            embedding, origin = encoded.embedding, encoded.origin
            memories = maintenance.write_memories(store.writer, places, encoded)
        new = NewExemplar(
            number=number,
            key=exemplar.key,
            content=exemplar.content,
            height=exemplar.height,
            width=exemplar.width,
            created=exemplar.created,
            source=None,
            tags=one.tags,
            absent=exemplar.absent,
            embedding=embedding,
            memories=memories,
            origin=origin,
            group=one.group,
        )
        return new, (image, masks)

    return make


def _copy_memories(
    store: Store, other: Store, one: _Other, places: Iterator[Place]
) -> dict[str, tuple[Place, bytes]]:
    copied = {}
    for name in one.exemplar.structures:
        found = other.catalog.places([one.exemplar.key], other.structure(name).id)
        if one.exemplar.key not in found:
            raise LibraryCorruptError(
                f"exemplar '{one.exemplar.key}' of {other.path} has no memory of '{name}'. Run "
                "'recallseg library verify'."
            )
        place, digest = found[one.exemplar.key]
        record = other.reader.record(place)
        if digest_record(record) != digest:
            raise LibraryCorruptError(
                f"the memory of '{name}' of exemplar '{one.exemplar.key}' of {other.path} does not "
                "match its digest. Run 'recallseg library verify', and restore or rebuild it."
            )
        target = next(places)
        copied[name] = target, store.writer.append(target, record)
    return copied


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:6]) + (", ..." if len(keys) > 6 else "")


def _no_progress(done: int, total: int) -> None:
    """Tell nobody."""
