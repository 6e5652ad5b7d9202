"""What one exemplar becomes, and who makes it: the contract between library and encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import EngineRunError, LibraryCorruptError
from recallseg.engines.specs import Geometry
from recallseg.runtime.checks import check_key
from recallseg.runtime.library.values import hex_digest, text

__all__ = [
    "MEMORY_FORMATS",
    "Encoded",
    "ExemplarEncoder",
    "MemoryLayout",
    "Origin",
    "check_encoded",
]

MEMORY_FORMATS = ("fp16", "int8")

UNIT_TOLERANCE = 1e-3
"""How far an embedding's length may be from 1: float32 sums over a few thousand channels, with room
for engines of lower precision. The library divides by the length that it finds."""
FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Origin:
    """What made the embedding and the memories of an exemplar.

    Attributes
    ----------
    engine, precision : that ran the graphs.
    graphs : digests of those that ran, by name; see :meth:`recallseg.Bundle.graph_digest`.
    version : of RecallSeg.
    """

    engine: str
    precision: str
    graphs: Mapping[str, str]
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Origin:
        """Rebuild from :meth:`to_json`; raises LibraryCorruptError for anything else."""
        texts = ("engine", "precision", "version")
        if not isinstance(data, dict) or {*data} != {*texts, "graphs"}:
            raise LibraryCorruptError("the library's record of how memories were made is damaged.")
        if not isinstance(data["graphs"], dict):
            raise LibraryCorruptError("the library's record of how memories were made is damaged.")
        graphs = {
            text(name, "a graph's name", check_key): hex_digest(digest, "a graph's digest")
            for name, digest in data["graphs"].items()
        }
        engine, precision, version = (text(data[name], name, check_key) for name in texts)
        return cls(engine, precision, graphs, version)


@dataclass(frozen=True)
class Encoded:
    """Embedding and memories of one exemplar.

    Attributes
    ----------
    embedding : D float32, unit length.
    memories : structure -> T x memory_dim float32.
    pointers : structure -> C float32.
    origin : what made them; None where that is not known.
    """

    embedding: NDArray[np.float32]
    memories: Mapping[str, NDArray[Any]]
    pointers: Mapping[str, NDArray[Any]]
    origin: Origin | None = None


class ExemplarEncoder(Protocol):
    """Runs ``embed``, ``encode`` and ``memorize`` on one annotated image."""

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        """Encode an image HxW or HxWx3 and a mask HxW for each structure (there may be none)."""
        ...

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return the embedding of an image HxW or HxWx3: D, of unit length."""
        ...


@dataclass(frozen=True)
class MemoryLayout:
    """Shape of one stored memory: T tokens of ``memory_dim``, a pointer of ``pointer_dim`` (C).

    ``format`` is how a token's numbers are stored: ``fp16``, or ``int8`` with one scale per token.
    """

    tokens: int
    memory_dim: int
    pointer_dim: int
    format: str = "fp16"

    @classmethod
    def of(cls, geometry: Geometry, memory_format: str) -> MemoryLayout:
        """Return the layout of a bundle's memories."""
        return cls(geometry.tokens, geometry.memory_dim, geometry.channels, memory_format)


def check_encoded(
    encoded: Encoded, structures: tuple[str, ...], embedding_dim: int, layout: MemoryLayout
) -> Encoded:
    """Return what can be stored: normalised embedding, memories and pointers, all float32.

    Raises
    ------
    EngineRunError
        If the encoder left out a structure, or gave another shape, a value that is not finite, a
        memory beyond fp16's range, or an embedding that is not of unit length.
    """
    embedding = _tensor("embedding", encoded.embedding, (embedding_dim,))
    length = float(np.linalg.norm(embedding))
    if abs(length - 1.0) > UNIT_TOLERANCE:
        raise EngineRunError(
            f"the encoder's embedding has length {length:.6g}; expected 1. Verify the engine with "
            "'recallseg verify'."
        )
    memories: dict[str, NDArray[np.float32]] = {}
    pointers: dict[str, NDArray[np.float32]] = {}
    for name in structures:
        if name not in encoded.memories or name not in encoded.pointers:
            raise EngineRunError(
                f"the encoder returned no memory or no pointer for structure '{name}'."
            )
        memory = _tensor(
            f"memory of '{name}'", encoded.memories[name], (layout.tokens, layout.memory_dim)
        )
        largest = float(np.abs(memory).max())
        if largest > FP16_MAX:
            raise EngineRunError(
                f"the memory of '{name}' reaches {largest:.6g}; memories must fit fp16, "
                f"which ends at {FP16_MAX:.0f}. Verify the engine with 'recallseg verify'."
            )
        memories[name] = memory
        pointers[name] = _tensor(
            f"pointer of '{name}'", encoded.pointers[name], (layout.pointer_dim,)
        )
    return Encoded(embedding / np.float32(length), memories, pointers, encoded.origin)


def _tensor(what: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
        raise EngineRunError(
            f"the encoder's {what} must be floating point of shape {shape}, got {array.dtype} of "
            f"shape {array.shape}."
        )
    if not np.isfinite(array).all():
        raise EngineRunError(
            f"the encoder's {what} has values that are not finite: the engine is wrong for this "
            "precision. Verify it with 'recallseg verify'."
        )
    return np.ascontiguousarray(array, np.float32)
