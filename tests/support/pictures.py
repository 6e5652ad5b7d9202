"""Small annotated pictures on disk and in memory: a bright disc that moves, and its core."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from recallseg.runtime.formats.pairs import Annotated

__all__ = ["LABELS", "disc", "write_pairs"]

LABELS = "1=disc,2=core"


def disc(position: float, size: int = 64, name: str = "") -> Annotated:
    """Return a disc at ``position`` (0..1 along x) with a core; other positions look different."""
    y, x = np.mgrid[:size, :size] / size
    distance = np.hypot(y - 0.5, x - (0.25 + 0.5 * position))
    image = np.clip(60 + 120 * (distance < 0.22) + 60 * (distance < 0.1) + 15 * x, 0, 255)
    masks = {"disc": (distance < 0.22) & (distance >= 0.1), "core": distance < 0.1}
    return Annotated(name or f"disc-{position:.2f}", image.astype(np.uint8), masks)


def write_pairs(folder: Path, positions: list[float], size: int = 64) -> None:
    """Write ``disc-P.png`` and ``disc-P.mask.png`` for each position."""
    folder.mkdir(parents=True, exist_ok=True)
    for position in positions:
        annotated = disc(position, size)
        label_map = (annotated.masks["disc"] + 2 * annotated.masks["core"]).astype(np.uint8)
        cv2.imwrite(str(folder / f"{annotated.name}.png"), annotated.image)
        cv2.imwrite(str(folder / f"{annotated.name}.mask.png"), label_map)
