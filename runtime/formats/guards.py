"""Limits that keep a hostile or damaged file from taking the machine with it."""

from __future__ import annotations

import bz2
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["MAX_BYTES", "check_finite", "check_size", "expand"]

MAX_BYTES = 2**32
"""Four gigabytes of pixels: above every volume of a scanner, below what a workstation has."""
_STEP = 2**20


def check_size(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return the bytes that an array declared by a file will take.

    Raises
    ------
    InputError
        If an axis is not positive, or all of it is more than ``MAX_BYTES``.
    """
    if not shape or any(size <= 0 for size in shape):
        raise InputError(f"{path} declares the size {tuple(shape)}: it is empty or damaged.")
    count = math.prod(int(size) for size in shape) * dtype.itemsize
    if count > MAX_BYTES:
        raise InputError(
            f"{path} declares {count / 2**30:.1f} GiB of pixels; at most {MAX_BYTES / 2**30:.0f} "
            "GiB are read. Crop or split it."
        )
    return count


def expand(data: bytes, encoding: str, wanted: int, path: Path) -> bytes:
    """Decompress ``gzip`` or ``bz2`` data to exactly ``wanted`` bytes, and never to more.

    Raises
    ------
    InputError
        If it is damaged, cut off, or holds another number of bytes.
    """
    engine: Any = zlib.decompressobj(wbits=47) if encoding == "gzip" else bz2.BZ2Decompressor()
    parts: list[bytes] = []
    have = 0
    try:
        while have <= wanted and not engine.eof:
            part = engine.decompress(data, max_length=min(_STEP, wanted + 1 - have) or 1)
            data = engine.unconsumed_tail if encoding == "gzip" else b""
            if not part and not data:
                break
            parts.append(part)
            have += len(part)
    except (zlib.error, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be decompressed: {error}. Export it again.") from error
    if have != wanted:
        relation = "more" if have > wanted else "less"
        raise InputError(
            f"{path} holds {relation} pixels than the {wanted} bytes that its header states: it is "
            "cut off or damaged. Export or copy it again."
        )
    return b"".join(parts)


def check_finite(path: Path, array: NDArray[Any]) -> None:
    """Refuse NaN and infinite voxels.

    Raises
    ------
    InputError
        Saying how many there are.
    """
    if np.issubdtype(array.dtype, np.floating):
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            raise InputError(
                f"{path} has {wrong} NaN or infinite voxels of {array.size}. Replace them by what "
                "lies around the patient, e.g. with numpy.nan_to_num."
            )
