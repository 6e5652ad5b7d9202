"""Search indexes of a library: loaded when first used, kept up to date, saved by the writer.

Every structure has two, over the exemplars that show it and over those that say it is absent. All
are derived from the catalog; a missing, stale or damaged file costs time and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.index import (
    EXACT_LIMIT,
    StructureIndex,
    build_graph,
    extend_graph,
    file_digests,
    open_graph,
)
from recallseg.runtime.library.records import State, StoredIndex
from recallseg.runtime.library.storage import sync_directory, writing

__all__ = ["Retrieval"]

Slot = tuple[int, bool]


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
        self._bases: dict[Slot, StoredIndex] = {}
        self._tagged: dict[tuple[Slot, tuple[tuple[str, str], ...]], NDArray[np.int64]] = {}
        self._state = catalog.state()

    def refresh(self, state: State) -> None:
        """Bring every loaded index to the newest ``state``; call within a snapshot."""
        if state == self._state:
            return
        self._tagged.clear()
        if state.generation != self._state.generation:
            self._indexes.clear()
        for slot, index in list(self._indexes.items()):
            index.remove(self._catalog.removals(self._state.revision))
            index.add(*self._catalog.embeddings(*slot, after=index.last))
            if index.worn:
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
        if not self._folder.is_dir():
            return
        named = {
            stored.file
            for slot in self._catalog.stored_indexes()
            if (stored := self._catalog.stored_index(*slot)) is not None
        }
        with writing(self._folder):
            for path in self._folder.iterdir():
                if path.name not in named:
                    path.unlink()

    def check(self) -> tuple[int, list[str]]:
        """Compare every index file with its digest; return how many there are and what is wrong."""
        problems = []
        slots = self._catalog.stored_indexes()
        for slot in slots:
            stored = self._catalog.stored_index(*slot)
            if stored is None:
                continue
            path = self._folder / stored.file
            if not path.is_file() or file_digests(path, whole=True)[1] != stored.digest:
                problems.append(
                    f"search index {path} is missing or damaged; it is built anew when next "
                    "needed, or by 'recallseg library rebuild --index-only'."
                )
        return len(slots), problems

    def _allowed(self, slot: Slot, tags: Mapping[str, str]) -> NDArray[np.int64]:
        key = (slot, tuple(sorted(tags.items())))
        if key not in self._tagged:
            self._tagged[key] = self._catalog.numbers(*slot, tags)
        return self._tagged[key]

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
            index.add(*self._catalog.embeddings(*slot, after=stored.last))
        if index.many_removed:
            self._build(slot)
        elif index.worn:
            self._grow(slot, index, stored)
        else:
            self._indexes[slot] = index

    def _open(self, stored: StoredIndex | None, *, view: bool) -> Index | None:
        if stored is None:
            return None
        path = self._folder / stored.file
        if not path.is_file() or path.stat().st_size != stored.size:
            return None
        if file_digests(path, whole=False)[0] != stored.quick:
            return None
        return open_graph(path, self._dimension, stored.count, view=view)

    def _build(self, slot: Slot) -> None:
        with self._catalog.database.snapshot():
            revision = self._catalog.state().revision
            numbers, vectors = self._catalog.embeddings(*slot)
        index = StructureIndex(self._dimension, self._catalog.embeddings_of)
        if len(numbers) > EXACT_LIMIT:
            graph = build_graph((numbers, vectors))
            self._save(slot, graph, revision, int(numbers[-1]))
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
        path, temporary = self._folder / name, self._folder / "new.tmp"
        with writing(path):
            self._folder.mkdir(exist_ok=True)
            try:
                graph.save(str(temporary))
            except RuntimeError as error:  # what USearch raises when a write fails
                raise OSError(None, str(error)) from error
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            quick, digest = file_digests(temporary, whole=True)
            os.replace(temporary, path)
            sync_directory(self._folder)
        stored = StoredIndex(revision, last, len(graph), name, path.stat().st_size, quick, digest)
        self._catalog.store_index(structure, present, stored)
