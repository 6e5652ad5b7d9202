"""How an image was taken: its physical scale and its side, as far as its file says.

The networks see every image at one size, so what they recall should show about as much of a patient
as the image does, and the same side. Both travel with an exemplar as tags, and with a query beside
its pixels; where either is not stated nothing is concluded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recallseg.runtime.formats.volume import SPACING_TAG
from recallseg.runtime.library.exemplar import Exemplar

__all__ = ["LARGEST_RATIO", "Acquisition", "differences"]

LATERALITY_TAG = "laterality"
ORIENTATION_TAG = "orientation"
LARGEST_RATIO = 1.5
"""Of the widths of what two images show, above which they are of another scale."""
_OPPOSITE = dict(zip("LRAPHF", "RLPAFH", strict=True))
_SPACING = re.compile(r"(\d[\d.]*(?:e-?\d+)?)x(\d[\d.]*(?:e-?\d+)?)")


@dataclass(frozen=True)
class Acquisition:
    """What a file says of an image.

    Attributes
    ----------
    spacing : mm between rows and between columns, or None where it is not stated.
    laterality : ``L`` or ``R``, of a paired part of the body; empty if neither or not stated.
    orientation : patient directions along a row and down a column as in DICOM's PatientOrientation,
        e.g. ``A-F``; empty if not stated.
    """

    spacing: tuple[float, float] | None = None
    laterality: str = ""
    orientation: str = ""

    @classmethod
    def of(cls, tags: Mapping[str, str], spacing: tuple[float, float] | None = None) -> Acquisition:
        """Take side, and where ``spacing`` is None the scale, from tags."""
        found = _SPACING.fullmatch(tags.get(SPACING_TAG, ""))
        if spacing is None and found is not None:
            rows, columns = float(found[1]), float(found[2])
            spacing = (rows, columns) if rows > 0 and columns > 0 else None
        return cls(spacing, tags.get(LATERALITY_TAG, ""), tags.get(ORIENTATION_TAG, ""))


def differences(
    query: Acquisition, height: int, width: int, recalled: Sequence[Exemplar]
) -> list[str]:
    """Return why the recalled exemplars may not fit an image, as reasons for a person to look.

    Parameters
    ----------
    query : of the image.
    height, width : of the image, in pixels.
    recalled : those that give their memories.
    """
    reasons = []
    shown = _shown(query, height, width)
    ratios = []
    mirrored = 0
    for exemplar in recalled:
        other = Acquisition.of(exemplar.tags)
        theirs = _shown(other, exemplar.height, exemplar.width)
        if shown is not None and theirs is not None:
            ratios.append(theirs / shown)
        mirrored += _mirrored(query, other)
    far = [ratio for ratio in ratios if max(ratio, 1 / ratio) > LARGEST_RATIO]
    if far:
        worst = max(far, key=lambda ratio: max(ratio, 1 / ratio))
        reasons.append(
            f"another scale: {len(far)} of {len(recalled)} recalled exemplars show up to "
            f"{worst:.2g} times as much across as this image ({shown:.0f} mm)"
        )
    if mirrored:
        reasons.append(
            f"mirrored: {mirrored} of {len(recalled)} recalled exemplars show the other side"
        )
    return reasons


def _shown(acquisition: Acquisition, height: int, width: int) -> float | None:
    """Return how much an image shows across, in mm: the side of a square of its area."""
    if acquisition.spacing is None:
        return None
    return math.sqrt(height * acquisition.spacing[0] * width * acquisition.spacing[1])


def _mirrored(query: Acquisition, exemplar: Acquisition) -> bool:
    if {query.laterality, exemplar.laterality} == {"L", "R"}:
        return True
    along, other = query.orientation[:1], exemplar.orientation[:1]
    return bool(along) and _OPPOSITE.get(along) == other
