"""What memory attention made of the exemplars that a head is fitted on, as it is stored."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.library.choices import finite
from recallseg.runtime.library.values import hex_digest, integer

__all__ = ["KEPT_FORMAT", "Kept", "Recall", "kept_values", "parse_kept"]

KEPT_FORMAT = 3
MOST_SIDE = 4096
RECALLS = 3


@dataclass(frozen=True, eq=False)
class Recall:
    """What memory attention made of one image, from those exemplars that were not passed over.

    Attributes
    ----------
    recalled : numbers of the exemplars that were recalled and show it, by structure.
    scores, sure : object score, and the decoder's IoU estimate, by structure.
    distances : cosine distance to the nearest of them, by structure; NaN where there is none.
    logits : float16 qxq, by structure; NaN where none were made.
    """

    recalled: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, float]
    sure: Mapping[str, float]
    distances: Mapping[str, float]
    logits: Mapping[str, NDArray[np.float16]]


@dataclass(frozen=True, eq=False)
class Kept:
    """What memory attention made of one exemplar.

    Attributes
    ----------
    recipe : digest of the settings.
    generation : of the memories.
    apart : from exemplars of other groups.
    same : from all, itself among them.
    far : from the farther half of those of other groups.
    """

    recipe: str
    generation: int
    apart: Recall
    same: Recall
    far: Recall

    @property
    def recalls(self) -> tuple[Recall, Recall, Recall]:
        """All of them, in the order in which they are stored."""
        return self.apart, self.same, self.far


def kept_values(kept: Kept, ids: Mapping[str, int]) -> tuple[dict[str, Any], bytes]:
    """Return what is stored: JSON values and bytes. ``ids`` are of the structures, in order."""
    stack = np.stack([[recall.logits[name] for name in ids] for recall in kept.recalls])
    about = {
        "format_version": KEPT_FORMAT,
        "recipe": kept.recipe,
        "generation": kept.generation,
        "side": stack.shape[-1],
        "structures": list(ids.values()),
        "recalls": [
            [
                [
                    *(recall.scores[name], _told(recall.distances[name])),
                    *(list(recall.recalled[name]), recall.sure[name]),
                ]
                for name in ids
            ]
            for recall in kept.recalls
        ],
    }
    return about, zlib.compress(stack.astype("<f2").tobytes(), 1)


def parse_kept(about: Mapping[str, Any], data: bytes, names: Mapping[int, str]) -> Kept:
    """Rebuild what was stored; raises ValueError, KeyError and the like for anything else."""
    side = integer(about["side"], "a side of logits", 1, MOST_SIDE)
    known = [names[number] for number in about["structures"]]
    shape = (RECALLS, len(known), side, side)
    size = 2 * math.prod(shape)
    unpacked = zlib.decompressobj().decompress(data, size + 1)
    if len(unpacked) != size:
        raise ValueError(f"{len(unpacked)} bytes of logits")
    stacks = np.frombuffer(unpacked, "<f2").reshape(shape)
    apart, same, far = (
        _recall(known, listed, stack)
        for listed, stack in zip(about["recalls"], stacks, strict=True)
    )
    return Kept(
        hex_digest(about["recipe"], "the recipe of logits"),
        integer(about["generation"], "the generation of logits", 1),
        apart,
        same,
        far,
    )


def _recall(names: Sequence[str], listed: Sequence[Any], stack: NDArray[np.float16]) -> Recall:
    told = dict(zip(names, listed, strict=True))
    return Recall(
        {
            name: tuple(integer(n, "a recalled exemplar", 1) for n in one[2])
            for name, one in told.items()
        },
        {name: finite(one[0]) for name, one in told.items()},
        {name: finite(one[3]) for name, one in told.items()},
        {name: math.nan if one[1] is None else finite(one[1]) for name, one in told.items()},
        dict(zip(names, stack, strict=True)),
    )


def _told(distance: float) -> float | None:
    return None if math.isnan(distance) else distance
