"""Images with label maps beside them: ``NAME.png`` with ``NAME.mask.png``.

What an annotation tool leaves in a folder, read one pair at a time for import and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.images import is_image, read_image, read_label_map

__all__ = ["Annotated", "Missing", "Pair", "PairFolder", "find_pairs", "parse_labels", "read_pair"]

Missing = Literal["absent", "unknown"]
MASK_SUFFIX = ".mask"
MAX_LABEL = 65535


@dataclass(frozen=True)
class Pair:
    """An image file and its label map. ``name`` is the path below the folder, without suffix."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class PairFolder:
    """Every pair of a folder, and the images that have no label map."""

    pairs: tuple[Pair, ...]
    unlabelled: tuple[Path, ...]


@dataclass(frozen=True)
class Annotated:
    """An image HxW or HxWx3, boolean masks HxW of what it shows, and what it is known not to show.

    A structure in neither ``masks`` nor ``absent`` was not looked for.
    """

    name: str
    image: NDArray[Any]
    masks: Mapping[str, NDArray[np.bool_]]
    absent: tuple[str, ...] = ()


def parse_labels(text: str) -> dict[int, str]:
    """Parse ``1=liver,2=spleen`` into structure by label value.

    Raises
    ------
    InputError
        On other syntax, a value outside 1..65535, or a value or structure given twice.
    """
    labels: dict[int, str] = {}
    for part in text.split(","):
        value, sign, name = part.partition("=")
        value, name = value.strip(), name.strip()
        if not sign or not (value.isascii() and value.isdecimal()) or not name:
            raise InputError(
                f"labels must read like 1=liver,2=spleen; got '{part.strip()}' in '{text}'."
            )
        number = int(value)
        if number == 0:
            raise InputError(f"label 0 is the background, it cannot be '{name}'.")
        if number > MAX_LABEL:
            raise InputError(f"label {number} is too large: masks hold values up to {MAX_LABEL}.")
        if number in labels:
            raise InputError(f"label {number} is given twice: '{labels[number]}' and '{name}'.")
        if name in labels.values():
            raise InputError(f"structure '{name}' is given twice in '{text}'.")
        labels[number] = check_name(name)
    return labels


def find_pairs(folder: str | Path) -> PairFolder:
    """Find all pairs in a folder and below, in the order of their names. Hidden ones are left out.

    Raises
    ------
    InputError
        If there is no such folder, no pair in it, a label map without image, or two images of one
        name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    images: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not is_image(path) or any(part.startswith(".") for part in relative.parts):
            continue
        name = relative.with_suffix("").as_posix()
        if name.endswith(MASK_SUFFIX):
            masks.setdefault(name[: -len(MASK_SUFFIX)], []).append(path)
        else:
            images.setdefault(name, []).append(path)
    for name, paths in [*images.items(), *masks.items()]:
        if len(paths) > 1:
            raise InputError(
                f"{' and '.join(path.name for path in paths)} in {paths[0].parent} have the same "
                f"name '{name}': which belongs to which cannot be told. Rename one."
            )
    orphans = sorted(masks[name][0] for name in masks if name not in images)
    if orphans:
        raise InputError(
            f"{orphans[0]} has no image beside it ({len(orphans)} such). Expected "
            f"'{orphans[0].name.replace(MASK_SUFFIX, '', 1)}' or another image format."
        )
    pairs = tuple(Pair(name, images[name][0], masks[name][0]) for name in images if name in masks)
    if not pairs:
        raise InputError(
            f"there are no pairs in {folder}: expected images like NAME.png with NAME.mask.png "
            f"(label map) beside them; found {len(images)} images and {len(masks)} label maps."
        )
    return PairFolder(pairs, tuple(images[name][0] for name in images if name not in masks))


def read_pair(pair: Pair, labels: Mapping[int, str], missing: Missing = "absent") -> Annotated:
    """Read an image and split its label map into structures.

    Parameters
    ----------
    labels : structure by label value; every value in the label map must be there.
    missing : what it means that a structure has no pixel: ``absent`` (the image does not show it),
        or ``unknown`` (nobody looked).

    Raises
    ------
    InputError
        If a file cannot be read, sizes differ, or a value is not among ``labels``.
    """
    image, label_map = read_image(pair.image), read_label_map(pair.mask)
    if image.shape[:2] != label_map.shape:
        raise InputError(
            f"{pair.mask} is {_size(label_map)} pixels, its image {pair.image.name} is "
            f"{_size(image)}. A label map must have the image's height and width."
        )
    values = [int(value) for value in np.unique(label_map) if value]
    unknown = [value for value in values if value not in labels]
    if unknown:
        raise InputError(
            f"{pair.mask} has label {_listed(unknown)}, which --labels does not name; known are "
            f"{', '.join(f'{value}={name}' for value, name in labels.items())}."
        )
    masks = {labels[value]: label_map == value for value in values}
    absent = tuple(name for name in labels.values() if name not in masks)
    return Annotated(pair.name, image, masks, absent if missing == "absent" else ())


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (
        f" and {len(values) - 5} more" if len(values) > 5 else ""
    )


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
