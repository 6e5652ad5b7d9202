"""What a result is judged by, and the judgement."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.library.heads import Head
from recallseg.runtime.segmenting.acquisition import Acquisition, differences
from recallseg.runtime.segmenting.calibration import InForce, in_force
from recallseg.runtime.segmenting.presence import ABSENT_SCORE, DOUBTFUL_SHARE
from recallseg.runtime.segmenting.recipe import Recipe
from recallseg.runtime.segmenting.refining import describe_head, mend_head
from recallseg.runtime.segmenting.result import HeadUse, Quality, Score

__all__ = ["Standing", "Standings", "differing_from"]


class Standing(NamedTuple):
    """What holds for a library when a query is asked.

    Attributes
    ----------
    limits : what is usual, by structure.
    mend : how to mend what lacks; may be empty.
    head : what the library's head has to do with results; None without one.
    """

    limits: Mapping[str, InForce]
    mend: str
    head: HeadUse | None

    def judge(
        self,
        scores: Mapping[str, Score],
        recalled: Mapping[str, tuple[Match, ...]],
        available: Mapping[str, int],
        differing: Mapping[str, Sequence[str]],
        small: Collection[str],
        blank: Collection[str] = (),
    ) -> Quality:
        """Return what a result is worth, and the reasons to look at it.

        Parameters
        ----------
        scores, recalled, available : of the result, by structure.
        differing : how what was recalled differs from the image, see :func:`differing_from`.
        small : structures that have no mask because so little of them is not believed.
        blank : whose masks have no pixel: suspect where it is calibrated, as others are not trusted
            anyway. Of masks that lie on a GPU that is not looked at.
        """
        reasons: dict[str, tuple[str, ...]] = {}
        for name, score in scores.items():
            limits, found = self.limits[name].thresholds, []
            if not available[name]:
                found.append("no exemplar that shows it is left in the library")
            if (
                limits.distance is not None
                and recalled[name]
                and recalled[name][0].distance > limits.distance
            ):
                found.append(
                    f"unlike the library: distance {recalled[name][0].distance:.3f} to the nearest "
                    f"exemplar, usual is up to {limits.distance:.3f}"
                )
            if name in small and score.object_score > 0:  # else it is absent without that
                rule = "" if self.head is None else self.head.choices[name].absence
                found.append(f"likely absent by the library's head: {rule}")
            elif not score.present and score.object_score != ABSENT_SCORE:
                found.append(f"likely absent: object score {score.object_score:.1f}")
            if score.present and name in blank and self.limits[name].calibrated is not None:
                found.append(
                    f"no pixel is drawn, though by its object score {score.object_score:.1f} it is "
                    "there: maybe too small for the networks, or too unlike the exemplars"
                )
            if score.present and score.presence < DOUBTFUL_SHARE:
                found.append("may be absent: annotated images most like this one lack it")
            if score.present and limits.iou is not None and score.iou < limits.iou:
                found.append(
                    f"low IoU estimate {score.iou:.2f}, usual is at least {limits.iou:.2f}"
                )
            found += differing.get(name, ())
            if found:
                reasons[name] = tuple(found)
        calibrated = {
            name: limits.calibrated
            for name, limits in self.limits.items()
            if limits.calibrated is not None
        }
        whole = len(calibrated) == len(self.limits)
        flag = "suspect" if reasons else "ok" if whole else "uncalibrated"
        return Quality(flag, FrozenMap(reasons), FrozenMap(calibrated), self.mend, self.head)


class Standings:
    """Keeps what holds for a library, and looks again when that was changed.

    Parameters
    ----------
    library, recipe, structures : what is asked for, and of whom.
    fitted : the head at work; None without one.
    head : what the library's head has to do with results, at work or not.
    """

    def __init__(
        self,
        library: Library,
        recipe: Recipe,
        structures: tuple[str, ...],
        fitted: Head | None,
        head: HeadUse | None,
    ) -> None:
        self._library, self._recipe, self._structures = library, recipe, structures
        self._digests = recipe.digests(library.bundle.former_identities)
        self._fitted, self.head = fitted, head
        self._limits_now: dict[str, InForce] = {}
        self._limits_of: Any = None
        self._commits: Any = None
        self._mend_now = ""

    def now(self) -> Standing:
        """Return what holds for the library now."""
        limits = self.limits()
        whole = all(found.calibrated is not None for found in limits.values())
        self._mend_now = self._mend_now or ("" if whole else self._mend(limits))
        mend = "; ".join(filter(None, [self._mend_now, mend_head(self._library, self.head)]))
        return Standing(limits, mend, self.head)

    def limits(self) -> Mapping[str, InForce]:
        """Return what holds for the library, and its calibrations, as they are now."""
        commits = self._library.commits
        if self._commits == commits:
            return self._limits_now
        library = self._library
        marks = library.calibration_marks(self._digests)
        state = library.digest, marks, library.heads.groups()
        if self._limits_of != state:
            learnt = self._library.learnt(self._digests, self._structures, self._recipe.tags)
            self._limits_now = {name: in_force(found) for name, found in learnt.items()}
            self._limits_of = state
        if self._fitted is not None:
            self.head = describe_head(self._library, self._fitted, self._structures)
        self._commits, self._mend_now = commits, ""
        return self._limits_now

    def _mend(self, limits: Mapping[str, InForce]) -> str:
        """Say what is not calibrated, why, and the command that calibrates it."""
        missing = {name: one.missing for name, one in limits.items() if one.calibrated is None}
        whys = [f"'{name}': {why}" for name, why in missing.items() if why]
        if not whys and self._library.has_former_calibration:
            whys = ["what an older RecallSeg stored does not say for which settings it holds"]
        because = f" ({'; '.join(whys)})" if whys else ""
        recipe = self._recipe
        command = [
            *("recallseg", "library", "calibrate", str(self._library.path), "--k", str(recipe.k)),
            *("--reach", f"{recipe.reach:g}", "--structures", ",".join(missing)),
            *("--engine", recipe.engine, "--precision", recipe.precision),
            *(f"--tag={name}={value}" for name, value in recipe.tags.items()),
        ]
        return (
            f"{', '.join(missing)} not calibrated for these settings"
            f"{because}: {shlex.join(command)}"
        )


def differing_from(
    library: Library,
    acquisition: Acquisition | None,
    shape: tuple[int, int],
    recalled: Mapping[str, tuple[Match, ...]],
) -> dict[str, list[str]]:
    """Return how what was recalled differs in scale and side, by structure."""
    if acquisition is None or acquisition == Acquisition():
        return {}
    keys = {match.key for found in recalled.values() for match in found if not match.absent}
    known = {key: library.get(key) for key in keys if key in library}
    return {
        name: differences(
            acquisition,
            *shape,
            [known[match.key] for match in found if match.key in known and not match.absent],
        )
        for name, found in recalled.items()
    }
