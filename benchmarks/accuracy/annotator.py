"""How many clicks a mask takes: a simulated person who clicks into the middle of the largest error.

The usual protocol of interactive segmentation (Sofiiuk et al., arXiv 2102.06583: next click at the
place farthest from the edge of the largest wrong region; clicks to reach a Dice, those that do not
get there counted as the most). Asked with no library, with 1, 4 and 16 annotated images, and with a
box round the reference in the place of the first click.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.dataset import Dataset, spread
from recallseg.benchmarks.accuracy.measure import REFERENCE_K
from recallseg.benchmarks.accuracy.recall import fill, member_tag
from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.engines.verification import mask_dice
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.corrections import Corrections
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = [
    "ANNOTATED",
    "BOX",
    "GOALS",
    "Clicked",
    "measure_clicks",
    "next_click",
    "tabulate",
]

ANNOTATED = (0, 1, 4, 16)
"""Annotated images in the library; 0: none, every structure is new."""
GOALS = (0.85, 0.90)
BOX = "box"
CLICKS = "clicks"
MOST_CLICKS = 10

Step = Callable[[str], None]


@dataclass(frozen=True)
class Clicked:
    """One image and structure.

    Attributes
    ----------
    annotated : images in the library.
    start : ``clicks``, or ``box`` where a box came first.
    clicks : corrections so far, the box included; 0 is the proposal, which is empty with no
        library.
    """

    dataset: str
    case: str
    structure: str
    annotated: int
    start: str
    clicks: int
    dice: float


def next_click(
    wanted: NDArray[np.bool_], found: NDArray[np.bool_]
) -> tuple[float, float, bool] | None:
    """Return where a person clicks next, x and y in pixels, and whether inside.

    None where all is right.
    """
    best: tuple[int, NDArray[np.bool_], bool] | None = None
    for inside, error in ((True, wanted & ~found), (False, found & ~wanted)):
        count, parts, stats, _ = cv2.connectedComponentsWithStats(error.astype(np.uint8))
        if count > 1:
            largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
            area = int(stats[largest, cv2.CC_STAT_AREA])
            if best is None or area > best[0]:
                best = area, np.asarray(parts == largest), inside
    if best is None:
        return None
    _, region, inside = best
    inner = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = divmod(int(np.argmax(inner)), region.shape[1])
    return float(x), float(y), inside


def measure_clicks(
    dataset: Dataset,
    bundle: Bundle,
    *,
    most_queries: int = 16,
    most_clicks: int = MOST_CLICKS,
    engine: str = defaults.ENGINE,
    precision: str = defaults.PRECISION,
    threads: int | None = None,
    step: Step = lambda name: None,
) -> list[Clicked]:
    """Let the simulated person correct every query that shows a structure.

    Raises
    ------
    BundleError
        If the bundle has no graph ``correct``.
    """
    queries = spread(dataset.queries, most_queries)
    found: list[Clicked] = []
    with TemporaryDirectory(prefix="recallseg-clicks-") as folder:
        path = Path(folder) / "library"
        counts = tuple(count for count in ANNOTATED if count)
        settings: dict[str, Any] = {"engine": engine, "precision": precision, "threads": threads}
        fill(path, bundle, dataset, counts=counts, **settings)
        with Library.open(path, bundle, **settings) as library:
            for annotated in ANNOTATED:
                for query in queries:
                    for name, mask in query.masks.items():
                        starts = (CLICKS, BOX) if annotated == 0 else (CLICKS,)
                        for start in starts:
                            session = _session(library, query.image, name, annotated)
                            for clicks, dice in _correct(
                                session, name, mask, start == BOX, most_clicks
                            ):
                                found.append(
                                    Clicked(
                                        dataset.name, query.name, name, annotated, start, clicks,
                                        dice,
                                    )
                                )  # fmt: skip
                            session.close()
                    step(query.name)
    return found


def _session(library: Library, image: Any, name: str, annotated: int) -> Corrections:
    if annotated and library.count(name, tags=member_tag(annotated)):
        k = min(REFERENCE_K, annotated)
        segmenter = Segmenter(library, k=k, structures=[name], tags=member_tag(annotated))
        return segmenter.correct(image)
    return Corrections(library, image)


def _correct(
    session: Corrections, name: str, wanted: NDArray[np.bool_], box: bool, most: int
) -> Iterator[tuple[int, float]]:
    """Yield the number of corrections, and the Dice after them."""
    mask = session.result.masks.get(name, np.zeros(session.shape, bool))
    yield 0, mask_dice(mask, wanted)
    for clicks in range(1, most + 1):
        if clicks == 1 and box:
            rows, columns = np.flatnonzero(wanted.any(axis=1)), np.flatnonzero(wanted.any(axis=0))
            ends = columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5
            mask = session.box(name, *(float(end) for end in ends)).masks[name]
        else:
            place = next_click(wanted, mask)
            if place is not None:
                mask = session.click(name, *place).masks[name]
        yield clicks, mask_dice(mask, wanted)


def clicks_to_reach(cases: Sequence[Clicked], goal: float, most: int) -> float:
    """Mean number of corrections to a Dice; an image that never gets there counts ``most`` + 1."""
    first: dict[tuple[str, str, str], int] = {}
    for one in cases:
        case = one.dataset, one.case, one.structure
        first.setdefault(case, most + 1)
        if one.dice >= goal:
            first[case] = min(first[case], one.clicks)
    return float(np.mean([*first.values()]))


def tabulate(found: Sequence[Clicked]) -> tuple[list[str], list[list[str]]]:
    """Return the table: for each data set and way, Dice by clicks, and clicks to each goal."""
    shown = (0, 1, 3, 5, 10)
    most = max(one.clicks for one in found)
    header = ["data set", "annotated", "start", *(f"Dice {c}" for c in shown if c <= most)]
    header += [f"clicks to {goal:g}" for goal in GOALS]
    rows = []
    for dataset in dict.fromkeys(one.dataset for one in found):
        for annotated, start in dict.fromkeys(
            (o.annotated, o.start) for o in found if o.dataset == dataset
        ):
            own = [
                o for o in found if (o.dataset, o.annotated, o.start) == (dataset, annotated, start)
            ]
            dice = [
                float(np.mean([o.dice for o in own if o.clicks == c])) for c in shown if c <= most
            ]
            reached = [clicks_to_reach(own, goal, most) for goal in GOALS]
            rows.append(
                [dataset, str(annotated), start, *(f"{d:.3f}" for d in dice)]
                + [f"{r:.1f}" for r in reached]
            )
    return header, rows
