"""Work on a whole library: clean up after a crash, verify, compact, encode anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import LibraryCorruptError, LibraryError
from recallseg.engines.inside import list_inside, remove_inside, sync_inside
from recallseg.engines.reading import reason
from recallseg.runtime.library.ahead import encode_ahead
from recallseg.runtime.library.binding import Binding, bundle_settings, open_bundle
from recallseg.runtime.library.catalog import ADDING, Catalog
from recallseg.runtime.library.encoding import Encoded, ExemplarEncoder, check_encoded
from recallseg.runtime.library.exemplar import Exemplar, LibraryReport
from recallseg.runtime.library.heads import Heads
from recallseg.runtime.library.history import history
from recallseg.runtime.library.records import Settings
from recallseg.runtime.library.shards import (
    Place,
    ShardReader,
    ShardWriter,
    digest_record,
    is_shard,
    pack,
    shard_file,
)
from recallseg.runtime.library.sources import SourceStore
from recallseg.runtime.library.storage import unreadable, writing
from recallseg.runtime.library.store import INDEX, Store
from recallseg.runtime.library.values import integer

__all__ = ["append", "compact", "rebuild", "rebuild_index", "reclaim", "verify", "write_memories"]

_PAGE = 256
_MOMENT_S = 0.2

Progress = Callable[[int, int], None]


def append(
    catalog: Catalog, writer: ShardWriter, encoded: Encoded, generation: int
) -> dict[str, tuple[Place, bytes]]:
    """Write an exemplar's memories durably; return their places and digests by structure."""
    places = catalog.allocate(len(encoded.memories), writer.capacity, generation)
    written = write_memories(writer, iter(places), encoded)
    for shard in {place.shard for place in places}:
        writer.sync(shard)
    return written


def write_memories(
    writer: ShardWriter, places: Iterator[Place], encoded: Encoded
) -> dict[str, tuple[Place, bytes]]:
    """Write an exemplar's memories at the next places, not durably yet; return as above."""
    written = {}
    for name, memory in encoded.memories.items():
        place = next(places)
        record = pack(writer.layout, memory, encoded.pointers[name])
        written[name] = place, writer.append(place, record)
    return written


def reclaim(store: Store) -> None:
    """Delete what a writer that died left behind: files that the catalog does not name."""
    catalog, memories = store.catalog, store.memories
    with writing(memories):
        catalog.check_room()
        _remove_unnamed(memories, catalog)
    _remove_stray(store)
    store.identifiers.clear_remains()


def _remove_stray(store: Store) -> None:
    """Delete images of exemplars that were removed, and of those that were not added in full.

    A number beyond is of an exemplar that this catalog never knew: it is an older one, restored
    from a backup, and the image may be the only copy.
    """
    following, adding = store.catalog.next_number(), store.catalog.adding()
    for number in store.sources.stray(store.catalog.with_sources):
        if number <= following or number in adding:
            store.sources.remove(number)
    if adding:
        store.catalog.set_note(ADDING, None)


def compact(store: Store) -> int:
    """Copy the memories in use to new shards and delete the others; return the bytes freed."""
    store.check_writable("compact")
    with store.changing, store.lock, writing(store.memories):
        freed = _compact(
            store.catalog, store.reader, store.writer, store.memories, store.state.generation
        )
        store.see_newest()
        _remove_stray(store)
        return freed


def _compact(
    catalog: Catalog, reader: ShardReader, writer: ShardWriter, memories: Path, generation: int
) -> int:
    before = _shard_bytes(memories)
    moves: list[tuple[Place, Place]] = []
    after, target = 0, None
    while page := catalog.memories(after, _PAGE):
        for number, name, place, digest in page:
            if target is None:
                target = catalog.allocate(1, writer.capacity, generation, fresh=True)[0]
            elif target.slot + 1 < writer.capacity:
                target = Place(target.shard, target.slot + 1)
            else:
                writer.sync(target.shard)
                target = Place(target.shard + 1, 0)
            if writer.append(target, reader.record(place)) != digest:
                raise LibraryError(
                    f"the memory of '{name}' of exemplar number {number} does not match its "
                    "digest. Run 'recallseg library verify', remove or rebuild what it names, "
                    "then compact."
                )
            moves.append((place, target))
            after = number
    if target is not None:
        writer.sync(target.shard)
    catalog.move(moves, generation)
    _remove_unnamed(memories, catalog)
    return before - _shard_bytes(memories)


def rebuild(
    store: Store,
    binding: Binding,
    bundle: Bundle | str | Path | None,
    encoder: ExemplarEncoder | None,
    progress: Progress | None,
) -> None:
    """Encode every exemplar anew for a bundle, None for the one that it belongs to."""
    store.check_writable("rebuild")
    if not store.settings.keep_sources:
        raise LibraryError(
            f"the library {store.path} did not keep its images, so they cannot be encoded "
            "anew. Make a new library and add them."
        )
    target = binding.bundle if bundle is None else open_bundle(bundle)
    with store.changing:
        settings = Settings(
            **bundle_settings(target, store.settings.layout.format),
            intensity=store.settings.intensity,
            keep_sources=True,
            shard_bytes=store.settings.shard_bytes,
        )
        if encoder is None and bundle is not None:
            encoder = binding.make_encoder(target)
        encoder = encoder or binding.encoder()
        writer = ShardWriter(store.memories, settings.layout, settings.shard_bytes)
        generation = _encode_all(
            store.catalog, store.sources, writer, settings, encoder, progress or _no_progress
        )
        with store.lock:
            store.catalog.switch(generation, settings)
            binding.change(target, encoder)
            store.load()
            reclaim(store)
            store.retrieval.rebuild()


def rebuild_index(store: Store) -> None:
    """Build the search indexes anew."""
    store.check_writable("rebuild the index")
    with store.changing, store.lock:
        store.retrieval.rebuild()


def _encode_all(
    catalog: Catalog,
    sources: SourceStore,
    writer: ShardWriter,
    settings: Settings,
    encoder: ExemplarEncoder,
    progress: Progress,
) -> int:
    """Encode every exemplar for ``settings`` as a new generation, and return that."""
    generation = _begin_generation(catalog, settings)
    total = catalog.state().exemplars + len(catalog.retired_numbers())
    done = total - catalog.count_not_encoded(generation)

    def missing() -> Iterator[tuple[int, NDArray[Any], dict[str, NDArray[np.bool_]]]]:
        after = 0
        while page := catalog.not_encoded(generation, _PAGE, after):
            for after, exemplar in page:
                digest = catalog.source_digest(after)
                if digest is None:
                    raise LibraryError(f"the image of exemplar '{exemplar.key}' was not kept.")
                names = catalog.names_in_source(after)
                yield after, *sources.read(after, digest, exemplar.key, names)

    progress(done, total)
    with closing(
        encode_ahead(encoder, missing(), total - done, lambda one: (one[1], one[2]))
    ) as made:
        for (number, _, masks), found in made:
            encoded = check_encoded(found, tuple(masks), settings.embedding_dim, settings.layout)
            memories = append(catalog, writer, encoded, generation)
            with catalog.database.transaction():
                catalog.add_encoding(
                    number, generation, encoded.embedding, memories, encoded.origin
                )
            done += 1
            progress(done, total)
    return generation


def verify(store: Store, progress: Progress | None) -> LibraryReport:
    """Compare everything with its digest, whatever is done to it meanwhile. Changes nothing."""
    store.refresh()
    return _verify(store, progress or _no_progress)


def _verify(store: Store, progress: Progress) -> LibraryReport:
    catalog = store.catalog
    with store.lock:
        problems = [
            f"catalog: {row[0]}"
            for row in catalog.database.execute("PRAGMA integrity_check")
            if row[0] != "ok"
        ]
        total, wrong = _check_sum(catalog)
    problems += wrong
    memories, kept, seen, after = 0, 0, 0, 0
    while True:
        with store.lock:
            rows, wrong = _verify_page(store, after)
        if not rows.page:
            break
        problems += wrong
        memories += len(rows.memories)
        kept += len(rows.sources)
        for _ in rows.page:
            seen += 1
            progress(seen, max(seen, total))
        after = rows.page[-1][0]
    with store.lock:
        if misplaced := catalog.misplaced():
            problems.append(
                f"catalog: {misplaced} memories lie outside of their shard or where another lies"
            )
        try:
            history(catalog)
        except LibraryCorruptError as error:
            problems.append(str(error))
        indexes, found = store.retrieval.check()
        heads, spoilt = Heads(store).check()
    problems += spoilt + found + _unnamed(store)
    return LibraryReport(seen, memories, kept, indexes, heads, tuple(problems))


def _check_sum(catalog: Catalog) -> tuple[int, list[str]]:
    """Return how many exemplars there are, and whether their digests add up to the library's."""
    count, digests, after = 0, 0, 0
    with catalog.database.snapshot():
        state, retired = catalog.state(), {*catalog.retired_numbers()}
        while page := catalog.exemplars(after, _PAGE):
            for after, _ in page:
                if after not in retired:
                    count += 1
                    digests += int.from_bytes(catalog.exemplar_digest(after), "big")
    problems = []
    if count != state.exemplars or digests % (1 << 256) != state.digest_sum:
        problems.append(
            f"catalog: {count} exemplars in use found, whose digests do not add up to the library's"
        )
    return count + len(retired), problems


class _Rows(NamedTuple):
    """What the catalog says of some exemplars, in one state."""

    page: list[tuple[int, Exemplar]]
    memories: list[tuple[int, str, Place, bytes]]
    sources: dict[int, bytes]
    problems: list[str]


def _rows(store: Store, after: int) -> _Rows:
    catalog = store.catalog
    with catalog.database.snapshot():
        page = catalog.exemplars(after, _PAGE)
        digests = {number: catalog.source_digest(number) for number, _ in page}
        return _Rows(
            page,
            catalog.memories(after, _PAGE),
            {number: digest for number, digest in digests.items() if digest is not None},
            catalog.check_rows(page, store.settings.embedding_dim),
        )


def _verify_page(store: Store, after: int) -> tuple[_Rows, list[str]]:
    """Compare some exemplars with their digests; return what the catalog says, and what is wrong.

    Another process may remove, replace or move them meanwhile: what is wrong is looked at again,
    until the catalog says the same before and after.
    """
    rows = _rows(store, after)
    while True:
        problems = rows.problems + _check_files(store, rows)
        before, rows = rows, _rows(store, after) if problems else rows
        if rows == before:
            return rows, problems


def _check_files(store: Store, rows: _Rows) -> list[str]:
    keys, problems = {number: exemplar.key for number, exemplar in rows.page}, []
    for number, name, place, digest in rows.memories:
        if number not in keys:
            continue
        try:
            intact = digest_record(store.reader.record(place)) == digest
        except LibraryError as error:
            problems.append(f"memory of '{name}' of exemplar '{keys[number]}': {error}")
        else:
            if not intact:
                problems.append(
                    f"memory of '{name}' of exemplar '{keys[number]}' does not match its digest"
                )
    for number, source in rows.sources.items():
        try:
            store.sources.read(number, source, keys[number], {})
        except LibraryError as error:
            problems.append(str(error))
    return problems


def _unnamed(store: Store) -> list[str]:
    """Return what is wrong with files that nothing names, though no writer is at work on them."""
    try:
        found = _unnamed_files(store)
        if found:
            time.sleep(_MOMENT_S)  # another process may be between a commit and what it deletes
            again = _unnamed_files(store)
            found = {path: why for path, why in found.items() if path in again}
    except OSError as error:
        raise unreadable(str(store.path), error, "Restore it.") from error
    return [f"{path} {why}" for path, why in found.items()]


def _unnamed_files(store: Store) -> dict[Path, str]:
    goes = "it is deleted when the library is next opened for writing."
    found = {}
    stray, following = store.sources.stray(store.catalog.with_sources), store.catalog.next_number()
    adding = store.catalog.adding()
    for number in stray:
        if number in adding:
            continue  # being added, or deleted when the library is next opened for writing
        if number < following:
            found[store.sources.file(number)] = f"is the image of a removed exemplar; {goes}"
        elif number > following:
            found[store.sources.file(number)] = (
                "is an image that the catalog knows nothing of. If the catalog was restored from a "
                "backup, keep a copy before anything is added; else delete it."
            )
    names = [name for name in list_inside(store.path, store.memories.name) if is_shard(name)]
    named = {shard_file(store.memories, shard).name for shard in store.catalog.shards()}
    newest = store.catalog.last_shard()
    for name in names:
        if name not in named and int(name.partition(".")[0]) <= newest:
            found[store.memories / name] = f"holds memories that the catalog does not name; {goes}"
    for name in store.retrieval.unnamed():
        found[store.path / INDEX / name] = (
            "is a search index that the catalog does not name; it is deleted when a library that "
            "was opened for writing is closed."
        )
    return found


def _begin_generation(catalog: Catalog, settings: Settings) -> int:
    """Return the generation to fill: an interrupted one for the same bundle, or a new one."""
    pending, now = _pending(catalog.note("rebuild")), catalog.state().generation
    if pending is not None and pending[0] == settings.identity:
        return integer(pending[1], "the generation of an unfinished rebuild", now + 1)
    generation = now + 1
    with catalog.database.transaction():
        if pending is not None:
            unfinished = integer(pending[1], "the generation of an unfinished rebuild", now + 1)
            catalog.discard(unfinished)
            generation = unfinished + 1
        catalog.set_note(
            "rebuild", json.dumps({"identity": settings.identity, "generation": generation})
        )
    return generation


def _pending(text: str | None) -> tuple[Any, Any] | None:
    """Return identity and generation of an unfinished rebuild; None if there is none."""
    try:
        noted = json.loads(text) if text else None
        return None if noted is None else (noted["identity"], noted["generation"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LibraryCorruptError(
            f"the catalog's note on an unfinished rebuild is damaged: {reason(error)}. Restore the "
            "library from a backup, or ask for it anew from who made it."
        ) from error


def _remove_unnamed(memories: Path, catalog: Catalog) -> None:
    """Delete shards that the catalog does not name; what is no shard is not ours to delete."""
    named = {shard_file(memories, shard).name for shard in catalog.shards()}
    names = list_inside(memories.parent, memories.name)
    for name in names:
        if is_shard(name) and name not in named:
            remove_inside(memories.parent, f"{memories.name}/{name}")
    if names:
        sync_inside(memories.parent, memories.name)


def _shard_bytes(memories: Path) -> int:
    names = list_inside(memories.parent, memories.name)
    return sum((memories / name).lstat().st_size for name in names if is_shard(name))


def _no_progress(done: int, total: int) -> None:
    """Tell nobody."""
