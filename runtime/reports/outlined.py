"""Masks outlined on the image that they are of, in pixels: for PNG, where no browser draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.model.preprocess import Intensity, scale_intensities
from recallseg.runtime.reports.pictures import PALETTE
from recallseg.runtime.segmenting.result import Result

__all__ = ["LEGEND", "draw_legend", "draw_mark", "draw_outlines", "fitted", "outlined_picture"]

LEGEND = 28  # pixels high
_SIDES = 512, 1024  # longest: small pictures are enlarged, so that outlines can be told apart


def fitted(image: NDArray[Any], spacing: tuple[float, float] | None, side: int) -> tuple[int, int]:
    """Return width and height with ``side`` pixels for the longer one, undistorted.

    ``spacing`` is mm between rows and columns; None: equal.
    """
    row_mm, column_mm = spacing or (1.0, 1.0)
    height, width = image.shape[0] * row_mm, image.shape[1] * column_mm
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_outlines(
    image: NDArray[Any],
    masks: Iterable[NDArray[np.bool_]],
    intensity: Intensity,
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Return an image with each mask's outline in the colour of its place: HxWx3, BGR.

    Parameters
    ----------
    image : HxW or HxWx3 (RGB), any real dtype.
    masks : HxW each, in the order of the structures.
    intensity : the library's rule, so that a picture shows what the networks saw.
    size : width and height of what is returned.
    """
    pixels = (scale_intensities(image, intensity) * 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    drawn = cv2.resize(np.ascontiguousarray(pixels[..., ::-1]), size, interpolation=cv2.INTER_AREA)
    for index, mask in enumerate(masks):
        scaled = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(scaled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, _bgr(index), 1, cv2.LINE_AA)
    return np.asarray(drawn, np.uint8)


def draw_mark(image: NDArray[np.uint8], text: str, flag: str) -> None:
    """Write into an image's corner, in the colour of a quality flag."""
    _write(image, text, (4, 14), (80, 160, 255) if flag == "suspect" else (200, 200, 200))


def draw_legend(sheet: NDArray[np.uint8], structures: Iterable[str], notice: str) -> None:
    """Write into a sheet's last rows which colour is which structure, and the notice."""
    x, y = 6, sheet.shape[0] - LEGEND + 19
    for index, name in enumerate(structures):
        x += 16 + _write(sheet, name, (x, y), _bgr(index))
    _write(sheet, notice.upper(), (x + 10, y), (80, 80, 255))


def outlined_picture(image: NDArray[Any], result: Result, intensity: Intensity) -> bytes:
    """Return a PNG of an image with what was found in it, undistorted where its spacing is known.

    Parameters
    ----------
    image : HxW or HxWx3 (RGB), that was segmented.
    """
    side = min(max(*image.shape[:2], _SIDES[0]), _SIDES[1])
    size = fitted(image, result.spacing, side)
    drawn = draw_outlines(image, result.masks.values(), intensity, size)
    sheet = np.zeros((drawn.shape[0] + LEGEND, max(drawn.shape[1], _SIDES[0]), 3), np.uint8)
    sheet[: drawn.shape[0], : drawn.shape[1]] = drawn
    draw_legend(sheet, result.labels, result.notice)
    draw_mark(sheet, result.quality.flag, result.quality.flag)
    _, data = cv2.imencode(".png", sheet)
    return data.tobytes()


def _write(
    image: NDArray[np.uint8], text: str, at: tuple[int, int], ink: tuple[int, int, int]
) -> int:
    """Write ASCII on an image, its base line at x and y; return the width, in pixels."""
    text = text.encode("ascii", "replace").decode()
    for colour, width in (((0, 0, 0), 3), (ink, 1)):
        cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width, cv2.LINE_AA)
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0])


def _bgr(index: int) -> tuple[int, int, int]:
    code = PALETTE[index % len(PALETTE)]
    return int(code[5:7], 16), int(code[3:5], 16), int(code[1:3], 16)
