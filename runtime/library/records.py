"""Rows of the catalog as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.digest import digest_json
from recallseg.engines.errors import LibraryCorruptError
from recallseg.engines.reading import reason
from recallseg.runtime.checks import check_key
from recallseg.runtime.library.encoding import MEMORY_FORMATS, MemoryLayout, Origin
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.values import hex_digest, integer, text
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["NewExemplar", "Settings", "State", "StoredIndex", "StructureRow", "exemplar_digest"]

LARGEST_SIZE, LARGEST_MEMORY = 2**20, 2**28
"""Of an embedding, or one axis of a memory; and numbers in a memory (at 1024 px: 4096 x 64)."""


@dataclass(frozen=True)
class Settings:
    """What a library was made with; a rebuild changes the first five.

    ``bundle_path`` is where the bundle lay, ``bundle_name`` what it is called; either opens it.
    """

    identity: str
    bundle_name: str
    bundle_path: str
    embedding_dim: int
    layout: MemoryLayout
    intensity: Mapping[str, Any]
    keep_sources: bool
    shard_bytes: int

    @property
    def format_version(self) -> int:
        """The lowest version of the catalog's format that can say this; see the database."""
        return 1 if self.layout.format == "fp16" else 2

    def to_text(self) -> str:
        """Return the fields as JSON text."""
        data = asdict(self)
        if self.format_version == 1:
            del data["layout"]["format"]  # which version 1 does not know
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Settings:
        """Rebuild from :meth:`to_text`; raises LibraryCorruptError for other fields."""
        try:
            data = json.loads(text)
            settings = cls(**{**data, "layout": MemoryLayout(**data["layout"])})
            settings._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LibraryCorruptError(
                f"the library's settings are damaged: {reason(error)}."
            ) from error
        return settings

    def _check(self) -> None:
        """Raise LibraryCorruptError, ValueError or TypeError for what no library was made with."""
        layout = self.layout
        sizes = (layout.tokens, layout.memory_dim, layout.pointer_dim, self.embedding_dim)
        for size in sizes:
            integer(size, "a size of embeddings or memories", 1, LARGEST_SIZE)
        integer(layout.tokens * layout.memory_dim, "the size of a memory", 1, LARGEST_MEMORY)
        integer(self.shard_bytes, "the size of a shard", 1)
        hex_digest(self.identity, "the identity of its bundle")
        text(self.bundle_name, "the name of its bundle", check_key)
        if (
            layout.format not in MEMORY_FORMATS
            or not isinstance(self.bundle_path, str)
            or not isinstance(self.keep_sources, bool)
        ):
            raise ValueError("memory format, bundle's path or keep_sources")
        Intensity.from_json(self.intensity)


@dataclass(frozen=True)
class State:
    """Counts of changes, of re-encodings and of exemplars; sum of the exemplars' digests."""

    revision: int
    generation: int
    exemplars: int
    digest_sum: int


@dataclass(frozen=True)
class StructureRow:
    """A structure's number and how many exemplars show it, or say that it is absent."""

    id: int
    name: str
    present: int
    absent: int


@dataclass(frozen=True)
class StoredIndex:
    """A search index on disk: it covers exemplars up to ``last`` as they were at ``revision``."""

    revision: int
    last: int
    count: int
    file: str
    size: int
    quick: bytes
    digest: bytes


@dataclass(frozen=True)
class NewExemplar:
    """An exemplar whose files are written and which becomes visible with the next commit.

    ``memories`` maps each structure shown to the place and digest of its memory; ``group`` is the
    keyed hash of what it belongs to.
    """

    number: int
    key: str
    content: str
    height: int
    width: int
    created: str
    source: bytes | None
    tags: Mapping[str, str]
    absent: tuple[str, ...]
    embedding: NDArray[np.float32]
    memories: Mapping[str, tuple[Place, bytes]]
    origin: Origin | None
    group: str | None = None

    @property
    def digest(self) -> bytes:
        """Digest of what was annotated, not of what an encoder made of it."""
        return exemplar_digest(self.key, self.content, self.tags)


def exemplar_digest(key: str, content: str, tags: Mapping[str, str]) -> bytes:
    """Return the SHA-256 of an exemplar's key, content digest and tags."""
    return bytes.fromhex(digest_json([key, content, dict(tags)]))
