"""Does choosing what to annotate save annotations? Chosen ones against random ones, at one budget.

Of each dataset all annotated images (at most 32) are the pool. Every draw begins with an empty
library; random ones take 16 at once; chosen ones are taken in rounds, as a person would: the first
by coverage, later ones with the doubt of a library of those before. Queries are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED, Dataset, spread
from recallseg.engines.verification import mask_dice
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.choosing import By, doubt_of, rank
from recallseg.runtime.segmenting.segmenter import Segmenter

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["BUDGETS", "RANDOM", "Chosen", "measure_choosing", "tabulate"]

BUDGETS = (4, 8, 12, 16)
ROUND = 4
"""Images annotated before doubt is asked for anew."""
RANDOM = "random"
Step = Callable[[str], None]


@dataclass(frozen=True)
class Chosen:
    """Mean Dice over structures and queries that show them, with one set of annotated images."""

    dataset: str
    method: str
    annotated: int
    draw: int
    dice: float


def measure_choosing(
    dataset: Dataset,
    bundle: Bundle,
    *,
    draws: int = 5,
    most_queries: int = 15,
    methods: Sequence[By] = get_args(By),
    engine: str | None = None,
    threads: int | None = None,
    step: Step = lambda name: None,
) -> list[Chosen]:
    """Measure one dataset.

    Parameters
    ----------
    draws : random choices of each budget.
    step : called after each set of annotated images that was tried.
    """
    pool = [*dataset.exemplars, *dataset.extra][: 2 * MOST_ANNOTATED]
    with TemporaryDirectory(prefix="recallseg-choosing-") as folder:
        path = Path(folder) / "library"
        with Library.create(
            path, bundle, intensity=dataset.intensity, engine=engine, threads=threads
        ) as library:
            for image in pool:
                library.add(image.image, image.masks, absent=image.absent, key=image.name)
            run = _Run(dataset, library, spread(dataset.queries, most_queries))
            found = []
            for draw in range(draws):
                order = np.random.default_rng(draw).permutation(len(pool))
                for count in BUDGETS:
                    taken = [pool[i].name for i in order[:count]]
                    found.append(Chosen(dataset.name, RANDOM, count, draw, run.dice(taken)))
                    step(f"{RANDOM} {count}")
            for method in methods:
                taken = []
                for count in BUDGETS:
                    while len(taken) < min(count, len(pool)):
                        taken += run.choose(taken, min(ROUND, count - len(taken)), method)
                    found.append(Chosen(dataset.name, method, count, 0, run.dice(taken)))
                    step(f"{method} {count}")
            return found


class _Run:
    """Segments with a part of a library, as if no more were annotated."""

    def __init__(self, dataset: Dataset, library: Library, queries: Sequence[Annotated]) -> None:
        self._dataset, self._library, self._queries = dataset, library, queries
        self._keys = [exemplar.key for exemplar in library]
        self._segmenter = Segmenter(library, k=8, structures=dataset.structures)
        self._images = {image.name: image for image in (*dataset.exemplars, *dataset.extra)}
        self._embeddings = {key: library.embed(self._images[key].image) for key in self._keys}

    def dice(self, taken: Sequence[str]) -> float:
        """Return the mean over structures of the mean Dice of the queries that show one."""
        without = [key for key in self._keys if key not in taken]
        by_structure: dict[str, list[float]] = {name: [] for name in self._dataset.structures}
        for query in self._queries:
            result = self._segmenter.segment(query.image, without=without)
            for name, mask in query.masks.items():
                by_structure[name].append(mask_dice(result.masks[name], mask))
        return float(np.mean([np.mean(values) for values in by_structure.values() if values]))

    def choose(self, taken: Sequence[str], count: int, method: By) -> list[str]:
        left = [key for key in self._keys if key not in taken]
        known = self._stack(taken)
        doubts: NDArray[np.float64] = np.full(len(left), np.nan)
        if taken and method in ("all", "doubt"):
            doubts = np.array(
                [doubt_of(self._segmenter, self._images[k].image, without=left) for k in left]
            )
        rows = np.stack([self._embeddings[key] for key in left])
        return [left[i] for i, _, _ in rank(rows, known, doubts, count, method)]

    def _stack(self, keys: Sequence[str]) -> NDArray[np.float32] | None:
        rows = [self._embeddings[key] for key in keys]
        return np.stack(rows) if rows else None


def tabulate(found: Sequence[Chosen]) -> tuple[list[str], list[list[str]]]:
    """Return a header and rows: random and chosen ones by dataset, and their mean."""
    columns = [(RANDOM, 12), (RANDOM, 16), *((method, 12) for method in get_args(By))]
    names = [*dict.fromkeys(one.dataset for one in found)]
    table = [
        [
            float(
                np.mean([o.dice for o in found if (o.dataset, o.method, o.annotated) == (name, *c)])
            )
            for c in columns
        ]
        for name in names
    ]
    rows = [[name, *(f"{d:.3f}" for d in row)] for name, row in zip(names, table, strict=True)]
    rows.append(["mean", *(f"{d:.3f}" for d in np.mean(table, axis=0))])
    return ["dataset", *(f"{method} {count}" for method, count in columns)], rows
