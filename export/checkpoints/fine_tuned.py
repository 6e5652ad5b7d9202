"""Well-known fine-tuned weights in the layout of another's, told by the name of their file.

The tensors of a fine-tuned SAM 2.1 have the names and shapes of SAM 2.1: nothing in them says whose
they are. What a file is called is a hint, used for a name, a licence to look up and the image size
that it was trained at; what the model computes does not depend on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FineTuned", "fine_tuned_sam2"]


@dataclass(frozen=True)
class FineTuned:
    """Name, licence and image size in pixels of fine-tuned weights."""

    name: str
    licence: str
    image_size: int


_SAM2: tuple[tuple[str, FineTuned], ...] = (
    (
        r"MedSAM2[_-].*",
        FineTuned("medsam2", "not stated in the file: see the card of wanglab/MedSAM2", 512),
    ),
)


def fine_tuned_sam2(file: str) -> FineTuned | None:
    """Return what is known of a SAM 2.1 file of this name, or None.

    MedSAM2 (Ma et al., arXiv 2504.03600): its five published files are ``MedSAM2_*.pt``.
    """
    return next((known for name, known in _SAM2 if re.fullmatch(name, file, re.IGNORECASE)), None)
