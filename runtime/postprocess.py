"""From mask logits on the network's grid to masks and a label map on the query's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.workspace import Workspace

__all__ = ["Out", "finish_masks"]

Out = tuple[Optional[NDArray[np.uint8]], Optional[NDArray[np.bool_]]]
"""A label map HxW and masks nxHxW to write into, each of any strides, or None."""


def finish_masks(
    logits: NDArray[np.float32],
    present: Sequence[bool],
    shape: tuple[int, int],
    workspace: Workspace,
    out: Out = (None, None),
) -> tuple[list[NDArray[np.bool_]], NDArray[np.uint8]]:
    """Resize logits to the query's grid, threshold at 0, and resolve overlaps by logit.

    Parameters
    ----------
    logits : nx(S/4)x(S/4).
    present : structures that are absent get an empty mask, whatever their logits.
    shape : height and width of the query in pixels.
    workspace : lends the two buffers on that grid.
    out : written into, where given.

    Returns
    -------
    masks : n boolean arrays HxW; those of ``out``, or new.
    label_map : uint8 HxW; that of ``out``, or new. Structure i has the value i + 1.

    Raises
    ------
    InputError
        If ``out`` has other shapes or dtypes.
    """
    label_map, planes = out
    for array, wanted, dtype in (
        (label_map, shape, np.uint8),
        (planes, (len(logits), *shape), np.bool_),
    ):
        if array is not None and (array.shape != wanted or array.dtype != dtype):
            raise InputError(
                f"out must have shape {wanted} and dtype {np.dtype(dtype)}, got {array.shape} and "
                f"{array.dtype}."
            )
    upsampled, highest = workspace.grid(*shape)
    highest.fill(0.0)
    label_map = np.empty(shape, np.uint8) if label_map is None else label_map
    label_map.fill(0)
    planes = np.zeros((len(logits), *shape), np.bool_) if planes is None else planes
    shrink = shape[0] < logits.shape[1] or shape[1] < logits.shape[2]
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    for index, plane in enumerate(logits):
        if not present[index]:
            planes[index].fill(False)
            continue
        cv2.resize(plane, (shape[1], shape[0]), dst=upsampled, interpolation=method)
        np.greater(upsampled, 0, out=planes[index])
        wins = upsampled > highest
        label_map[wins] = index + 1
        np.copyto(highest, upsampled, where=wins)
    return list(planes), label_map
