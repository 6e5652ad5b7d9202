"""Images, masks and a library to measure with: nobody's data, the same on every machine.

Images are :func:`recallseg.engines.golden.make_case`'s (ellipses of different brightness on a
shaded, noisy ground), enlarged to a scanner's usual grid and turned into 16-bit grey values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.golden import make_case
from recallseg.runtime.library import Library

__all__ = ["DESCRIPTION", "SPARE", "fill_library", "query_images", "structure_names"]

DESCRIPTION = "ellipses on a shaded, noisy ground, 16-bit grey (engines/golden.py: make_case)"
SPARE = 8
"""Exemplars beyond the largest k: recall has to choose."""
_EXEMPLAR_SEED, _QUERY_SEED = 11, 1000
_GREY = 256  # 8-bit grey values become 16-bit ones


def structure_names(count: int) -> tuple[str, ...]:
    """Return names for ``count`` structures."""
    return tuple(f"structure {i + 1}" for i in range(count))


def query_images(count: int, side: int) -> list[NDArray[np.uint16]]:
    """Return ``count`` different images ``side`` x ``side``."""
    return [_grey(make_case(_QUERY_SEED + i, k=1, n=3).images[-1], side) for i in range(count)]


def fill_library(
    path: Path,
    bundle: Bundle,
    *,
    exemplars: int,
    structures: int,
    side: int,
    engine: str,
    precision: str,
    threads: int | None,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Make a library whose every exemplar shows every structure.

    Parameters
    ----------
    path : new folder.
    exemplars, structures : how many; ``side`` of the images in pixels.
    engine, precision, threads : what encodes them.
    progress : told the key of every exemplar as it has been added.
    """
    case = make_case(_EXEMPLAR_SEED, k=exemplars, n=structures)
    names = structure_names(structures)
    with Library.create(
        path, bundle, engine=engine, precision=precision, threads=threads
    ) as library:
        for i in range(exemplars):
            masks: Mapping[str, NDArray[Any]] = {
                name: cv2.resize(plane, (side, side), interpolation=cv2.INTER_NEAREST).astype(bool)
                for name, plane in zip(names, case.masks[i], strict=True)
            }
            progress(library.add(_grey(case.images[i], side), masks, key=f"exemplar-{i:03d}"))


def _grey(image: NDArray[np.uint8], side: int) -> NDArray[np.uint16]:
    grey = image.mean(axis=2, dtype=np.float32) * np.float32(_GREY)
    large: NDArray[np.uint16] = cv2.resize(grey, (side, side)).astype(np.uint16)
    return large
