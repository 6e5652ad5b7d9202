"""Libraries for the benchmark: filled with exemplars, and one that recalls at random."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.dataset import Dataset
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import Recollection

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["COUNTS", "RandomLibrary", "fill", "member_tag"]

COUNTS = (1, 2, 4, 8, 16, 32)
"""How many annotated images: each exemplar carries a tag for every set that it belongs to."""


class RandomLibrary(Library):
    """A library that recalls exemplars at random instead of the nearest ones.

    The draw depends on ``seed``, the query and the structure alone, so that it is the same in every
    run. Distances are the true ones; the order is the one of the draw.
    """

    seed = 0

    @classmethod
    def open_drawing(cls, path: Path, bundle: Bundle) -> RandomLibrary:
        """Open a library for reading."""
        return cast(RandomLibrary, cls.open(path, bundle))

    def recall(
        self,
        embedding: NDArray[np.float32],
        structures: Sequence[str],
        k: int,
        *,
        tags: Mapping[str, str] | None = None,
        without: Collection[str] = (),
    ) -> Recollection:
        """Return ``k`` exemplars that show each structure, chosen at random; all if fewer do."""
        everything = super().recall(
            embedding, structures, max(1, len(self)), tags=tags, without=without
        )
        query = zlib.crc32(np.ascontiguousarray(embedding).tobytes())
        found = {}
        for name, one in everything.found.items():
            showing = [match for match in one.matches if not match.absent]
            draw = np.random.default_rng([self.seed, query, zlib.crc32(name.encode())])
            chosen = draw.choice(len(showing), size=min(k, len(showing)), replace=False)
            found[name] = replace(one, matches=tuple(showing[int(i)] for i in chosen))
        return replace(everything, found=found)


def member_tag(count: int) -> dict[str, str]:
    """Return the tag of the exemplars that belong to the set of ``count`` annotated images."""
    return {f"set{count:02d}": "yes"}


def fill(
    path: Path,
    bundle: Bundle,
    dataset: Dataset,
    *,
    engine: str,
    precision: str,
    threads: int | None,
    counts: tuple[int, ...] = COUNTS,
    step: Callable[[str], None] = lambda name: None,
) -> None:
    """Make a library of a dataset's exemplars, tagged by the sets of :data:`COUNTS`."""
    sets = {count: {image.name for image in dataset.annotated(count)} for count in counts}
    with Library.create(
        path,
        bundle,
        intensity=dataset.intensity,
        engine=engine,
        precision=precision,
        threads=threads,
    ) as library:
        for image in dataset.annotated(max(counts)):
            tags: dict[str, str] = {}
            for count, names in sets.items():
                if image.name in names:
                    tags.update(member_tag(count))
            library.add(image.image, image.masks, absent=image.absent, tags=tags, key=image.name)
            step(image.name)
