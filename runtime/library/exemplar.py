"""What a library tells about its exemplars, what it recalls, and its health."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.frozen import public
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.shards import MappedShard, Record

__all__ = ["Exemplar", "Found", "LibraryReport", "Match", "Recollection", "StoredMemory"]


@public
@dataclass(frozen=True)
class Exemplar:
    """One annotated image of a library.

    Attributes
    ----------
    key : its name in the library.
    structures : structures that it shows, with a mask each.
    absent : structures that it is known not to show.
    tags : e.g. ``{"modality": "MR"}``.
    height, width : of the image in pixels.
    created : when it was added, ISO 8601, UTC.
    content : SHA-256 of pixels, masks and absent structures.
    has_source : whether image and masks were kept.
    retired : whether it was retired: it is kept, and not recalled.
    """

    key: str
    structures: tuple[str, ...]
    absent: tuple[str, ...]
    tags: Mapping[str, str]
    height: int
    width: int
    created: str
    content: str = field(repr=False)
    has_source: bool
    retired: bool = False


@public
@dataclass(frozen=True)
class Match:
    """One exemplar that a search found.

    Attributes
    ----------
    key : exemplar.
    distance : cosine distance of the embeddings, 0 (same direction) to 2.
    absent : whether the exemplar says that the structure is absent; it then has no memory of it.
    memory : SHA-256 of its memory, hex; empty where the structure is absent.
    """

    key: str
    distance: float
    absent: bool = False
    memory: str = field(default="", repr=False)


@dataclass(frozen=True, eq=False)
class StoredMemory:
    """A memory where it lies: it can be read whatever becomes of the library in the meantime.

    Attributes
    ----------
    key, structure : of what exemplar, and of what it shows.
    digest : SHA-256 of the stored tokens and pointer: equal for equal memories, in any library.
    shard, slot : the memory-mapped file that it lies in, and where.
    """

    key: str
    structure: str
    digest: bytes
    shard: MappedShard = field(repr=False)
    slot: int = field(repr=False)

    @property
    def memory_format(self) -> str:
        """How its tokens are stored: ``fp16`` or ``int8``."""
        return self.shard.memory_format

    def read(self) -> Record:
        """Return its record as it lies there; call :meth:`MappedShard.look` before.

        Raises
        ------
        LibraryCorruptError
            If it is not what was stored.
        """
        if not self.shard.intact(self.slot, self.digest):
            raise LibraryCorruptError(
                f"the memory of '{self.structure}' of exemplar '{self.key}' in {self.shard.path} "
                "is not what was stored: it does not match its digest. Restore the file, or encode "
                "it anew with 'recallseg library rebuild'."
            )
        return self.shard.record(self.slot)


@dataclass(frozen=True, eq=False)
class Found:
    """What there is to recall of one structure.

    Attributes
    ----------
    matches : at most k exemplars that show it, and nearer ones that lack it; nearest first.
    memories : of those of ``matches`` that show it, by key.
    available : how many exemplars there were to choose from.
    """

    matches: tuple[Match, ...]
    memories: Mapping[str, StoredMemory]
    available: int


@dataclass(frozen=True, eq=False)
class Recollection:
    """What one query recalls, of one state of the library.

    Attributes
    ----------
    digest : the library's, then.
    origins : what made its memories, and of how many exemplars; None where that is not recorded.
    found : by structure.
    """

    digest: str
    origins: tuple[tuple[Origin | None, int], ...]
    found: Mapping[str, Found]


@dataclass(frozen=True)
class LibraryReport:
    """What a verification read, and everything that was wrong.

    Attributes
    ----------
    exemplars, memories, sources, indexes : how many of each were compared with their digests.
    heads : how many of heads, and of logits that were kept to fit them.
    problems : one sentence each; empty when all is well.
    """

    exemplars: int
    memories: int
    sources: int
    indexes: int
    heads: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems
