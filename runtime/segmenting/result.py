"""What a query gives back: frozen, complete, and traceable to bundle and library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import on_gpu
from recallseg.engines.errors import InputError
from recallseg.runtime.frozen import FrozenMap, public, same_fields
from recallseg.runtime.library.choices import Choice, Expected
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.probabilities import LogitsOnModel, Probabilities
from recallseg.runtime.segmenting.recipe import Provenance

__all__ = [
    "RECORD_FORMAT",
    "STAYS_OUT",
    "HeadUse",
    "Quality",
    "Result",
    "Score",
    "calibration_json",
]

RECORD_FORMAT = 2
"""Version of NAME.json and of whatever else states a result. Records of before 0.1.0 say none: they
have ``bundle_identity``, ``library_digest``, ``engine``, ``precision``, ``k`` and ``memory_format``
where these have ``provenance``."""


@public
@dataclass(frozen=True, eq=False)
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and same_fields(self, other)

    def __hash__(self) -> int:
        return hash(tuple(self.to_json().values()))


STAYS_OUT = "it is surely no better for any of these structures"
"""Why a head took no part that was judged and found no better."""


@dataclass(frozen=True)
class HeadUse:
    """What the library's head has to do with a result, see :meth:`recallseg.Library.fit`.

    Attributes
    ----------
    why : why it took no part; empty if it did.
    digest, created : of the head; ISO 8601, UTC.
    exemplars, of, now : how many it was fitted on, how many the library had then, and has now.
    older : how the library has changed since; empty if it has not.
    grouping : what was left out in turn when it was judged: ``groups`` that were told,
        ``exemplars`` each by itself (flattering where several are of one patient), or ``blocks``
        within one patient.
    choices : by structure that the head knows, of those asked for: the share that it has in the
        logits, the Dice that is expected and that of memory attention alone, or why it stays out.
    """

    why: str
    digest: str
    created: str
    exemplars: int
    of: int
    now: int
    older: str
    grouping: str
    choices: Mapping[str, Choice]

    @property
    def used(self) -> bool:
        """Whether it took part in any structure's logits."""
        return not self.why

    def expected(self, scores: Mapping[str, Score]) -> dict[str, Expected]:
        """Return the Dice that is expected of a result by its scores, see :meth:`Choice.at`.

        By structure; without those that the fit could not say it of, and empty where it says
        nothing of what was done, since other filters or memories were used.
        """
        if self.why not in ("", STAYS_OUT):
            return {}
        told = {
            name: self.choices[name].at(score.distance, score.iou, given=score.present)
            for name, score in scores.items()
            if name in self.choices
        }
        return {name: one for name, one in told.items() if one is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            **{name: value for name, value in vars(self).items() if name != "choices"},
            "used": self.used,
            "structures": {name: vars(choice) for name, choice in self.choices.items()},
        }


@dataclass(frozen=True)
class Quality:
    """Can the result be taken as it is?

    Attributes
    ----------
    flag : ``ok``, ``suspect`` (a person should look) or ``uncalibrated`` (nothing known speaks
        against it, but what is normal for this recipe is not known of every structure).
    reasons : by structure, why it is suspect.
    calibrated : by structure that is: how many exemplars its calibration was made with, of how many
        there are now.
    mend : what is not calibrated, and the command that calibrates it; empty if all is. The same of
        a head that is older than the library.
    head : the library's head; None if it has none, or was not to be used.
    """

    flag: str
    reasons: Mapping[str, tuple[str, ...]]
    calibrated: Mapping[str, tuple[int, int]]
    mend: str
    head: HeadUse | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "flag": self.flag,
            "reasons": {name: list(why) for name, why in self.reasons.items()},
            "calibration": calibration_json(self.calibrated),
            "mend": self.mend,
            "head": None if self.head is None else self.head.to_json(),
        }


def calibration_json(calibrated: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Return with how many exemplars calibrations were made, as JSON values."""
    return {name: {"made_with": made, "of": of} for name, (made, of) in calibrated.items()}


@dataclass(frozen=True, eq=False)
class Result:
    """Segmentation of one image.

    Results are equal if all but their ``timings`` and ``logits`` is. They can be pickled and copied
    unless their arrays lie on a GPU.

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
    provenance : what made this result.
    frame_memories : how many of earlier frames were used beside the recalled ones, by structure.
    notice : what must be said of the weights, e.g. "demo model, not for clinical use".
    spacing : mm between rows and between columns, None where they are not known.
    corrections : by structure that a person corrected: how often.
    logits : by structure, what its mask was made of, float32: (S/4)x(S/4) on the networks' grid, or
        HxW where a head or a person drew; NaN where nothing was recalled. They are on the model and
        fetched when they are asked for, until it looks at another image (StaleViewError), and are
        left out of pickles and copies; with ``segment(image, keep_logits=True)`` the result has a
        copy: 4 bytes for each, 0.25 MiB a structure at S = 1024.
    """

    masks: Mapping[str, NDArray[np.bool_]]
    label_map: NDArray[np.uint8]
    labels: Mapping[str, int]
    scores: Mapping[str, Score]
    recalled: Mapping[str, tuple[Match, ...]]
    available: Mapping[str, int]
    timings: Mapping[str, float]
    quality: Quality
    provenance: Provenance
    frame_memories: Mapping[str, int]
    notice: str
    spacing: tuple[float, float] | None = None
    corrections: Mapping[str, int] = field(default_factory=FrozenMap)
    logits: Mapping[str, NDArray[np.float32]] = field(default_factory=FrozenMap)

    @property
    def probabilities(self) -> Mapping[str, NDArray[np.float32]]:
        """Probabilities HxW in 0..1 on the image's own grid, by structure.

        Each is a new float32 array, made of :attr:`logits` when it is asked for: their logistic
        function, resized as masks are. They are the decoder's, and not calibrated.

        Wherever a structure is present, ``mask == (probability >= 0.5)``, pixel by pixel, also
        where a head drew its boundary; where a person drew it, they are 0 and 1. An absent one
        (``scores[name].present``) has an empty mask whatever they are: the decoder's object score,
        or the head, speaks against it; where nothing was recalled they are 0. Where structures
        overlap, each keeps its own, and the label map has the highest. What is done to masks later,
        such as :func:`recallseg.runtime.volumes.slices.clean_up`, does not change them. If masks
        lie on a GPU, single pixels at 0.5 may fall on the other side by rounding.

        Raises
        ------
        StaleViewError
            When one is asked for, if the logits were not kept and are gone.
        InputError
            If the result was pickled or copied without its logits.
        """
        return Probabilities(self.logits, self.masks, self.scores, tuple(self.label_map.shape))

    @property
    def expected(self) -> Mapping[str, Expected]:
        """Dice that the library's head expects of results like this one, by structure.

        Of images like the exemplars that it was fitted on, see :attr:`HeadUse.grouping`: as far
        from the library, and segmented with the same IoU estimate. Where there is no mask, how
        likely that is right. Empty without a head.
        """
        return {} if self.quality.head is None else self.quality.head.expected(self.scores)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pixels, for ``NAME.json`` beside a mask."""
        return {
            "format_version": RECORD_FORMAT,
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
            "square_mm": None
            if self.spacing is None
            else {
                name: round(int(mask.sum()) * self.spacing[0] * self.spacing[1], 3)
                for name, mask in self.masks.items()
            },
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings.items()},
            "quality": self.quality.to_json(),
            "expected": {name: one.to_json() for name, one in self.expected.items()},
            "provenance": self.provenance.to_json(),
            "frame_memories": dict(self.frame_memories),
            "corrections": dict(self.corrections),
            "notice": self.notice,
        }

    def to_audit(self) -> dict[str, Any]:
        """Return what an audit log keeps: ``to_json``, less the command that names a folder."""
        record = self.to_json()
        del record["quality"]["mend"]
        return record

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        self._check_host("compared")
        other._check_host("compared")
        return same_fields(self, other, "timings", "logits")

    __hash__ = None  # type: ignore[assignment]  # arrays have none

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_host("pickled or copied")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.logits, LogitsOnModel):
            values["logits"] = FrozenMap()
        return type(self), tuple(values.values())

    def _check_host(self, what: str) -> None:
        if any(on_gpu(array) for array in (self.label_map, *self.masks.values())):
            raise InputError(
                f"a result whose masks lie on the GPU cannot be {what}: they belong to the caller "
                "of segment(out=...). Copy them to the CPU, or segment without out."
            )

    def __repr__(self) -> str:
        found = ", ".join(
            f"{name}: {int(mask.sum())} px" if self.scores[name].present else f"{name}: absent"
            for name, mask in self.masks.items()
        )
        notice = f", {self.notice}" if self.notice else ""
        recipe = self.provenance.recipe
        return (
            f"recallseg.Result({found}; quality {self.quality.flag}, k={recipe.k}, {recipe.engine} "
            f"{recipe.precision}, {self.timings.get('total', 0.0):.1f} ms{notice})"
        )
