"""Search indexes of a library: loaded when first used, kept up to date, saved by the writer.

Every structure has two, over the exemplars that show it and over those that say it is absent. All
are derived from the catalog; a missing, stale or damaged file costs time and nothing else. So does
one that was not built here: native code maps it, and crafted ones crash that, so only what this
user built is opened (``own``). A reader's own go to the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from recallseg.engines.durable import replace_file
from recallseg.engines.inside import (
    list_inside,
    make_folder_inside,
    open_inside,
    read_inside,
    remove_inside,
    replace_inside,
)
from recallseg.engines.paths import cache_folder
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.index import (
    EXACT_LIMIT,
    StructureIndex,
    Vectors,
    build_graph,
    extend_graph,
    file_digests,
    graph_settings,
    open_graph,
)
from recallseg.runtime.library.own import forget_index, knows_index, remember_index
from recallseg.runtime.library.records import State, StoredIndex
from recallseg.runtime.library.storage import writing

__all__ = ["Retrieval"]

Slot = tuple[int, bool]

_TEMPORARY = "new.tmp"
_CACHED = "indexes"
_NAME = re.compile(r"[0-9]+-(present|absent)-[0-9]+-[0-9]+-[0-9]+\.usearch")


class Retrieval:
    """Searches for a library. Not thread-safe: the library holds its lock around each call.

    Parameters
    ----------
    catalog : what the indexes are derived from.
    folder : where their files lie.
    dimension : D.
    """

    def __init__(self, catalog: Catalog, folder: Path, dimension: int) -> None:
        self._catalog = catalog
        self._folder = folder
        self._dimension = dimension
        self._indexes: dict[Slot, StructureIndex] = {}
        self._tagged: dict[tuple[Slot, tuple[tuple[str, str], ...]], NDArray[np.int64]] = {}
        self._state = catalog.state()

    def refresh(self, state: State) -> None:
        """Bring every loaded index to the newest ``state``; call within a snapshot."""
        if state == self._state:
            return
        self._tagged.clear()
        if state.generation != self._state.generation:
            self._indexes.clear()
        counts = self._counts() if self._indexes else {}
        for slot, index in list(self._indexes.items()):
            index.remove(self._catalog.removals(self._state.revision))
            index.add(*self._catalog.embeddings(*slot, after=index.last))
            if index.worn or len(index) != counts.get(slot):  # or older ones were reinstated
                del self._indexes[slot]
        self._state = state

    def prepare(self, structure: int) -> None:
        """Load a structure's indexes; may build and save them, so not within a snapshot."""
        for present in (True, False):
            self._index((structure, present))

    def size(self, structure: int, present: bool, tags: Mapping[str, str]) -> int:
        """Return how many exemplars a search can find."""
        if tags:
            return len(self._allowed((structure, present), tags))
        return len(self._index((structure, present)))

    def search(
        self,
        vector: NDArray[np.float32],
        structure: int,
        present: bool,
        k: int,
        tags: Mapping[str, str],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return numbers and distances of the ``k`` nearest exemplars that have all ``tags``."""
        slot = (structure, present)
        return self._index(slot).search(vector, k, self._allowed(slot, tags) if tags else None)

    def rebuild(self) -> None:
        """Build and save every index anew from the catalog."""
        self._indexes.clear()
        for row in self._catalog.structures():
            for present in (True, False):
                self._build((row.id, present))
        self.clean()

    def save_worn(self) -> None:
        """Save a new index of each structure for which search would otherwise become slow."""
        for row in self._catalog.structures():
            for present, count in ((True, row.present), (False, row.absent)):
                stored = self._catalog.stored_index(row.id, present)
                if count - (stored.count if stored else 0) > EXACT_LIMIT:
                    self._index((row.id, present))
        self.clean()

    def clean(self) -> None:
        """Delete index files that the catalog does not name."""
        with writing(self._folder):
            for name in [*self.unnamed(), _TEMPORARY]:
                remove_inside(self._folder.parent, f"{self._folder.name}/{name}")

    def unnamed(self) -> list[str]:
        """Return the names of index files that the catalog does not name; OSError as it comes."""
        files = list_inside(self._folder.parent, self._folder.name)
        named = {
            stored.file
            for slot in self._catalog.stored_indexes()
            if (stored := self._catalog.stored_index(*slot)) is not None
        }
        return [name for name in files if _NAME.fullmatch(name) and name not in named]

    def check(self) -> tuple[int, list[str]]:
        """Compare every index file with its digest; return how many there are and what is wrong."""
        problems = []
        slots = self._catalog.stored_indexes()
        for slot in slots:
            now = self._catalog.stored_index(*slot)
            while (stored := now) is not None:
                try:
                    intact = bool(_NAME.fullmatch(stored.file)) and (
                        file_digests(self._folder / stored.file, whole=True)[1] == stored.digest
                    )
                except OSError:
                    intact = False
                now = stored if intact else self._catalog.stored_index(*slot)
                if now == stored:  # else another process has saved a newer one meanwhile
                    break
            if stored is not None and not intact:
                problems.append(
                    f"search index {self._folder / stored.file!s} is missing or damaged; it is "
                    "built anew when next "
                    "needed, or by 'recallseg library rebuild --index-only'."
                )
        return len(slots), problems

    def _allowed(self, slot: Slot, tags: Mapping[str, str]) -> NDArray[np.int64]:
        key = (slot, tuple(sorted(tags.items())))
        if key not in self._tagged:
            self._tagged[key] = self._catalog.numbers(*slot, tags)
        return self._tagged[key]

    def _counts(self) -> dict[Slot, int]:
        """Return how many exemplars each index must have."""
        return {
            (row.id, present): count
            for row in self._catalog.structures()
            for present, count in ((True, row.present), (False, row.absent))
        }

    def _index(self, slot: Slot) -> StructureIndex:
        if slot not in self._indexes:
            self._load(slot)
        return self._indexes[slot]

    def _load(self, slot: Slot) -> None:
        stored = self._catalog.stored_index(*slot)
        graph = self._open(stored, view=True)
        if stored is None or graph is None:
            self._build(slot)
            return
        index = StructureIndex(self._dimension, self._catalog.embeddings_of, graph, stored.last)
        with self._catalog.database.snapshot():
            index.remove(self._catalog.removals(stored.revision))
            numbers, vectors = self._catalog.embeddings(*slot, after=stored.last)
            index.add(numbers, vectors)
            count = self._counts().get(slot)
        if np.any(graph.contains(numbers.astype(np.uint64))):
            self._build(slot)  # the catalog says less of the graph than is in it
        elif len(index) != count:
            self._build(slot)  # it was built while some were retired that are reinstated
        elif index.many_removed:
            self._build(slot)
        elif index.worn:
            self._grow(slot, index, stored)
        else:
            self._indexes[slot] = index

    def _open(self, stored: StoredIndex | None, *, view: bool) -> Index | None:
        if stored is None or not _NAME.fullmatch(stored.file):
            return None
        return self._open_own(self._folder / stored.file, stored, view=view)

    def _open_own(self, path: Path, stored: StoredIndex, *, view: bool) -> Index | None:
        """Open a graph if this user built it and it is what it was; None otherwise."""
        try:
            found = _stat(path)
            own = knows_index(stored.digest, found)
            if own is False or found.st_size != stored.size:
                return None
            quick, digest = file_digests(path, whole=own is None)
        except OSError:
            return None
        if quick != stored.quick or (own is None and digest != stored.digest):
            return None
        if own is None:
            remember_index(stored.digest, found)
        return open_graph(path, self._dimension, stored.count, view=view)

    def _build(self, slot: Slot) -> None:
        with self._catalog.database.snapshot():
            revision = self._catalog.state().revision
            numbers, vectors = self._catalog.embeddings(*slot)
        index = StructureIndex(self._dimension, self._catalog.embeddings_of)
        if len(numbers) > EXACT_LIMIT:
            if self._catalog.database.writable:
                graph = build_graph((numbers, vectors))
                self._save(slot, graph, revision, int(numbers[-1]))
            else:
                graph = self._cached((numbers, vectors))
            index = StructureIndex(
                self._dimension, self._catalog.embeddings_of, graph, int(numbers[-1])
            )
        else:
            index.add(numbers, vectors)
        self._indexes[slot] = index

    def _grow(self, slot: Slot, index: StructureIndex, stored: StoredIndex) -> None:
        """Add the tail to the graph. Removed exemplars stay left out, so its revision stays too."""
        graph = self._open(stored, view=False)
        if graph is None:
            self._build(slot)
            return
        extend_graph(graph, index.tail)
        self._save(slot, graph, stored.revision, index.last)
        grown = StructureIndex(self._dimension, self._catalog.embeddings_of, graph, index.last)
        grown.remove(self._catalog.removals(stored.revision))
        self._indexes[slot] = grown

    def _save(self, slot: Slot, graph: Index, revision: int, last: int) -> None:
        if not self._catalog.database.writable:
            return
        structure, present = slot
        kind = "present" if present else "absent"
        name = f"{structure}-{kind}-{self._state.generation}-{revision}-{last}.usearch"
        path = self._folder / name
        with writing(path):
            quick, digest = _write(graph, self._folder, name)
            size = path.stat().st_size
        before = self._catalog.stored_index(*slot)
        stored = StoredIndex(revision, last, len(graph), name, size, quick, digest)
        self._catalog.store_index(structure, present, stored)
        if before is not None and before.digest != digest:
            forget_index(before.digest)
        if before is not None and before.file != name and _NAME.fullmatch(before.file):
            with writing(path):
                remove_inside(self._folder.parent, f"{self._folder.name}/{before.file}")

    def _cached(self, vectors: Vectors) -> Index:
        """Return a graph from the user's cache, where it goes if the library cannot be written."""
        key = hashlib.sha256(json.dumps(graph_settings(), sort_keys=True).encode())
        for array in vectors:
            key.update(np.ascontiguousarray(array).data)
        folder, name = cache_folder() / _CACHED, key.hexdigest()
        try:
            note = json.loads(read_inside(folder.parent, f"{_CACHED}/{name}.json", 2**16))
            stored = StoredIndex(
                0, 0, len(vectors[0]), name, note["bytes"], *map(bytes.fromhex, note["digests"])
            )
            graph = self._open_own(folder / name, stored, view=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            graph = None
        if graph is None:
            graph = build_graph(vectors)
            with suppress(OSError):  # a cache that cannot be written is one that is not there
                folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                digests = [digest.hex() for digest in _write(graph, folder, name)]
                note = {"bytes": (folder / name).stat().st_size, "digests": digests}
                replace_file(folder / f"{name}.json", json.dumps(note).encode(), mode=0o600)
        return graph


def _write(graph: Index, folder: Path, name: str) -> tuple[bytes, bytes]:
    """Save a graph durably, note that it was built here, and return the file's digests."""
    root, temporary = folder.parent, f"{folder.name}/{_TEMPORARY}"
    make_folder_inside(root, folder.name)
    remove_inside(root, temporary)
    # USearch opens it by its path: what is there by then is this new, ordinary file.
    os.close(open_inside(root, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        try:
            graph.save(str(root / temporary))
        except RuntimeError as error:  # what USearch raises when a write fails, but not the last
            raise _cut_off(str(error)) from error
        descriptor = open_inside(root, temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if open_graph(root / temporary, graph.ndim, len(graph), view=True) is None:
            raise _cut_off("the file is not what was to be written")
        quick, digest = file_digests(root / temporary, whole=True)
        replace_inside(root, temporary, f"{folder.name}/{name}")
    except BaseException:
        with suppress(OSError):  # a full disk needs the space
            remove_inside(root, temporary)
        raise
    remember_index(digest, _stat(folder / name))
    return quick, digest


def _cut_off(said: str) -> OSError:
    """Return the error of an index that USearch did not write whole; it does not say why."""
    return OSError(None, f"the index was cut off ({said}); the disk or quota is full, most likely")


def _stat(path: Path) -> os.stat_result:
    descriptor = open_inside(path.parents[1], f"{path.parent.name}/{path.name}")
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)
