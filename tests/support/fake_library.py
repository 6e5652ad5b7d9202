"""Exemplars, an encoder and a bundle for library tests: tiny, deterministic, without engines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.specs import Geometry
from recallseg.runtime.library import Library
from recallseg.runtime.library.encoding import Encoded, Origin

GEOMETRY = Geometry(
    image_size=64,
    embed_size=28,
    embedding_dim=24,
    channels=16,
    feature_size=4,
    skip0_channels=2,
    skip1_channels=4,
    memory_dim=8,
)


@dataclass(frozen=True)
class StubBundle:
    """As much of a bundle as a library with an encoder of its own looks at."""

    identity: str = "ab" * 32
    name: str = "stub"
    path: str = "no-such-bundle"
    geometry: Geometry = GEOMETRY

    def known_as(self, identity: str) -> bool:
        """Tell whether an identity is this bundle's."""
        return identity == self.identity


class HashEncoder:
    """Random tensors seeded by pixels and structure name: what was added can be computed again."""

    def __init__(
        self, geometry: Geometry = GEOMETRY, salt: str = "", origin: Origin | None = None
    ) -> None:
        self.geometry = geometry
        self.salt = salt
        self.origin = origin

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        g = self.geometry
        embedding = self._random(image, "", (g.embedding_dim,))
        return Encoded(
            embedding / np.linalg.norm(embedding),
            {name: self._random(image, name, (g.tokens, g.memory_dim)) for name in masks},
            {name: self._random(image, name, (g.channels,)) for name in masks},
            self.origin,
        )

    def _random(
        self, image: NDArray[Any], name: str, shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        seed = hashlib.sha256(image.tobytes() + f"{self.salt}/{name}/{shape}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        return generator.standard_normal(shape).astype(np.float32)


def draw(
    number: int, height: int = 12, width: int = 9
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return image and mask of exemplar ``number``."""
    generator = np.random.default_rng(number)
    image = generator.integers(0, 256, (height, width), np.uint8)
    mask = generator.random((height, width)) < 0.4
    mask[0, 0] = True
    return image, mask


def create(path: Path, **options: object) -> Library:
    """Make a library, with the encoder above unless told otherwise."""
    return Library.create(path, StubBundle(), **{"encoder": HashEncoder(), **options})  # type: ignore[arg-type]


def add(library: Library, number: int, **options: object) -> str:
    """Add the exemplar of a number, and return its key."""
    image, mask = draw(number)
    return library.add(image, {"nucleus": mask}, **options)  # type: ignore[arg-type]


def embedding(number: int) -> np.ndarray:
    """Return the embedding of the exemplar of a number."""
    return HashEncoder().encode(draw(number)[0], {}).embedding


def buffers(k: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return buffers for k memories and pointers, filled with sevens."""
    g = GEOMETRY
    return np.full((k, g.tokens, g.memory_dim), 7, dtype), np.full((k, g.channels), 7, np.float32)


def descriptors_of(path: Path) -> int:
    """Count this process's descriptors of one file; other threads open and close others."""
    wanted, found = os.stat(path), 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.path.samestat(os.stat(f"/proc/self/fd/{name}"), wanted)
    return found
