"""What a list of results will take, told before any is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recallseg.engines.errors import HostMemoryError
from recallseg.runtime.model.host import available_memory

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["check_room", "result_bytes"]


def result_bytes(segmenter: Segmenter, shape: tuple[int, int], keep_logits: bool) -> int:
    """Return the bytes of the arrays of one image's result: label map, masks, kept logits."""
    n, pixels = len(segmenter.structures), shape[0] * shape[1]
    logits = 0
    if keep_logits:
        drawn = segmenter.refining is not None
        logits = 4 * (pixels if drawn else segmenter.bundle.geometry.logit_size**2)
    return pixels + n * (pixels + logits)


def check_room(segmenter: Segmenter, shapes: Sequence[tuple[int, int]], keep_logits: bool) -> None:
    """Raise HostMemoryError if the results of images of these shapes do not fit beside each other.

    Where the system does not say how much is free, nothing is.
    """
    free = available_memory()
    needed = sum(result_bytes(segmenter, shape, keep_logits) for shape in shapes)
    if free is not None and needed > free:
        raise HostMemoryError(
            f"the results of {len(shapes)} images with {len(segmenter.structures)} structures take "
            f"{needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB of this machine's memory are "
            "free; none was segmented. Hand in fewer at once, or call segment(image) for each and "
            "keep what you need of it."
        )
