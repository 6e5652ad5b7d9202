"""Masks drawn as polygons: LabelMe's JSON beside an image, and COCO's for many images.

Coordinates are x to the right and y down in pixels, (0, 0) being the outer corner of the first
pixel, as in COCO; a pixel belongs to a polygon if its centre lies inside.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file
from recallseg.runtime.formats.guards import check_given
from recallseg.runtime.formats.headers import declared_size
from recallseg.runtime.formats.images import MAX_PIXELS
from recallseg.runtime.json_text import printable

__all__ = ["CocoFile", "fill", "is_coco", "is_labelme", "read_coco", "read_labelme"]

T = TypeVar("T")

MOST_BYTES = 2**30
MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class CocoFile:
    """A COCO file: what it says of each image, by the image's path as it is written there.

    ``structures`` are its categories in the order of their ids.
    """

    path: Path
    structures: tuple[str, ...]
    images: Mapping[str, tuple[int, int, tuple[tuple[str, Any], ...]]]  # height, width, drawn

    def masks(self, image: str) -> dict[str, NDArray[np.bool_]]:
        """Return boolean masks HxW of an image by structure; those of one structure are united.

        Raises
        ------
        InputError
            If the file does not list the image, or what is drawn on it is damaged.
        """
        if image not in self.images:
            raise InputError(f"{printable(self.path)} says nothing of {printable(image)}.")
        height, width, drawn = self.images[image]
        masks: dict[str, NDArray[np.bool_]] = {}
        for name, shape in drawn:
            what = f"{printable(self.path)}: {printable(image)}, '{name}'"
            mask = _segmentation(shape, height, width, what)
            masks[name] = masks[name] | mask if name in masks else mask
        return masks


def is_labelme(path: Path) -> bool:
    """Whether a JSON file is LabelMe's; False for what cannot be read."""
    found = _loaded(path)
    return isinstance(found, dict) and isinstance(found.get("shapes"), list)


def is_coco(path: Path) -> bool:
    """Whether a JSON file is COCO's; False for what cannot be read."""
    found = _loaded(path)
    return isinstance(found, dict) and {"images", "annotations", "categories"} <= found.keys()


def read_labelme(path: Path, height: int, width: int) -> dict[str, NDArray[np.bool_]]:
    """Return boolean masks HxW by label; shapes of one label are united.

    Polygons, rectangles, circles and masks are taken.

    Raises
    ------
    InputError
        If it is no LabelMe file, is of an image of another size, or has a shape of another kind.
    """
    found = _loaded(path)
    if not isinstance(found, dict) or not isinstance(found.get("shapes"), list):
        raise InputError(f"{printable(path)} is no LabelMe file: it has no list of shapes.")
    said = found.get("imageHeight"), found.get("imageWidth")
    if None not in said and said != (height, width):
        raise InputError(
            f"{printable(path)} was drawn on an image of {said[0]}x{said[1]} pixels, its image is "
            f"{height}x{width}. Both must be turned alike (--as-stored), or one was scaled."
        )
    masks: dict[str, NDArray[np.bool_]] = {}
    for number, shape in enumerate(found["shapes"]):
        what = f"{printable(path)}: shape {number}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise InputError(f"{what} has no label.")
        mask = _labelme_shape(shape, height, width, what)
        name = shape["label"]
        masks[name] = masks[name] | mask if name in masks else mask
    return masks


def read_coco(path: Path) -> CocoFile:
    """Read what a COCO file says of its images; shapes are drawn when they are asked for.

    Raises
    ------
    InputError
        If it is no COCO file, refers to what it does not list, gives an id twice, or lists an image
        twice.
    """
    found = _loaded(path)
    if not isinstance(found, dict):
        raise InputError(f"{printable(path)} is no COCO file.")
    try:
        names = _by_id(path, ((int(c["id"]), str(c["name"])) for c in found["categories"]))
        images = _by_id(
            path,
            (
                (int(i["id"]), (str(i["file_name"]), int(i["height"]), int(i["width"])))
                for i in found["images"]
            ),
        )
        drawn: dict[int, list[tuple[str, Any]]] = {number: [] for number in images}
        for each in found["annotations"]:
            drawn[int(each["image_id"])].append(
                (names[int(each["category_id"])], each.get("segmentation"))
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        kind = type(error).__name__
        raise InputError(f"{printable(path)} is no COCO file: {kind}: {error}.") from error
    by_file = {
        name: (height, width, tuple(drawn[number]))
        for number, (name, height, width) in images.items()
    }
    for name, (height, width, _) in by_file.items():
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            raise InputError(
                f"{printable(path)} says that {printable(name)} is of {height}x{width} pixels; at "
                f"most {MAX_PIXELS} are drawn on. It is damaged."
            )
    if len(by_file) < len(images):
        raise InputError(f"{printable(path)} lists an image twice. Remove one of them.")
    return CocoFile(path, tuple(names[number] for number in sorted(names)), by_file)


def _by_id(path: Path, entries: Iterable[tuple[int, T]]) -> dict[int, T]:
    """Return what each id means; InputError for one that means two things."""
    found: dict[int, T] = {}
    for number, value in entries:
        if found.setdefault(number, value) != value:
            raise InputError(
                printable(
                    f"{path} gives the id {number} to {found[number]} and to {value}, so whose a "
                    "shape is cannot be told. Export it again."
                )
            )
    return found


def fill(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Return the pixels HxW whose centres lie inside a closed polygon (even-odd rule).

    Parameters
    ----------
    points : Nx2, x and y in pixels from the image's outer corner.
    """
    changes = np.zeros((height, width + 1), np.uint8)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        low, high = (y0, y1) if y0 < y1 else (y1, y0)
        # Rows whose centre line is crossed, the upper end of an edge counted and not the lower.
        rows = np.arange(max(0, math.ceil(low - 0.5)), min(height, math.ceil(high - 0.5)))
        crossed = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(crossed - 0.5), 0, width).astype(np.intp)
        changes[rows, columns] ^= 1
    inside: NDArray[np.bool_] = np.bitwise_xor.accumulate(changes, axis=1)[:, :width].astype(bool)
    return inside


def _labelme_shape(
    shape: Mapping[str, Any], height: int, width: int, what: str
) -> NDArray[np.bool_]:
    kind = shape.get("shape_type", "polygon") or "polygon"
    points = _points(shape.get("points"), what)
    if kind == "polygon" and len(points) >= 3:
        return fill(points, height, width)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        return fill(corners, height, width)
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points[0], points[1]
        rows, columns = np.mgrid[:height, :width] + 0.5
        within: NDArray[np.bool_] = np.hypot(columns - x, rows - y) <= math.dist((x, y), edge)
        return within
    if kind == "mask" and len(points) == 2 and isinstance(shape.get("mask"), str):
        return _labelme_mask(shape["mask"], points, height, width, what)
    raise InputError(
        f"{what} is a {kind} of {len(points)} points; masks are made of polygons, rectangles, "
        "circles and masks. Remove it, or draw it as a polygon."
    )


def _labelme_mask(
    text: str, points: NDArray[np.float64], height: int, width: int, what: str
) -> NDArray[np.bool_]:
    x0, y0 = (round(float(v)) for v in points[0])
    try:
        data = base64.b64decode(text, validate=True)
        rows, columns = declared_size(data) or (0, 0)  # asked before memory is set aside
        if x0 < 0 or y0 < 0 or y0 + rows > height or x0 + columns > width:
            raise InputError(f"{what}: its mask of {rows}x{columns} pixels leaves the image.")
        raw = np.frombuffer(data, np.uint8)
        small = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED) if rows and columns else None
    except (binascii.Error, cv2.error) as error:
        raise InputError(f"{what}: its mask is damaged: {error}.") from error
    if small is None or small.shape != (rows, columns):
        raise InputError(f"{what}: its mask is damaged.")
    mask = np.zeros((height, width), bool)
    mask[y0 : y0 + rows, x0 : x0 + columns] = small > 0
    return mask


def _segmentation(shape: Any, height: int, width: int, what: str) -> NDArray[np.bool_]:
    """Draw COCO's three kinds: polygons, and run lengths as numbers or packed in text."""
    if isinstance(shape, list) and shape:
        mask = np.zeros((height, width), bool)
        for ring in shape:
            if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
                raise InputError(f"{what}: a polygon needs three points or more, x and y of each.")
            mask |= fill(
                _points([ring[i : i + 2] for i in range(0, len(ring), 2)], what), height, width
            )
        return mask
    if isinstance(shape, dict):
        counts, size = shape.get("counts"), shape.get("size")
        if size != [height, width]:
            raise InputError(
                f"{what}: its run lengths are of {size}, the image is {height}x{width}."
            )
        runs = _unpacked(counts, what) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(isinstance(n, int) and n >= 0 for n in runs):
            raise InputError(f"{what}: its run lengths are damaged.")
        if sum(runs) != height * width:
            raise InputError(
                f"{what}: its run lengths cover {sum(runs)} pixels of {height * width}."
            )
        values = np.arange(len(runs)) % 2 == 1
        down: NDArray[np.bool_] = np.repeat(values, runs).reshape(width, height).T  # of columns
        return down
    raise InputError(f"{what} has no segmentation, only a box. Draw its outline.")


def _unpacked(text: str, what: str) -> list[int]:
    """Unpack COCO's run lengths: five bits a character, differences to the last but one."""
    runs: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        while True:
            if position >= len(text) or shift > 60:
                raise InputError(f"{what}: its run lengths are damaged.")
            bits = ord(text[position]) - 48
            position += 1
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _points(values: Any, what: str) -> NDArray[np.float64]:
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: its points are damaged.") from error
    if points.ndim != 2 or points.shape[1:] != (2,) or len(points) > MOST_POINTS:
        raise InputError(f"{what}: its points are damaged: expected x and y of each.")
    if not np.isfinite(points).all():
        raise InputError(f"{what}: a point is infinite or no number.")
    return points


def _loaded(path: Path) -> Any:
    """Return a JSON file's value; None if it is none. The last few are kept as they were.

    Raises
    ------
    InputError
        If the machine does not give it: what it holds must not be passed over for that.
    """
    try:
        status = path.stat()
    except OSError as error:
        check_given(path, error)
        return None
    return _parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _parsed(path: Path, changed: int, size: int) -> Any:
    del changed  # only tells one state of the file from another
    if size > MOST_BYTES:
        return None
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        check_given(path, error)
        return None
