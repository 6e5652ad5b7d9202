"""What reading a library takes: its state, its exemplars, search and recall."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_json
from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryMismatchError,
)
from recallseg.engines.pixels import open_pixels
from recallseg.runtime.checks import check_tags
from recallseg.runtime.library.binding import find_bundle
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.encoding import ExemplarEncoder
from recallseg.runtime.library.exemplar import Exemplar, Match
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.records import StructureRow
from recallseg.runtime.library.retrieval import Retrieval
from recallseg.runtime.library.shards import Place, ShardReader, ShardWriter
from recallseg.runtime.library.sources import SourceStore
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["CATALOG", "INDEX", "LOCK", "MEMORIES", "SOURCES", "LibraryReading"]

CATALOG, LOCK, MEMORIES, SOURCES, INDEX = (
    "library.sqlite",
    "writer.lock",
    "memories",
    "sources",
    "index",
)
_PAGE = 256


class LibraryReading:
    """The reading half of :class:`recallseg.runtime.library.Library`."""

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        lock: WriterLock | None,
        bundle: Bundle | None,
        encoder: ExemplarEncoder | None,
        make_encoder: Callable[[Bundle, Intensity], ExemplarEncoder],
    ) -> None:
        self.path = path
        self._catalog = catalog
        self._writer_lock = lock
        self._bundle = bundle
        self._make_encoder = make_encoder
        self._encoder = encoder
        self._lock = threading.RLock()
        self._sources = SourceStore(path / SOURCES)
        self._load()

    def _load(self) -> None:
        self._settings = self._catalog.settings()
        self._state = self._catalog.state()
        self._version = self._catalog.version()
        self._structures = {row.name: row for row in self._catalog.structures()}
        self._places: dict[str, dict[str, Place]] = {}
        self._reader = ShardReader(self.path / MEMORIES, self._settings.layout)
        self._pixels = open_pixels()
        self._writer = ShardWriter(
            self.path / MEMORIES, self._settings.layout, self._settings.shard_bytes
        )
        self._retrieval = Retrieval(self._catalog, self.path / INDEX, self._settings.embedding_dim)

    # What it is

    @property
    def bundle(self) -> Bundle:
        """The bundle it belongs to; raises BundleError or LibraryMismatchError if it is gone."""
        if self._bundle is None:
            self._bundle = find_bundle(self._settings, self.path)
        return self._bundle

    @property
    def bundle_identity(self) -> str:
        """Identity of the bundle that it belongs to, known without opening that."""
        return self._settings.identity

    @property
    def intensity(self) -> Intensity:
        """The rule from pixel values to 0..1 for exemplars and queries."""
        return Intensity.from_json(self._settings.intensity)

    @property
    def keeps_sources(self) -> bool:
        """Whether images and masks are stored."""
        return self._settings.keep_sources

    @property
    def memory_format(self) -> str:
        """How memories are stored: ``fp16``, or ``int8`` with a scale per token."""
        return self._settings.layout.format

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writer_lock is not None

    @property
    def structures(self) -> tuple[str, ...]:
        """Structures that at least one exemplar shows, in order of first addition."""
        self.refresh()
        return tuple(row.name for row in self._structures.values() if row.present)

    @property
    def digest(self) -> str:
        """Digest over exemplars and intensity rule, as of the last call: hex.

        Equal for equal annotations under equal keys and tags, in whatever order they were added.
        """
        return digest_json(
            [dict(self._settings.intensity), self._state.exemplars, f"{self._state.digest_sum:x}"]
        )

    def count(self, structure: str, *, absent: bool = False) -> int:
        """Return how many exemplars show a structure, or say that it is absent."""
        self.refresh()
        row = self._structures.get(structure)
        return 0 if row is None else row.absent if absent else row.present

    def __len__(self) -> int:
        self.refresh()
        return self._state.exemplars

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._catalog.number(key) is not None

    def __iter__(self) -> Iterator[Exemplar]:
        """Yield exemplars in order of addition; changes made meanwhile may be seen or not."""
        after = 0
        while page := self._page(after):
            yield from (exemplar for _, exemplar in page)
            after = page[-1][0]

    def get(self, key: str) -> Exemplar:
        """Return one exemplar; raises InputError if there is no such key."""
        exemplar = self._catalog.exemplar(key)
        if exemplar is None:
            raise unknown_key(key)
        return exemplar

    def source(self, key: str) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]]:
        """Return image and masks as they were added.

        Raises
        ------
        InputError
            If there is no such key, or sources were not kept.
        LibraryCorruptError
            If the stored file is missing or damaged.
        """
        number = self._number(key)
        digest = self._catalog.source_digest(number)
        if digest is None:
            raise InputError(f"the library {self.path} did not keep the image of exemplar '{key}'.")
        return self._sources.read(number, digest, key)

    def embeddings(
        self, structure: str, *, absent: bool = False
    ) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Return keys and embeddings (N x D, unit length) of the exemplars that show a structure.

        ``absent`` asks for those instead that say it is absent.
        """
        self.refresh()
        row = self._structure(structure)
        with self._catalog.database.snapshot():
            numbers, vectors = self._catalog.embeddings(row.id, not absent)
            return tuple(self._catalog.keys(numbers.tolist())), vectors

    # Recall

    def refresh(self) -> bool:
        """See what other processes have committed; return whether there was anything.

        Every method does so by itself. Costs some ten microseconds when there is nothing new.

        Raises
        ------
        LibraryMismatchError
            If it has been rebuilt for another bundle since it was opened.
        """
        with self._lock:
            version = self._catalog.version()
            if version == self._version:
                return False
            with self._catalog.database.snapshot():
                return self._see(version)

    def search(
        self,
        embedding: NDArray[np.float32],
        structure: str,
        k: int,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> list[Match]:
        """Return the k nearest exemplars that show a structure, nearest first.

        Between them stand, with ``absent`` set, exemplars that say the structure is absent and are
        nearer than the last of the k (at most k of these).

        Parameters
        ----------
        embedding : D float, of any length but 0.
        structure : as it was named when added.
        k : 1 to :meth:`count` of the structure.
        tags : only exemplars that have all of these.

        Raises
        ------
        InputError
            For an unknown structure, a k that is 0 or more than there is, or an unusable embedding.
        """
        with self._lock:
            vector = self._unit(embedding)
            wanted = check_tags(tags)
            self.refresh()
            row = self._structure(structure)
            retrieval = self._retrieval
            retrieval.prepare(row.id)
            with self._catalog.database.snapshot():
                self._see(self._catalog.version())
                available = retrieval.size(row.id, True, wanted)
                if (
                    isinstance(k, bool)
                    or not isinstance(k, (int, np.integer))
                    or not 1 <= k <= available
                ):
                    tagged = f" with tags {wanted}" if wanted else ""
                    raise InputError(
                        f"k = {k}, but {available} exemplars show '{structure}'{tagged}. Choose k "
                        "from 1 to that number, or annotate more images."
                    )
                numbers, distances = retrieval.search(vector, row.id, True, int(k), wanted)
                without, farther = retrieval.search(vector, row.id, False, int(k), wanted)
                nearer = farther <= distances[-1]
                both = [*zip(distances.tolist(), numbers.tolist(), strict=True)]
                both += zip(farther[nearer].tolist(), without[nearer].tolist(), strict=True)
                found = self._catalog.found([number for _, number in both], row.id)
            places = self._places.setdefault(structure, {})
            matches = []
            for distance, number in sorted(both):
                key, place = found[number]
                if place is not None:
                    places[key] = place
                matches.append(Match(key, distance, place is None))
            return matches

    def gather(
        self,
        keys: Sequence[str],
        structure: str,
        memories_out: NDArray[Any],
        pointers_out: NDArray[np.float32],
    ) -> None:
        """Copy memories of exemplars, from memory-mapped files, into the caller's buffers.

        Parameters
        ----------
        keys : k exemplars that show ``structure``, as :meth:`search` names them.
        memories_out : k x T x memory_dim, float32 or float16, C-contiguous.
        pointers_out : k x C float32.

        Raises
        ------
        InputError
            For a key or structure without a memory, or buffers of another shape or dtype.
        LibraryCorruptError
            If a shard is missing or cut off.
        """
        self._check_buffers(len(keys), memories_out, pointers_out)
        tokens, scales = [], []
        for row, key in enumerate(keys):
            try:
                record = self._reader.record(self._place(key, structure, keys))
            except LibraryCorruptError:
                if not self.refresh():
                    raise
                # Compacted by another process since the search: the memory has moved.
                record = self._reader.record(self._place(key, structure, keys))
            tokens.append(record["tokens"])
            pointers_out[row] = record["pointer"]
            if self.memory_format == "int8":
                scales.append(record["scales"])
        self._pixels.gather(tokens, memories_out, scales or None)

    # Inside

    def _see(self, version: int) -> bool:
        """Read the state that belongs to ``version``; call within a snapshot."""
        state = self._catalog.state()
        self._version = version
        if state == self._state:
            return False
        settings = self._catalog.settings()
        if settings.identity != self._settings.identity:
            raise LibraryMismatchError(
                f"the library {self.path} has been rebuilt for bundle '{settings.bundle_name}' "
                "since it was opened. Open it again."
            )
        self._places.clear()
        self._structures = {row.name: row for row in self._catalog.structures()}
        self._retrieval.refresh(state)
        self._state = state
        return True

    def _page(self, after: int) -> list[tuple[int, Exemplar]]:
        with self._catalog.database.snapshot():
            return self._catalog.exemplars(after, _PAGE)

    def _number(self, key: str) -> int:
        number = self._catalog.number(key)
        if number is None:
            raise unknown_key(key)
        return number

    def _structure(self, name: str) -> StructureRow:
        row = self._structures.get(name)
        if row is None:
            known = ", ".join(self._structures) or "none yet"
            raise InputError(f"no exemplar is annotated for '{name}'; the library knows: {known}.")
        return row

    def _unit(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        size = self._settings.embedding_dim
        if not isinstance(embedding, np.ndarray) or embedding.shape != (size,):
            shape = getattr(embedding, "shape", type(embedding).__name__)
            raise InputError(
                f"an embedding of this library is an array of {size} numbers, got {shape}."
            )
        vector = embedding.astype(np.float32)
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0.0:
            raise InputError(f"the embedding has length {length}; expected a finite one above 0.")
        unit: NDArray[np.float32] = vector / np.float32(length)
        return unit

    def _place(self, key: str, structure: str, keys: Sequence[str]) -> Place:
        place = self._places.get(structure, {}).get(key)
        if place is not None:
            return place
        with self._lock:
            self.refresh()
            row = self._structure(structure)
            places = self._places.setdefault(structure, {})
            places.update(self._catalog.places(keys, row.id))
            if key not in places:
                self._number(key)
                raise InputError(
                    f"exemplar '{key}' has no mask of '{structure}', so no memory of it."
                )
            return places[key]

    def _check_buffers(self, k: int, memories: NDArray[Any], pointers: NDArray[Any]) -> None:
        layout = self._settings.layout
        wanted = (k, layout.tokens, layout.memory_dim)
        if memories.shape != wanted or memories.dtype not in (np.float32, np.float16):
            raise InputError(
                f"memories_out must be float32 or float16 of shape {wanted}, got {memories.dtype} "
                f"of shape {memories.shape}."
            )
        if pointers.shape != (k, layout.pointer_dim) or pointers.dtype != np.float32:
            raise InputError(
                f"pointers_out must be float32 of shape {(k, layout.pointer_dim)}, got "
                f"{pointers.dtype} of shape {pointers.shape}."
            )
        if not memories.flags.c_contiguous:
            raise InputError("memories_out must be C-contiguous.")
