"""The images of a report: query, masks against reference, and what was recalled."""

from __future__ import annotations

import math
from html import escape

from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.cases import Case, Evaluation, Illustration
from recallseg.runtime.reports.format import milliseconds, number
from recallseg.runtime.reports.pictures import Source, Thumbnail, colour, legend

__all__ = ["Gallery"]

EXEMPLAR_SIDE = 150
MOST_RECALLED = 8
MOST_COLUMNS = 5


class Gallery:
    """The images, lowest Dice first, each with what was recalled for it."""

    def __init__(self, evaluation: Evaluation, intensity: Intensity, source: Source) -> None:
        self._evaluation = evaluation
        self._intensity = intensity
        self._source = source
        self._exemplars: dict[str, str] = {}
        self._symbols: list[str] = []

    def render(self) -> str:
        """Return the sections; nothing when there is no image to show."""
        shown = self._evaluation.illustrations
        if not shown:
            return ""
        names = {timing.case for timing in self._evaluation.timings}
        if len(shown) == len(names):
            groups = [("Every image, lowest Dice first", shown)]
        else:
            half = len(shown) // 2
            groups = [
                (f"The {half} lowest of {len(names)} images", shown[:half]),
                (f"The {len(shown) - half} highest of {len(names)} images", shown[: half - 1 : -1]),
            ]
        sections = []
        position = 0
        for title, illustrations in groups:
            cards = []
            for illustration in illustrations:
                position += 1
                cards.append(self._card(illustration, f"q{position}"))
            sections.append(
                f"<section><h2>{escape(title)}</h2>{legend(self._evaluation.structures)}"
                f"{''.join(cards)}</section>"
            )
        symbols = "".join(self._symbols)
        return f'<svg class="store" aria-hidden="true">{symbols}</svg>{"".join(sections)}'

    def _card(self, illustration: Illustration, identifier: str) -> str:
        annotated, result = illustration.annotated, illustration.result
        picture = Thumbnail(annotated.image, self._intensity)
        panels = [
            f'<figure><svg viewBox="{picture.view_box}">{picture.element(identifier)}</svg>'
            "<figcaption>query</figcaption></figure>"
        ]
        for index, name in enumerate(self._evaluation.structures):
            case = illustration.cases.get(name)
            layers = [f'<use href="#{identifier}"/>']
            layers.append(picture.path(result.masks[name], "predicted", colour(index)))
            if name in annotated.masks:
                layers.append(picture.path(annotated.masks[name], "reference"))
            score = _verdict(case)
            panels.append(
                f'<figure><svg viewBox="{picture.view_box}">{"".join(layers)}</svg><figcaption>'
                f'<i class="swatch" style="background:{colour(index)}"></i>{escape(name)} {score}'
                f"</figcaption></figure>"
            )
        columns = min(max(len(panels), 3), MOST_COLUMNS)
        flag = result.quality.flag
        reasons = "; ".join(
            f"{name}: {reason}"
            for name, all_of in result.quality.reasons.items()
            for reason in all_of
        )
        why = f'<p class="reasons">{escape(reasons)}</p>' if reasons else ""
        return (
            f'<article><h3>{escape(annotated.name)}<span class="mean">mean Dice '
            f'{illustration.dice:.3f}</span><span class="flag {escape(flag)}">{escape(flag)}</span>'
            f"</h3>"
            f'<div class="panels" style="--columns:{columns}">{"".join(panels)}</div>'
            f"{self._numbers(illustration)}{why}"
            f"{self._recalled(illustration)}</article>"
        )

    def _numbers(self, illustration: Illustration) -> str:
        unit = "mm" if self._evaluation.in_mm else "px"
        parts = []
        for name, case in illustration.cases.items():
            parts.append(
                f"<span><b>{escape(name)}</b> IoU {case.iou:.3f} "
                f"(estimated {case.iou_estimate:.2f}), HD95 {number(case.hd95, 1)} {unit}</span>"
            )
        total = illustration.result.timings.get("total", math.nan)
        parts.append(f"<span><b>latency</b> {milliseconds(total)}</span>")
        return f'<p class="numbers">{"".join(parts)}</p>'

    def _recalled(self, illustration: Illustration) -> str:
        distances: dict[str, float] = {}
        used_for: dict[str, list[str]] = {}
        for name, found in illustration.result.recalled.items():
            for recalled in found:
                distances[recalled.key] = recalled.distance
                if not recalled.absent:
                    used_for.setdefault(recalled.key, []).append(name)
        nearest = sorted(distances, key=lambda key: distances[key])
        everything = len(self._evaluation.structures)
        figures = []
        for key in nearest[:MOST_RECALLED]:
            names = used_for.get(key, [])
            part = (
                ""
                if len(names) == everything
                else f"<em>{escape(', '.join(names) or 'absent')}</em>"
            )
            figures.append(
                f"<figure>{self._exemplar(key)}<figcaption>{escape(key)}<br>"
                f"<small>distance {distances[key]:.4f}</small>{part}</figcaption></figure>"
            )
        more = len(nearest) - MOST_RECALLED
        rest = f'<span class="more">and {more} more</span>' if more > 0 else ""
        return (
            f'<h4>Recalled, nearest first{rest}</h4><div class="recalled">{"".join(figures)}</div>'
        )

    def _exemplar(self, key: str) -> str:
        """Return an exemplar's picture; its pixels are in the page once, however often recalled."""
        if key not in self._exemplars:
            source = self._source(key)
            if source is None:
                self._exemplars[key] = '<div class="unkept">source image not kept</div>'
            else:
                image, masks = source
                picture = Thumbnail(image, self._intensity, EXEMPLAR_SIDE)
                identifier = f"e{len(self._exemplars)}"
                outlines = "".join(
                    picture.path(masks[name], "exemplar", colour(index))
                    for index, name in enumerate(self._evaluation.structures)
                    if name in masks
                )
                self._symbols.append(
                    f'<symbol id="{identifier}" viewBox="{picture.view_box}">'
                    f"{picture.element(identifier + 'i')}{outlines}</symbol>"
                )
                self._exemplars[key] = (
                    f'<svg viewBox="{picture.view_box}"><use href="#{identifier}"/></svg>'
                )
        return self._exemplars[key]


def _verdict(case: Case | None) -> str:
    if case is None:
        return "not annotated"
    if case.reference_volume == 0:
        return "absent, as it is" if case.predicted_volume == 0 else "<b>absent, yet drawn</b>"
    return f"<b>{case.dice:.3f}</b>{' missed' if case.predicted_volume == 0 else ''}"
