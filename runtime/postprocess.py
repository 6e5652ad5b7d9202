"""From mask logits on the network's grid to masks and a label map on the query's own."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.workspace import Workspace

__all__ = ["finish_masks"]


def finish_masks(
    logits: NDArray[np.float32],
    present: Sequence[bool],
    shape: tuple[int, int],
    workspace: Workspace,
) -> tuple[list[NDArray[np.bool_]], NDArray[np.uint8]]:
    """Resize logits to the query's grid, threshold at 0, and resolve overlaps by logit.

    Parameters
    ----------
    logits : nx(S/4)x(S/4).
    present : structures that are absent get an empty mask, whatever their logits.
    shape : height and width of the query in pixels.
    workspace : lends the two buffers on that grid.

    Returns
    -------
    masks : n boolean arrays HxW, new.
    label_map : uint8 HxW, new; structure i has the value i + 1.
    """
    upsampled, highest = workspace.grid(*shape)
    highest.fill(0.0)
    label_map = np.zeros(shape, np.uint8)
    masks = []
    shrink = shape[0] < logits.shape[1] or shape[1] < logits.shape[2]
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    for index, plane in enumerate(logits):
        if not present[index]:
            masks.append(np.zeros(shape, np.bool_))
            continue
        cv2.resize(plane, (shape[1], shape[0]), dst=upsampled, interpolation=method)
        masks.append(upsampled > 0)
        wins = upsampled > highest
        label_map[wins] = index + 1
        np.copyto(highest, upsampled, where=wins)
    return masks, label_map
