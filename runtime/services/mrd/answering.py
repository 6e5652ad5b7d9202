"""One image of a scanner, asked and answered: as mask, overlay, and contours."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import DeadlineError, RecallSegError
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.reports.pictures import colour
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.mrd.parameters import Said, Wish
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.mrd.volumes import shown_of, volume_of
from recallseg.runtime.services.mrd.wire import (
    IMAGINARY,
    MAGNITUDE,
    PHASE,
    RGB,
    Image,
    attributes_of,
    with_attributes,
)
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Arriving, Rule, fitting
from recallseg.runtime.volumes.slices import VolumeResult, clean_up, segment_volume

__all__ = ["Answer", "Answerer", "Question"]

Made = TypeVar("Made")
Kind = TypeVar("Kind", bound=np.generic)

VARIANTS = 8
"""Rules with other structures or k that are kept open at once; what asked for others goes first."""
OPACITY = 0.4


@dataclass(frozen=True)
class Answer:
    """What came of one image.

    Attributes
    ----------
    images : messages, each with the kind that its series is of; who gets them may change them.
    state : ``answered``, ``unmatched``, ``skipped``, ``late`` or ``failed``.
    notes : sentences for the scanner's log.
    """

    images: tuple[tuple[str, bytearray], ...] = ()
    state: str = "answered"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked of one image.

    Attributes
    ----------
    rules, asked : those that fit, and the same with what is wished for.
    volume, notes : see :func:`volume_of`.
    """

    image: Image
    attributes: dict[str, list[str]]
    wish: Wish
    rules: tuple[Rule, ...]
    asked: tuple[Rule, ...]
    volume: Volume
    notes: tuple[str, ...]


class Answerer:
    """Asks what rules say of images; in a process of its own, in several threads.

    Parameters
    ----------
    rules : all there are.
    audit : in which every segmentation is recorded before it is sent.
    """

    def __init__(
        self, rules: Sequence[Rule], settings: MrdSettings, audit: AuditLog | None
    ) -> None:
        self._rules = {rule.name: rule for rule in rules}
        self._settings, self._audit = settings, audit
        self._questions = Questions()
        self._variants: OrderedDict[str, Rule] = OrderedDict()
        self._lock = threading.Lock()
        self._log = ServiceLog("mrd.answer")

    def warm_up(self) -> None:
        """Open what rules ask; what cannot be opened yet is tried again when it is asked."""
        for name, error in self._questions.warm_up(self._rules.values()).items():
            self._log.error("a rule cannot be asked", rule=name, error=error)

    def close(self) -> None:
        """Close libraries and models."""
        self._questions.close()

    def prepare(self, raw: bytes | bytearray, said: Said) -> Question | Answer:
        """Return what is asked of an image, or the answer where nothing is.

        Parameters
        ----------
        raw : its message.
        said : what the connection said before it.
        """
        return self._safely(lambda: self._prepare(raw, said))

    def segment(self, question: Question, until: float) -> tuple[VolumeResult, ...] | Answer:
        """Return what comes of each rule, or the answer where nothing does.

        Parameters
        ----------
        until : when it is too late, by ``time.monotonic``.
        """
        return self._safely(
            lambda: tuple(self._segmented(rule, question.volume, until) for rule in question.asked)
        )

    def answer(self, question: Question, results: Sequence[VolumeResult], *, nul: bool) -> Answer:
        """Return the messages of what was found, once that is cleaned up and recorded.

        Parameters
        ----------
        results : of the rules, in their order.
        nul : whether texts end with NUL.
        """
        return self._safely(lambda: self._answer(question, results, nul))

    def _safely(self, do: Callable[[], Made]) -> Made | Answer:
        """Do a part of the work; what keeps it from being done is an answer too."""
        try:
            return do()
        except DeadlineError:
            return Answer(state="late", notes=("an image took too long: it is passed on alone.",))
        except (RecallSegError, OSError, MemoryError) as error:
            self._log.error("an image cannot be segmented", error=error)
            return Answer(state="failed", notes=(f"an image cannot be segmented: {error}",))

    def _prepare(self, raw: bytes | bytearray, said: Said) -> Question | Answer:
        image = Image.of(raw)
        wish = Wish.of(said, tuple(self._rules), self._settings.returned)
        if not (wish.returned.mask or wish.returned.overlay or wish.returned.roi):
            return Answer(state="skipped")
        if int(image.header["image_type"]) in (PHASE, IMAGINARY):
            return Answer(
                state="skipped",
                notes=("images of phase and imaginary parts are passed on, not segmented.",),
            )
        attributes = attributes_of(image.attributes)
        rules = self._fitting(wish, said, attributes)
        if not rules:
            return Answer(
                state="unmatched",
                notes=(
                    f"no rule fits configuration '{said.config}', series description "
                    f"'{_description(said, attributes)}': images are passed on alone.",
                ),
            )
        volume, notes = volume_of(image, attributes)
        asked = tuple(self._asked(rule, wish) for rule in rules)
        return Question(image, attributes, wish, rules, asked, volume, notes)

    def _answer(self, question: Question, results: Sequence[VolumeResult], nul: bool) -> Answer:
        volume, wish, notes = question.volume, question.wish, question.notes
        made: list[tuple[str, bytearray]] = []
        for rule, segmented in zip(question.rules, results, strict=True):
            result = self._recorded(rule, volume, segmented)
            labels = _as_sent(volume, result.label_map)
            told = _told(rule, result)
            answers = _answers(
                question.image, question.attributes, volume, labels, result, rule, told, wish
            )
            if wish.returned.roi and labels.shape[0] > 1:
                notes = (*notes, "contours are made of two-dimensional images only.")
            made += [
                (f"{rule.name} {kind}", self._coloured(kind, each).message(nul=nul))
                for kind, each in answers
            ]
        return Answer(tuple(made), notes=notes)

    def _segmented(self, rule: Rule, volume: Volume, until: float) -> VolumeResult:
        left_ms = (until - time.monotonic()) * 1e3
        if left_ms <= 0:
            raise DeadlineError("an image had waited too long and was not begun.")
        with self._questions.ask(rule) as segmenter:
            return segment_volume(
                segmenter,
                volume,
                plane=rule.volumes.plane if volume.frame != "image" else None,
                deadline_ms=max(0.0, (until - time.monotonic()) * 1e3),
            )

    def _recorded(self, rule: Rule, volume: Volume, result: VolumeResult) -> VolumeResult:
        """Return what is answered, once it is in the log."""
        if rule.volumes.largest or rule.volumes.fill_holes:
            result = clean_up(
                result, largest=rule.volumes.largest, fill_holes=rule.volumes.fill_holes
            )
        if self._audit is not None:
            self._audit.record(volume.array, result.label_map, result.to_audit(volume))
        return result

    def _fitting(
        self, wish: Wish, said: Said, attributes: dict[str, list[str]]
    ) -> tuple[Rule, ...]:
        if wish.rule:
            return (self._rules[wish.rule],)
        arriving = Arriving(
            "MR",
            said.body_part,
            _description(said, attributes),
            (said.station,),
            said.config,
            said.parameters,
        )
        return fitting(self._rules.values(), arriving)

    def _asked(self, rule: Rule, wish: Wish) -> Rule:
        """Return the rule with what is wished for, under a name of its own."""
        if wish.structures is None and wish.k is None:
            return rule
        recipe = rule.recipe if wish.k is None else rule.recipe.model_copy(update={"k": wish.k})
        structures = wish.structures or rule.structures
        name = f"{rule.name} {recipe.k} {','.join(structures or ())}"
        changes = {"name": name, "recipe": recipe, "structures": structures}
        variant = rule.model_copy(update=changes)
        with self._lock:
            self._variants[name] = variant
            self._variants.move_to_end(name)
            while len(self._variants) > VARIANTS:
                self._questions.forget(self._variants.popitem(last=False)[1])
        return variant

    def _coloured(self, kind: str, image: Image) -> Image:
        if kind != "mask" or not self._settings.colours:
            return image
        attributes = attributes_of(image.attributes)
        attributes["LUTFileName"] = [self._settings.colours]
        return replace(image, attributes=with_attributes(attributes))


def _description(said: Said, attributes: dict[str, list[str]]) -> str:
    return "_".join(attributes.get("SeriesDescription", ())) or said.description


def _told(rule: Rule, result: VolumeResult) -> str:
    flags = ", ".join(f"{flag} {count}" for flag, count in result.flags.items())
    names = ", ".join(f"{value} {name}" for name, value in result.labels.items())
    notice = f"; {result.notice}" if result.notice else ""
    return f"RecallSeg {rule.name}: {names}; quality: {flags}{notice}"


def _answers(
    image: Image,
    attributes: dict[str, list[str]],
    volume: Volume,
    labels: NDArray[np.uint8],
    result: VolumeResult,
    rule: Rule,
    told: str,
    wish: Wish,
) -> list[tuple[str, Image]]:
    """Return the images to answer, by kind; ``labels`` are Z x Y x X."""

    def about(kind: str, role: str, **more: Sequence[str]) -> str:
        return with_attributes(
            {
                **attributes,
                "DataRole": [role],
                "Keep_image_geometry": ["1"],
                "ImageProcessingHistory": [
                    *attributes.get("ImageProcessingHistory", ()), "RECALLSEG", kind.upper(),
                ],
                "SeriesDescriptionAdditional": [
                    *attributes.get("SeriesDescriptionAdditional", ()), rule.name, kind,
                ],
                "ImageType": [*attributes.get("ImageType", ()), "RECALLSEG", kind.upper()],
                "ImageComment": [told],
                "ImageComments": [told],
                **more,
            }
        )  # fmt: skip

    made: list[tuple[str, Image]] = []
    if wish.returned.mask:
        most = len(result.labels)
        window = {"WindowCenter": [str((most + 1) // 2)], "WindowWidth": [str(most + 1)]}
        # A role of which scanners change no values.
        text = about("mask", "Quantitative", **window)
        made.append(("mask", image.answer(labels[None].astype("<u2"), text, image_type=MAGNITUDE)))
    if wish.returned.overlay:
        coloured = _overlay(image, labels, attributes, len(result.labels))
        window = {"WindowCenter": ["128"], "WindowWidth": ["256"]}
        made.append(
            ("overlay", image.answer(coloured, about("overlay", "Image", **window), image_type=RGB))
        )
    if wish.returned.roi and labels.shape[0] == 1:
        contours = _contours(
            {value: _as_sent(volume, result.mask(name))[0] for name, value in result.labels.items()}
        )
        text = about("roi", "Image", **contours)
        made.append(("roi", replace(image, attributes=text)))
    return made


def _overlay(
    image: Image, labels: NDArray[np.uint8], attributes: dict[str, list[str]], count: int
) -> NDArray[np.uint16]:
    """Return 3 x Z x Y x X, 0 to 255."""
    shown = shown_of(image).astype(np.float64)
    if len(shown) == 1:
        low, high = _window(shown, attributes)
        grey = np.clip((shown[0] - low) / max(high - low, 1e-12), 0, 1) * 255
        shown = np.stack([grey] * 3)
    for value in range(1, count + 1):
        name = colour(value - 1)
        inside = labels == value
        for channel in range(3):
            tint = int(name[1 + 2 * channel : 3 + 2 * channel], 16)
            plane = shown[channel]
            plane[inside] = (1 - OPACITY) * plane[inside] + OPACITY * tint
    return np.rint(np.clip(shown, 0, 255)).astype("<u2")


def _window(values: NDArray[np.float64], attributes: dict[str, list[str]]) -> tuple[float, float]:
    try:
        centre = float(attributes["WindowCenter"][0])
        width = float(attributes["WindowWidth"][0])
        if np.isfinite([centre, width]).all() and width > 0:
            return centre - width / 2, centre + width / 2
    except (KeyError, IndexError, ValueError):
        pass
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low), float(high)


def _as_sent(volume: Volume, array: NDArray[Kind]) -> NDArray[Kind]:
    """Return an array of a volume's voxels as Z x Y x X."""
    return np.ascontiguousarray(array if volume.frame == "image" else array.transpose(2, 1, 0))


def _contours(masks: Mapping[int, NDArray[np.bool_]]) -> dict[str, list[str]]:
    """Return closed contours for viewers, of parts and of holes: style, then rows and columns.

    The corner of the first pixel is 0, 0, and the middle of it 0.5, 0.5.
    """
    found: dict[str, list[str]] = {}
    for value, mask in masks.items():
        name = colour(value - 1)
        tint = [int(name[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        style = [*(f"{part:.4f}" for part in tint), "1", "0", "1"]
        # At twice the size contours, which run through pixels' middles, are nearly their edges.
        large = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
        contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        for number, contour in enumerate(contours):
            points = (contour.reshape(-1, 2)[:, ::-1] + 0.5) / 2
            closed = np.concatenate([points, points[:1]])
            found[f"ROI_{value}_{number + 1}"] = [
                *style,
                *(f"{each:.2f}" for each in closed.ravel()),
            ]
    return found
