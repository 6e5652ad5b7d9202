"""Pictures of a report: small JPEGs with vector contours over them, so that outlines stay sharp."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.model.preprocess import Intensity, scale_intensities

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["PALETTE", "Source", "Thumbnail", "colour", "legend", "outline", "source_of"]

Source = Callable[[str], "tuple[NDArray[Any], Mapping[str, NDArray[np.bool_]]] | None"]
"""Gives an exemplar's image and masks by key, or None if they were not kept."""

PALETTE = ("#f59e0b", "#22b8f0", "#7ac943", "#e8559d", "#a78bfa", "#f4d03f", "#2ac3a2", "#ff7161")
"""Distinct on grey images, for the common kinds of colour blindness too as far as eight can be."""
SIDE = 320
JPEG_QUALITY = 84
TOLERANCE = 0.3
"""Pixels of the thumbnail by which a simplified outline may differ from the mask's."""


def source_of(library: Library) -> Source:
    """Return what shows a library's exemplars."""

    def source(key: str) -> tuple[NDArray[Any], Mapping[str, NDArray[np.bool_]]] | None:
        try:
            return library.source(key) if library.keeps_sources else None
        except InputError:  # removed by another process since it was recalled
            return None

    return source


def colour(index: int) -> str:
    """Return the colour of the structure at ``index``."""
    return PALETTE[index % len(PALETTE)]


class Thumbnail:
    """An image made small, and outlines of masks on the same grid.

    Parameters
    ----------
    image : HxW or HxWx3 (RGB), any real dtype.
    intensity : the library's rule, so that a report shows what the networks saw.
    side : longest side in pixels.
    """

    def __init__(self, image: NDArray[Any], intensity: Intensity, side: int = SIDE) -> None:
        height, width = image.shape[:2]
        scale = min(1.0, side / max(height, width))
        self.width, self.height = max(1, round(width * scale)), max(1, round(height * scale))
        pixels: NDArray[Any] = (scale_intensities(image, intensity) * 255).astype(np.uint8)
        if (self.height, self.width) != (height, width):
            pixels = cv2.resize(pixels, (self.width, self.height), interpolation=cv2.INTER_AREA)
        if pixels.ndim == 3:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        self._data = base64.b64encode(data.tobytes()).decode()

    @property
    def view_box(self) -> str:
        """The ``viewBox`` of an SVG that shows it."""
        return f"0 0 {self.width} {self.height}"

    def element(self, identifier: str) -> str:
        """Return the SVG ``<image>``; draw it again elsewhere with ``<use href="#identifier">``."""
        return (
            f'<image id="{escape(identifier)}" width="{self.width}" height="{self.height}" '
            f'href="data:image/jpeg;base64,{self._data}"/>'
        )

    def path(self, mask: NDArray[np.bool_], kind: str, fill: str = "") -> str:
        """Return a mask's outline as an SVG path of class ``kind``; nothing for an empty mask."""
        data = outline(mask, self.width, self.height)
        style = f' style="--c:{fill}"' if fill else ""
        return f'<path class="{kind}" fill-rule="evenodd"{style} d="{data}"/>' if data else ""


def outline(mask: NDArray[np.bool_], width: int, height: int) -> str:
    """Return the outlines of a mask HxW with its holes as SVG path data on width x height."""
    scale_x, scale_y = width / mask.shape[1], height / mask.shape[0]
    enlarge = 2  # contours run through pixel centres: at twice the size that is nearly the edge
    large = mask.astype(np.uint8).repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array([scale_x, scale_y], np.float32) / enlarge
    parts: list[str] = []
    for contour in contours:
        points = (contour.reshape(-1, 2).astype(np.float32) + 0.5) * scale
        simple = cv2.approxPolyDP(points.reshape(-1, 1, 2), TOLERANCE, True).reshape(-1, 2)
        if len(simple) > 2:
            parts.append("M" + _joined(simple) + "Z")
    return "".join(parts)


def _joined(points: Sequence[Any] | NDArray[Any]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def legend(structures: Sequence[str], *, lines: bool = True) -> str:
    """Return HTML that says which colour and, with ``lines``, which line means what."""
    swatches = "".join(
        f'<span class="key"><i style="background:{colour(i)}"></i>{escape(name)}</span>'
        for i, name in enumerate(structures)
    )
    masks = (
        '<span class="gap"></span>'
        '<span class="key"><i class="line predicted"></i>predicted, in colour</span>'
        '<span class="key"><i class="line reference"></i>reference, white</span>'
    )
    return f'<div class="legend">{swatches}{masks if lines else ""}</div>'
