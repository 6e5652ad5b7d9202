"""What a release says of the quality of its library: numbers only, no name and no picture."""

from __future__ import annotations

import hashlib
import statistics
from typing import Any

from recallseg.runtime.reports.cases import RECALLED, Arm, Case, Evaluation, VolumeCase

__all__ = ["released"]


def released(evaluation: Evaluation) -> dict[str, Any]:
    """Return Dice of held-out images by structure, with the digest of which images those were.

    Whole volumes count where there are any, images otherwise; at the largest k, with all exemplars,
    and only what shows the structure. Names of cases stay here: the digest is of all together.
    """
    k = max(evaluation.ks)
    arm = Arm(RECALLED, k)
    found: list[tuple[str, Case | VolumeCase]] = [
        *((one.volume, one) for one in evaluation.volumes if one.arm == arm),
    ] or [(one.case, one) for one in evaluation.cases if one.arm == arm]
    names = sorted({(name, one.structure) for name, one in found})
    dice = {}
    for structure in evaluation.structures:
        values = [
            one.dice for _, one in found if one.structure == structure and one.reference_volume > 0
        ]
        if values:
            dice[structure] = {
                "cases": len(values),
                "mean": statistics.fmean(values),
                "median": statistics.median(values),
                "worst": min(values),
            }
    return {
        "k": k,
        "what": "volumes" if evaluation.volumes else "images",
        "cases": hashlib.sha256(repr(names).encode()).hexdigest(),
        "dice": dice,
        "provenance": evaluation.provenance[k].to_json() if k in evaluation.provenance else None,
    }
