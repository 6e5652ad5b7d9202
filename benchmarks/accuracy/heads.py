"""What a head brings on real images, beside a pixel forest; and what was expected of it before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.dataset import Dataset, spread
from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library import Library
from recallseg.runtime.library.choices import Expected
from recallseg.runtime.model.preprocess import Intensity, scale_intensities
from recallseg.runtime.reports.baselines import make_baselines
from recallseg.runtime.segmenting.fitting import FOLDS
from recallseg.runtime.segmenting.segmenter import Segmenter

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["Headed", "measure_head", "steps", "tabulate", "write_sheet"]

K = 8
MOST_QUERIES = 64
DRAWS, ALPHA = 2000, 0.05
SIDE, LINE = 320, 20
"""Pixels along a side of a picture on the sheet, and of a line of text above it."""
WHITE = (255, 255, 255)
COLOURS = ((255, 70, 70), (80, 210, 80), (70, 150, 255), (230, 90, 230))
ALONE, WITH_HEAD = "memory attention", "with head"
Masks = Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Headed:
    """One structure of a dataset: mean Dice over the queries in which it was looked for.

    Attributes
    ----------
    alone, head, forest : of memory attention, with the head, and of a pixel forest.
    low, high : 95 % interval of the head's gain, by a bootstrap over queries.
    mix, within, least : what was chosen, see :class:`recallseg.runtime.library.heads.Choice`.
    fitted : mean Dice that the fit expected of images as far from the library as its exemplars are
        from each other, before there was a query.
    expected, expected_low, expected_high : of results like those of the queries, as each says of
        itself, and the 95 % interval; NaN where nothing is known of one of them.
    beyond : whether some queries are farther than all exemplars that it was judged by.
    """

    dataset: str
    structure: str
    queries: int
    alone: float
    head: float
    forest: float
    low: float
    high: float
    mix: float
    within: bool
    least: float
    fitted: float
    expected: float
    expected_low: float
    expected_high: float
    beyond: bool


@dataclass(frozen=True)
class Shown:
    """A query and its masks by how they were made, for the sheet."""

    title: str
    query: Annotated
    intensity: Intensity
    masks: Mapping[str, Masks]


def measure_head(
    dataset: Dataset,
    bundle: Bundle,
    *,
    most_queries: int = MOST_QUERIES,
    forest: bool = True,
    engine: str | None = None,
    threads: int | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[list[Headed], list[Shown]]:
    """Fit a head on a dataset's exemplars, and measure it on its queries.

    No groups are told: each exemplar stands by itself.

    Parameters
    ----------
    forest : fit the baseline too (scikit-learn).
    step : called with what was done, after each exemplar that was added, each step of the fit, and
        each query; :func:`steps` says how often.

    Returns
    -------
    by structure; and the queries with the largest gain and the largest loss, worst first.
    """
    queries = spread(dataset.queries, most_queries)
    with (
        TemporaryDirectory(prefix="recallseg-head-") as folder,
        Library.create(
            Path(folder) / "library",
            bundle,
            intensity=dataset.intensity,
            engine=engine,
            threads=threads,
        ) as library,
    ):
        for image in dataset.exemplars:
            library.add(image.image, image.masks, absent=image.absent, key=image.name)
            step("adding exemplars")
        head = library.fit(dataset.structures, k=K, progress=lambda done, of: step("fitting"))
        ways = {
            ALONE: Segmenter(library, k=K, structures=dataset.structures, refine=False),
            WITH_HEAD: Segmenter(library, k=K, structures=dataset.structures),
        }
        others = make_baselines(["forest"] if forest else [], library, dataset.structures, K, 1)
        dice: dict[str, list[tuple[float, float, float]]] = {n: [] for n in dataset.structures}
        told: dict[str, list[tuple[float, float, bool]]] = {n: [] for n in dataset.structures}
        gains: list[tuple[float, Shown]] = []
        for query in queries:
            results = {name: way.segment(query.image) for name, way in ways.items()}
            masks: dict[str, Masks] = {name: found.masks for name, found in results.items()}
            embedding = library.embed(query.image) if others else np.empty(0, np.float32)
            masks |= {o.name: o.segment(query.image, embedding, ()) for o in others}
            own = []
            for name in dataset.structures:
                if name not in query.masks and name not in query.absent:
                    continue
                reference = query.masks.get(name, np.zeros(query.image.shape[:2], bool))
                found = [_dice(made[name], reference) for made in masks.values()]
                dice[name].append((found[0], found[1], found[2] if forest else np.nan))
                score = results[WITH_HEAD].scores[name]
                told[name].append((score.distance, score.iou, score.present))
                own.append(found[1] - found[0])
            title = f"{dataset.name}, {query.name}: {np.mean(own):+.3f}"
            gains.append((float(np.mean(own)), Shown(title, query, dataset.intensity, masks)))
            step(query.name)
    rows = []
    for name, values in dice.items():
        if not values:
            continue  # nobody looked for it in any query
        found_dice = np.array(values)
        choice, gain = head.choices[name], found_dice[:, 1] - found_dice[:, 0]
        drawn = np.random.default_rng(0).integers(len(gain), size=(DRAWS, len(gain)))
        low, high = np.quantile(gain[drawn].mean(1), [ALPHA / 2, 1 - ALPHA / 2])
        means = found_dice.mean(0)
        expected = choice.over(told[name]) or Expected(np.nan, np.nan, np.nan)
        rows.append(
            Headed(
                dataset.name,
                name,
                len(gain),
                float(means[0]),
                float(means[1]),
                float(means[2]),
                float(low),
                float(high),
                choice.mix,
                choice.within,
                choice.least,
                choice.expected,
                *expected,
            )
        )
    gains.sort(key=lambda one: one[0])
    return rows, [shown for _, shown in (gains[0], gains[-1])]


def steps(dataset: Dataset, most_queries: int = MOST_QUERIES) -> int:
    """Return how many steps :func:`measure_head` takes."""
    exemplars = len(dataset.exemplars)
    fit = 2 * exemplars + min(FOLDS, exemplars) + 1
    return exemplars + fit + min(most_queries, len(dataset.queries))


def _dice(found: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    return float(mask_dice(found, reference)) if found.any() or reference.any() else 1.0


def tabulate(rows: Sequence[Headed]) -> tuple[list[str], list[list[str]]]:
    """Return a header and rows, the last one with means over structures and over datasets."""
    header = ["data set", "structure", "alone", "with head", "gain", "forest", "share"]
    header += ["fit expected", "expected here", "interval"]
    table = []
    for one in rows:
        stays = one.mix == 0 and one.least == 0
        table.append(
            [
                one.dataset,
                one.structure,
                f"{one.alone:.3f}",
                "=" if stays else f"{one.head:.3f}",
                "" if stays else f"{one.low:+.3f} to {one.high:+.3f}",
                f"{one.forest:.3f}",
                f"{one.mix:.0%}{' within' if one.within else ''}{' least' if one.least else ''}",
                f"{one.fitted:.3f}",
                f"{one.expected:.3f}",
                f"{one.expected_low:.3f} to {one.expected_high:.3f}"
                + (" beyond" if one.beyond else ""),
            ]
        )
    names = dict.fromkeys(one.dataset for one in rows)
    sets = [[one for one in rows if one.dataset == name] for name in names]
    for title, parts in (("structures", [rows]), ("data sets", sets)):
        alone, head, forest, fitted, expected = _means(parts)
        table.append(
            [
                f"mean over {title}",
                "",
                *(f"{alone:.3f}", f"{head:.3f}", f"{head - alone:+.3f}"),
                *(f"{forest:.3f}", "", f"{fitted:.3f}", f"{expected:.3f}", ""),
            ]
        )
    off = np.array([_off(part) for part in sets])
    for title, values in (
        ("expected less found, data sets", _known_mean(off)),
        ("how far off, data sets", _known_mean(np.abs(off))),
    ):
        table.append([title, *[""] * 6, *(f"{value:+.3f}" for value in values), ""])
    return header, table


def _means(parts: Sequence[Sequence[Headed]]) -> NDArray[np.float64]:
    """Return the mean over parts of their means, see :func:`_mean`."""
    means: NDArray[np.float64] = np.mean([_mean(part) for part in parts], axis=0)
    return means


def _off(part: Sequence[Headed]) -> NDArray[np.float64]:
    """Return expected less found, by the fit and of these queries, on average over structures."""
    return _known_mean(np.array([(o.fitted - o.head, o.expected - o.head) for o in part]))


def _known_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means over rows of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(0)
    sums = np.where(known, values, 0.0).sum(0)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


def _mean(part: Sequence[Headed]) -> NDArray[np.float64]:
    """Return the mean over structures: alone, with head, forest, expected by the fit, and here."""
    values = [(o.alone, o.head, o.forest, o.fitted, o.expected) for o in part]
    mean: NDArray[np.float64] = np.mean(values, axis=0)
    return mean


def write_sheet(path: Path, shown: Sequence[Shown]) -> None:
    """Write a PNG: a row for each query with the image, its reference, and what each way drew.

    Above each picture stands what it is, beside the query's name which structure has which colour.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    rows = []
    for one in shown:
        grey = (255 * scale_intensities(one.query.image, one.intensity)).astype(np.uint8)
        picture = np.repeat(grey[..., None], 3, 2) if grey.ndim == 2 else grey
        drawn = [picture]
        drawn += [_drawn(picture, m, one) for m in (one.query.masks, *one.masks.values())]
        row = np.hstack([_fitted(image) for image in drawn])
        band = np.zeros((2 * LINE, row.shape[1], 3), np.uint8)
        at = _write(band, one.title, 4, 0, WHITE)
        for i, name in enumerate(next(iter(one.masks.values()))):
            at = _write(band, name, at + 16, 0, COLOURS[i % len(COLOURS)])
        for i, title in enumerate(("image", "reference", *one.masks)):
            _write(band, title, 4 + i * SIDE, LINE, WHITE)
        rows += [band, row]
    width = max(row.shape[1] for row in rows)
    sheet = np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    if not cv2.imwrite(str(path), sheet[..., ::-1]):
        raise InputError(f"{path} cannot be written.")


def _write(band: NDArray[Any], text: str, left: int, top: int, colour: tuple[int, int, int]) -> int:
    """Write a text into a line of a band, and return where it ends."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    cv2.putText(band, text, (left, top + 14), font, scale, colour, 1, cv2.LINE_AA)
    (width, _), _ = cv2.getTextSize(text, font, scale, 1)
    return left + width


def _fitted(image: NDArray[Any]) -> NDArray[Any]:
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    kind = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    fitted = np.zeros((SIDE, SIDE, 3), np.uint8)
    fitted[: size[1], : size[0]] = cv2.resize(image, size, interpolation=kind)
    return fitted


def _drawn(picture: NDArray[Any], masks: Masks, one: Shown) -> NDArray[Any]:
    """Return the picture, enlarged by whole pixels, with outlines of masks."""
    times = -(-SIDE // max(picture.shape[:2]))
    large = np.ascontiguousarray(picture.repeat(times, 0).repeat(times, 1))
    for i, name in enumerate(next(iter(one.masks.values()))):
        if name in masks:
            mask = np.asarray(masks[name]).astype(np.uint8).repeat(times, 0).repeat(times, 1)
            lines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(large, lines, -1, COLOURS[i % len(COLOURS)], 1)
    return large
