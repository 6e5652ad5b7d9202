"""From mask logits on the network's grid to masks and a label map on the query's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.pixels import Pixels

__all__ = ["Out", "check_out", "check_out_here", "finish_masks"]

Out = tuple[Optional[NDArray[np.uint8]], Optional[NDArray[np.bool_]]]
"""A label map HxW and masks nxHxW to write into, each of any strides, or None."""


def finish_masks(
    logits: NDArray[np.float32],
    present: Sequence[bool],
    shape: tuple[int, int],
    pixels: Pixels,
    out: Out = (None, None),
) -> tuple[list[NDArray[np.bool_]], NDArray[np.uint8]]:
    """Resize logits to the query's grid, threshold at 0, and resolve overlaps by logit.

    Parameters
    ----------
    logits : nx(S/4)x(S/4).
    present : structures that are absent get an empty mask, whatever their logits.
    shape : height and width of the query in pixels.
    pixels : does it.
    out : written into, where given.

    Returns
    -------
    masks : n boolean arrays HxW; those of ``out``, or new.
    label_map : uint8 HxW; that of ``out``, or new. Structure i has the value i + 1.

    Raises
    ------
    InputError
        If ``out`` has other shapes or dtypes.
    EngineRunError
        If logits of a present structure are NaN or infinite.
    """
    check_out(out, len(logits), shape)
    label_map, planes = out
    label_map = np.empty(shape, np.uint8) if label_map is None else label_map
    planes = np.empty((len(logits), *shape), np.bool_) if planes is None else planes
    pixels.finish(logits, present, label_map, planes)
    return list(planes), label_map


def check_out_here(out: Any, n: int, shape: tuple[int, int]) -> None:
    """Raise InputError, before the work, for an ``out`` on the CPU that :func:`check_out` refuses.

    What lies on a device is known to its model.
    """
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise InputError(
            "out must be a pair: a label map and masks, each an array, or nothing in its place."
        )
    check_out([one if isinstance(one, np.ndarray) else None for one in out], n, shape)


def check_out(
    out: Sequence[Any], n: int, shape: tuple[int, int]
) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Return shape and dtype that a label map and n masks have; InputError if ``out``'s differ.

    Parameters
    ----------
    out : a label map and masks, numpy's or a device's, each or None.
    """
    wanted = ((shape, np.dtype(np.uint8)), ((n, *shape), np.dtype(np.bool_)))
    for array, (size, dtype) in zip(out, wanted, strict=True):
        if array is not None and (tuple(array.shape) != size or array.dtype != dtype):
            raise InputError(
                f"out must have shape {size} and dtype {dtype}, got {tuple(array.shape)} and "
                f"{array.dtype}."
            )
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise InputError("out is read-only: pass an array that can be written.")
    return wanted
