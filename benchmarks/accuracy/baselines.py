"""The simplest thing that could work: copy the mask of the most similar annotated image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.dataset import Dataset
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.reports.baselines import copy_mask

__all__ = ["copy_nearest_by_position"]


def copy_nearest_by_position(
    dataset: Dataset, query: Annotated, structure: str
) -> NDArray[np.bool_] | None:
    """Return the mask of the annotated slice that lies nearest in the volume.

    None where the dataset has no positions. A structure that is absent there is copied as absent.
    """
    here = dataset.positions.get(query.name)
    if here is None:
        return None
    positions: Mapping[str, float] = dataset.positions
    nearest = min(dataset.exemplars, key=lambda image: abs(positions[image.name] - here))
    shape = (query.image.shape[0], query.image.shape[1])
    mask = nearest.masks.get(structure)
    return np.zeros(shape, np.bool_) if mask is None else copy_mask(mask, shape)
