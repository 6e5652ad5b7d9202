"""What a benchmark dataset is: annotated exemplars, queries kept apart, and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["MOST_ANNOTATED", "Dataset", "annotate", "spread", "tiles"]

T = TypeVar("T")

MOST_ANNOTATED = 16
"""Annotated images of the main measurements, by the protocol."""


@dataclass(frozen=True)
class Dataset:
    """Real images with reference masks.

    Attributes
    ----------
    name : short and unique.
    modality, reference, licence, source, remark : for the reader: how the masks came about, who may
        use the images, which package ships them, what to bear in mind.
    human : whether people drew the masks (or corrected them one by one).
    structures : in the order of the tables.
    exemplars : the annotated images, at most 16.
    extra : more of them, for the question what twice the annotation brings.
    queries : images to segment; none is, overlaps or touches an exemplar.
    positions : place of a slice in its volume in mm, by image name; empty where there is none.
    intensity : rule from pixel values to 0..1.
    oriented : whether left and right, top and bottom mean something (no mirroring in training).
    targets : Dice to reach at k = 8, by structure.
    """

    name: str
    modality: str
    structures: tuple[str, ...]
    exemplars: tuple[Annotated, ...] = field(repr=False)
    extra: tuple[Annotated, ...] = field(repr=False)
    queries: tuple[Annotated, ...] = field(repr=False)
    reference: str
    human: bool
    licence: str
    source: str
    remark: str = ""
    positions: Mapping[str, float] = field(default_factory=dict, repr=False)
    intensity: Intensity = field(default_factory=Intensity)
    oriented: bool = True
    targets: Mapping[str, float] = field(default_factory=dict)

    def annotated(self, count: int) -> tuple[Annotated, ...]:
        """Return ``count`` annotated images, evenly chosen; beyond 16 the extra ones join."""
        if count <= MOST_ANNOTATED:
            return tuple(spread(self.exemplars, count))
        return self.exemplars + tuple(spread(self.extra, count - MOST_ANNOTATED))

    def describe(self) -> dict[str, Any]:
        """Return everything but the pixels."""
        return {
            "name": self.name,
            "modality": self.modality,
            "structures": list(self.structures),
            "exemplars": len(self.exemplars),
            "extra": len(self.extra),
            "queries": len(self.queries),
            "reference": self.reference,
            "human_reference": self.human,
            "licence": self.licence,
            "source": self.source,
            "remark": self.remark,
            "intensity": self.intensity.to_json(),
            "targets": dict(self.targets),
        }


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return ``count`` of ``items``, evenly spread: the middle of each of ``count`` equal parts."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def annotate(name: str, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Annotated:
    """Return an annotated image; a structure with an empty mask is known to be absent."""
    shown = {key: np.ascontiguousarray(mask) for key, mask in masks.items() if mask.any()}
    absent = tuple(key for key in masks if key not in shown)
    return Annotated(name, np.ascontiguousarray(image), shown, absent)


def tiles(
    name: str, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]], count: int
) -> list[Annotated]:
    """Cut an image into ``count`` x ``count`` tiles that do not overlap, row by row."""
    side = min(image.shape[:2]) // count
    cut = []
    for row in range(count):
        for column in range(count):
            window = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            parts = {key: mask[window] for key, mask in masks.items()}
            cut.append(annotate(f"{name}-r{row}c{column}", image[window], parts))
    return cut
