"""Make the pictures of README and tutorial from the demo's data: python scripts/docs/pictures.py.

The masks in them are what the tool answers, drawn in the colours of its reports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from recallseg import Library, Segmenter
from recallseg.runtime.reports.demo import DemoSlices, fill_library, load_slices
from recallseg.runtime.reports.pictures import colour

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
TISSUES = ("grey matter", "white matter")
HEIGHT = 190
GAP = 6


def main() -> None:
    """Write all pictures."""
    with tempfile.TemporaryDirectory() as folder:
        slices = load_slices()
        with Library.create(Path(folder, "demo"), "demo") as library:
            fill_library(library, slices)
            segmenter = Segmenter(library, k=3, structures=TISSUES)
            query = slices.queries[8]
            result = segmenter.segment(query.image)
            by_name = {each.name: each for each in slices.exemplars}
            recalled = [by_name[match.key] for match in result.recalled[TISSUES[0]]]
            shown = [drawn(each.image, each.masks) for each in recalled]
            save(
                "demo.png",
                [drawn(query.image, {}), None, *shown, None, drawn(query.image, result.masks)],
            )
        tutorial(Path(folder), load_slices(count=10))


def tutorial(folder: Path, slices: DemoSlices) -> None:
    """Write the tutorial's pictures, of its own library and queries."""
    save("tutorial-annotated.png", [drawn(each.image, each.masks) for each in slices.exemplars], 5)
    with Library.create(folder / "tutorial", "demo") as library:
        for each in slices.exemplars:
            masks = {name: each.masks[name] for name in TISSUES if name in each.masks}
            absent = [name for name in TISSUES if name not in masks]
            library.add(each.image, masks, absent=absent, key=each.name)
        segmenter = Segmenter(library, k=4, structures=TISSUES)
        found = []
        for each in slices.queries[0::3]:
            result = segmenter.segment(each.image)
            found += [drawn(each.image, {}), drawn(each.image, result.masks)]
        save("tutorial-found.png", found)


def drawn(image: np.ndarray[Any, Any], masks: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return an image in 0..1, BGR of 8 bits, with the tissues' masks over it."""
    large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    picture = cv2.cvtColor((large.clip(0, 1) * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    for index, name in enumerate(TISSUES):
        if name not in masks or not masks[name].any():
            continue
        mask = masks[name].astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        text = colour(index).lstrip("#")
        bgr = tuple(int(text[at : at + 2], 16) for at in (4, 2, 0))
        tinted = picture.astype(np.float32) * 0.72 + np.array(bgr, np.float32) * 0.28
        picture = np.where(mask[..., None] > 0, tinted, picture).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, bgr, 1, cv2.LINE_AA)
    width = round(picture.shape[1] * HEIGHT / picture.shape[0])
    return cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA)


def save(name: str, pictures: Sequence[np.ndarray[Any, Any] | None], columns: int = 99) -> None:
    """Write pictures side by side, in rows of ``columns``; None is an arrow."""
    rows = []
    for begin in range(0, len(pictures), columns):
        row: list[Any] = []
        for each in pictures[begin : begin + columns]:
            row += [arrow() if each is None else each, np.full((HEIGHT, GAP, 3), 16, np.uint8)]
        rows += [np.hstack(row[:-1]), None]
    width = max(each.shape[1] for each in rows if each is not None)
    whole = np.vstack(
        [np.full((GAP, width, 3), 16, np.uint8) if each is None else each for each in rows[:-1]]
    )
    whole = cv2.copyMakeBorder(whole, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=(16, 16, 16))
    ASSETS.mkdir(exist_ok=True)
    cv2.imwrite(str(ASSETS / name), whole, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def arrow() -> np.ndarray[Any, Any]:
    """Return an arrow to the right."""
    picture = np.full((HEIGHT, 34, 3), 16, np.uint8)
    middle = HEIGHT // 2
    cv2.arrowedLine(
        picture, (5, middle), (29, middle), (200, 200, 200), 2, cv2.LINE_AA, tipLength=0.4
    )
    return picture


if __name__ == "__main__":
    main()
