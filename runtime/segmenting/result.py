"""What a query gives back: frozen, complete, and traceable to bundle and library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.library.exemplar import Match

__all__ = ["Quality", "Result", "Score"]


@dataclass(frozen=True)
class Score:
    """How sure the model is of one structure.

    Attributes
    ----------
    iou : the decoder's own estimate of the mask's intersection over union, 0..1.
    object_score : logit that the structure is in the image; below 0 the mask is left empty.
    distance : cosine distance to the nearest exemplar with the structure; NaN if none is left.
    presence : share of the recalled exemplars that show the structure, by nearness, 0..1; see
        :mod:`recallseg.runtime.segmenting.presence`.
    present : whether a mask was given.
    """

    iou: float
    object_score: float
    distance: float
    presence: float
    present: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields; a distance that there is none of is None."""
        fields = asdict(self)
        return fields | {"distance": None if math.isnan(self.distance) else self.distance}


@dataclass(frozen=True)
class Quality:
    """Can the result be taken as it is?

    ``flag`` is ``ok``, ``suspect`` (a person should look; ``reasons`` says why, by structure) or
    ``uncalibrated`` (nothing known speaks against it, but the library was never calibrated, or was
    changed since).
    """

    flag: str
    reasons: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Result:
    """Segmentation of one image.

    Attributes
    ----------
    masks : boolean HxW on the query's own grid, by structure.
    label_map : uint8 HxW; 0 is background, ``labels`` names the rest. Where masks overlap, the
        structure with the highest logit has the pixel.
    labels : label value by structure, in the order in which structures were asked for.
    scores : by structure.
    recalled : by structure, nearest first: at most k exemplars that show it give their memories,
        nearer ones that lack it count as evidence only.
    available : by structure, how many exemplars show it (and carry the tags asked for).
    timings : milliseconds by stage (``prepare, embed, search, encode, gather, attend, decode,
        finish, total``; ``memorize`` where memories of this frame were made).
    quality : flag and reasons.
    bundle_identity, library_digest : what made this result.
    engine, precision, k : the settings.
    memory_format : how the library stores its memories, ``fp16`` or ``int8``.
    temporal : memories of earlier frames that were used beside the recalled ones, by structure.
    notice : what must be said of the weights, e.g. "demo model, not for clinical use".
    """

    masks: Mapping[str, NDArray[np.bool_]]
    label_map: NDArray[np.uint8]
    labels: Mapping[str, int]
    scores: Mapping[str, Score]
    recalled: Mapping[str, tuple[Match, ...]]
    available: Mapping[str, int]
    timings: Mapping[str, float]
    quality: Quality
    bundle_identity: str
    library_digest: str
    engine: str
    precision: str
    k: int
    memory_format: str
    temporal: Mapping[str, int]
    notice: str

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pixels, for ``NAME.json`` beside a mask."""
        return {
            "labels": dict(self.labels),
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "recalled": {name: [vars(r) for r in found] for name, found in self.recalled.items()},
            "exemplars": {
                name: {
                    "recalled": sum(not match.absent for match in found),
                    "available": self.available[name],
                }
                for name, found in self.recalled.items()
            },
            "pixels": {name: int(mask.sum()) for name, mask in self.masks.items()},
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings.items()},
            "quality": {
                "flag": self.quality.flag,
                "reasons": {name: list(why) for name, why in self.quality.reasons.items()},
            },
            "bundle_identity": self.bundle_identity,
            "library_digest": self.library_digest,
            "engine": self.engine,
            "precision": self.precision,
            "k": self.k,
            "memory_format": self.memory_format,
            "temporal": dict(self.temporal),
            "notice": self.notice,
        }

    def __repr__(self) -> str:
        found = ", ".join(
            f"{name}: {int(mask.sum())} px" if self.scores[name].present else f"{name}: absent"
            for name, mask in self.masks.items()
        )
        notice = f", {self.notice}" if self.notice else ""
        return (
            f"Result({found}; quality {self.quality.flag}, k={self.k}, {self.engine} "
            f"{self.precision}, {self.timings.get('total', 0.0):.1f} ms{notice})"
        )
