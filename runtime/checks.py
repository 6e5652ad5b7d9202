"""Checks of what callers hand in: images, masks, names, tags, keys, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.archives import MOST_ARRAYS
from recallseg.engines.errors import InputError
from recallseg.engines.pixels.interface import check_shape, shape_text
from recallseg.runtime.arrays import as_array

__all__ = [
    "check_annotation",
    "check_count",
    "check_image",
    "check_key",
    "check_mask",
    "check_name",
    "check_number",
    "check_origin",
    "check_tags",
    "not_finite",
]

MAX_NAME = 64
MAX_KEY = 256
MAX_ORIGIN = 4096
MOST_MASKS = MOST_ARRAYS - 2
"""Of one exemplar: its file, which is read again, has the image and their names beside them."""


def check_image(image: Any) -> NDArray[Any]:
    """Return ``image`` as a C-contiguous array of native byte order, HxW (grey) or HxWx3 (RGB).

    Any integer or floating dtype is taken. HxWx1 and HxWx4 are refused rather than guessed at.

    Parameters
    ----------
    image : whatever :func:`recallseg.runtime.arrays.as_array` takes.

    Raises
    ------
    InputError
        If it is no such array, has another dtype or shape, is empty, or has NaN or infinite pixels.
    """
    image = as_array(image, "an image")
    if not (np.issubdtype(image.dtype, np.integer) or np.issubdtype(image.dtype, np.floating)):
        raise InputError(
            f"an image must have an integer or floating dtype, got {image.dtype}. Convert it, for "
            "example with image.astype(numpy.float32)."
        )
    check_shape(image.shape)
    if np.issubdtype(image.dtype, np.floating):
        wrong = image.size - int(np.count_nonzero(np.isfinite(image)))
        if wrong:
            raise not_finite(wrong, image.size)
    return np.ascontiguousarray(image, image.dtype.newbyteorder("="))


def not_finite(wrong: int, pixels: int) -> InputError:
    """Return the error for an image so many pixels of which are NaN or infinite."""
    return InputError(
        f"the image has {wrong} NaN or infinite pixels of {pixels}. Replace them, for example with "
        "numpy.nan_to_num(image)."
    )


def check_mask(
    mask: Any, shape: tuple[int, ...], name: str = "mask", *, allow_empty: bool = False
) -> NDArray[np.bool_]:
    """Return ``mask`` as a boolean array of the image's height and width.

    Boolean masks are taken, and integer ones whose values are 0 and 1, or 0 and 255.

    Parameters
    ----------
    mask : HxW; whatever :func:`recallseg.runtime.arrays.as_array` takes.
    shape : shape of the image it belongs to; the first two axes count.
    name : structure, for the message.
    allow_empty : take a mask without any pixel set.

    Raises
    ------
    InputError
        If it is no such array, has another size, other values, or no pixel set.
    """
    mask = as_array(mask, f"the mask of '{name}'")
    if mask.shape != tuple(shape[:2]):
        raise InputError(
            f"the mask of '{name}' has shape {shape_text(mask.shape)}, the image is "
            f"{shape[0]}x{shape[1]} (height x width). Draw it on the image's own grid, or resample "
            "it."
        )
    if mask.dtype != np.bool_:
        if not np.issubdtype(mask.dtype, np.integer):
            raise InputError(
                f"the mask of '{name}' must be boolean, or integer with values 0 and 1, got "
                f"{mask.dtype}. Threshold it, for example with mask > 0.5."
            )
        highest = int(mask.max(initial=0))
        if highest not in (0, 1, 255) or not ((mask == 0) | (mask == highest)).all():
            values = np.unique(mask)
            raise InputError(
                f"the mask of '{name}' has the values {_some(values.tolist())}; expected 0 and 1, "
                "or 0 and 255. Of a label map, pass one structure at a time: label_map == value."
            )
    result = np.ascontiguousarray(mask, np.bool_)
    if not allow_empty and not result.any():
        raise InputError(
            f"the mask of '{name}' is empty. If the image does not show this structure, leave the "
            f"mask out and pass absent=('{name}',)."
        )
    return result


def check_annotation(
    masks: Mapping[str, Any], absent: Iterable[str], shape: tuple[int, ...]
) -> tuple[dict[str, NDArray[np.bool_]], tuple[str, ...]]:
    """Return boolean masks by structure, and the distinct structures said to be absent.

    Raises
    ------
    InputError
        For an unusable name or mask, a structure that is in both, or nothing in either.
    """
    if not isinstance(masks, Mapping):
        raise InputError(f"masks must map structures to arrays, got {type(masks).__name__}.")
    if isinstance(absent, str):
        raise InputError(
            f"absent must be a list of names, got the string '{absent}': pass ('{absent}',)."
        )
    if len(masks) > MOST_MASKS:
        raise InputError(
            f"an exemplar may have at most {MOST_MASKS} masks, got {len(masks)}. Are they objects "
            "of one structure? Then one mask holds all of them."
        )
    missing = tuple(dict.fromkeys(check_name(name) for name in absent))
    checked = {check_name(name): check_mask(mask, shape, name) for name, mask in masks.items()}
    both = [name for name in missing if name in checked]
    if both:
        raise InputError(
            f"'{both[0]}' has a mask and is said to be absent; it can only be one of them."
        )
    if not checked and not missing:
        raise InputError(
            "an exemplar needs a mask of at least one structure, or one that is absent."
        )
    return checked, missing


def check_name(name: Any, what: str = "structure") -> str:
    """Return a structure's (or tag's) name.

    Raises
    ------
    InputError
        If it is not text of 1 to 64 printable characters without slashes, leading dot and
        surrounding space: names appear in file names, command lines and reports.
    """
    if not isinstance(name, str):
        raise InputError(f"a {what} name must be text, got {name!r} ({type(name).__name__}).")
    if not name or len(name) > MAX_NAME:
        raise InputError(
            f"a {what} name must have 1 to {MAX_NAME} characters, got {len(name)}: {name[:80]!r}."
        )
    if (
        not name.isprintable()
        or any(c in name for c in "/\\")
        or name[0] == "."
        or name != name.strip()
    ):
        raise InputError(
            f"{name!r} cannot name a {what}: use printable characters, no '/' or '\\', no leading "
            "dot, no space at either end."
        )
    return name


def check_key(key: Any) -> str:
    """Return an exemplar's key: 1 to 256 printable characters; raises InputError otherwise."""
    if not isinstance(key, str) or not key or len(key) > MAX_KEY or not key.isprintable():
        raise InputError(
            f"an exemplar's key must be text of 1 to {MAX_KEY} printable characters, got "
            f"{str(key)[:80]!r} ({type(key).__name__})."
        )
    return key


def check_origin(name: Any) -> str:
    """Return where an exemplar came from, empty for None; what is not printable is escaped.

    Raises
    ------
    InputError
        If it is no text, or has more than 4096 characters.
    """
    if name is None:
        return ""
    if not isinstance(name, str) or len(name) > MAX_ORIGIN:
        raise InputError(
            f"an exemplar's name must be text of at most {MAX_ORIGIN} characters, got "
            f"{str(name)[:80]!r} ({type(name).__name__})."
        )
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def check_count(value: Any, what: str, least: int, most: int | None = None) -> int:
    """Return a whole number within limits.

    Raises
    ------
    InputError
        If it is not one (a truth value, text or 4.0 are not), or lies outside.
    """
    span = f"from {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(
            f"{what} must be a whole number {span}, got {value!r} ({type(value).__name__})."
        )
    if value < least or (most is not None and value > most):
        raise InputError(f"{what} must be a whole number {span}, got {value}.")
    return int(value)


def check_number(value: Any, what: str, least: float, unit: str = "") -> float:
    """Return a number of at least ``least``; infinite is one.

    Raises
    ------
    InputError
        If it is not one (a truth value, text or NaN are not), or is less.
    """
    kinds = (int, float, np.integer, np.floating)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kinds) or not value >= least:
        kind = "" if isinstance(value, kinds) else f" ({type(value).__name__})"
        raise InputError(
            f"{what} must be a number of at least {least:g}{unit}, got {value!r}{kind}."
        )
    return float(value)


def check_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    """Return tags sorted by name; raises InputError unless they map names to printable text."""
    if tags is not None and not isinstance(tags, Mapping):
        raise InputError(f"tags must map names to text, got {type(tags).__name__}.")
    checked = {}
    for name, value in (tags or {}).items():
        if (
            not isinstance(value, str)
            or not value
            or len(value) > MAX_KEY
            or not value.isprintable()
        ):
            raise InputError(
                f"tag {name!r} must have a value of 1 to {MAX_KEY} printable characters, got "
                f"{value!r}."
            )
        checked[check_name(name, "tag")] = value
    return dict(sorted(checked.items()))


def _some(values: Iterable[Any]) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:6]) + (", ..." if len(values) > 6 else "")
