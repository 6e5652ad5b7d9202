"""Images with masks beside them: ``NAME.png`` with ``NAME.mask.png``, or what else tools leave.

Label maps, one file for each structure, colours by a legend, polygons of LabelMe and COCO: read one
pair at a time for import and evaluation.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_text
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.finding import (
    MASK_SUFFIX,
    Finding,
    PassedOver,
    check_given,
    find_in_folder,
)
from recallseg.runtime.formats.guards import check_given as check_file
from recallseg.runtime.formats.images import read_colours, read_image, read_label_map
from recallseg.runtime.formats.kinds import is_image
from recallseg.runtime.formats.polygons import is_coco, is_labelme, read_coco, read_labelme
from recallseg.runtime.formats.walking import mode_of
from recallseg.runtime.json_text import printable

__all__ = [
    "BACKGROUND",
    "Annotated",
    "Legend",
    "Missing",
    "Pair",
    "PairFolder",
    "find_pairs",
    "labelled",
    "needs_labels",
    "parse_labels",
    "parse_legend",
    "read_pair",
]

Missing = Literal["absent", "unknown"]
Legend = Mapping[tuple[int, int, int], str]
"""Structure by colour: red, green, blue, 0 to 255."""
BACKGROUND = "background"
"""In a legend, what is no structure."""
MAX_LABEL = 65535


@dataclass(frozen=True)
class Pair:
    """An image file and its masks.

    Attributes
    ----------
    name : the image's path below the folder, without suffix.
    image : its file.
    mask : a label map, a picture in colours, or a JSON file of LabelMe or COCO.
    parts : structures with a file of their own each, instead.
    entry : the image's name in a COCO file.
    """

    name: str
    image: Path
    mask: Path
    parts: tuple[tuple[str, Path], ...] = ()
    entry: str = ""


@dataclass(frozen=True)
class PairFolder:
    """Every pair of a folder, the images that have no mask, and what else was not taken."""

    pairs: tuple[Pair, ...]
    unlabelled: tuple[Path, ...]
    passed: tuple[PassedOver, ...] = ()


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


def parse_legend(text: str) -> dict[tuple[int, int, int], str]:
    """Parse ``#ff0000=liver,#00ff00=spleen``, or a file with one such line each.

    Returns
    -------
    dict
        Structure by colour (red, green, blue); ``background`` names colours that are none.

    Raises
    ------
    InputError
        On other syntax, or a colour given twice.
    """
    parts = text.split(",")
    if "=" not in text or stat.S_ISREG(mode_of(Path(text))):
        try:
            lines = read_text(Path(text)).splitlines()
        except (OSError, ValueError) as error:
            check_file(Path(text), error)
            raise InputError(
                "a legend must read like #ff0000=liver,#00ff00=spleen, or be a file of such "
                f"lines; got '{text}'."
            ) from error
        parts = [line for line in lines if line.strip()]
    legend: dict[tuple[int, int, int], str] = {}
    for part in parts:
        colour, _, name = part.strip().partition("=")
        found = re.fullmatch(r"#([0-9a-fA-F]{6})\s*", colour)
        if found is None or not name.strip():
            raise InputError(f"a legend must read like #ff0000=liver, got '{part.strip()}'.")
        value = int(found[1], 16)
        key = (value >> 16, value >> 8 & 255, value & 255)
        if key in legend:
            raise InputError(f"colour #{found[1]} is given twice in the legend.")
        legend[key] = check_name(name.strip())
    return legend


def find_pairs(
    folder: str | Path, masks: str | Path | None = None, *, found: Finding | None = None
) -> PairFolder:
    """Find all pairs in a folder and below, in the order of their names.

    Beside ``NAME.png``: a label map ``NAME.mask.png``, one file for each structure
    ``NAME.mask.STRUCTURE.png``, or LabelMe's ``NAME.json``; or a COCO file anywhere that lists it.

    Parameters
    ----------
    masks : a COCO file; or a folder with masks of the same names as the images, or a folder of
        those for each structure. None: they lie beside the images.
    found : what is in the folder, if somebody looked already.

    Raises
    ------
    InputError
        If there is no such folder, or no pair in it; the message says why each file is none.
    """
    folder = Path(folder)
    found = find_in_folder(folder) if found is None else found
    images: dict[str, list[Path]] = {}
    for item in found.items:
        if item.kind == "image":
            images.setdefault(item.relative.as_posix(), []).append(item.path)
    drawn = _Drawn(folder)
    for path in found.masks:
        if is_image(path):
            drawn.add_beside(path)
    passed = [each for each in found.passed if each.path not in drawn.taken]
    for each in found.passed:
        if each.path.suffix.lower() == ".json" and drawn.add_json(each.path, images):
            passed.remove(each)
    if masks is not None:
        drawn.add_elsewhere(Path(masks), images)
    pairs: list[Pair] = []
    unlabelled: list[Path] = []
    for name, files in images.items():
        candidates = drawn.by_image.pop(name, [])
        if len(files) > 1:
            these = " and ".join(file.name for file in files)
            why = f"{these} have the same name '{name}': which a label map belongs to is unclear"
            passed += [PassedOver(file, why) for file in files]
        elif len(candidates) > 1:
            these = " and ".join(pair.mask.name for pair in candidates)
            passed.append(PassedOver(files[0], f"it has several masks, {these}: keep one"))
        elif candidates:
            pairs.append(replace(candidates[0], image=files[0]))
        else:
            unlabelled.append(files[0])
    for left in drawn.by_image.values():
        passed += [
            PassedOver(pair.mask, "a label map that has no image beside it") for pair in left
        ]
    if not pairs:
        reasons = "".join(f"\n  {each}" for each in passed[:20])
        raise InputError(
            f"there are no pairs in {printable(folder)}: expected images like NAME.png with "
            f"NAME.mask.png (label map) beside them; found {len(images)} images and "
            f"{len(drawn.taken)} label maps.{reasons}"
        )
    return PairFolder(tuple(pairs), tuple(unlabelled), tuple(passed))


def read_pair(
    pair: Pair,
    labels: Mapping[int, str] | None,
    missing: Missing = "absent",
    *,
    legend: Legend | None = None,
    as_stored: bool = False,
) -> Annotated:
    """Read an image and what is drawn on it.

    Parameters
    ----------
    labels : structure by label value; every value in a label map must be there. Of a mask with 0
        and 255 alone, 255 counts as 1 if only that is named. Masks that carry names need none.
    missing : what it means that a structure has no pixel: ``absent`` (the image does not show it),
        or ``unknown`` (nobody looked).
    legend : structure by colour, for masks drawn in colours.
    as_stored : see :func:`read_image`.

    Raises
    ------
    InputError
        If a file cannot be read, sizes differ, or a value or colour has no name.
    """
    image = read_image(pair.image, as_stored=as_stored)
    known: tuple[str, ...]
    if pair.parts:
        masks = {name: read_label_map(path, as_stored=as_stored) for name, path in pair.parts}
        for (name, path), part in zip(pair.parts, masks.values(), strict=True):
            values = [int(value) for value in np.unique(part) if value]
            if len(values) > 1:
                raise InputError(
                    f"{path} has the values {_listed(values)}; a mask of one structure ('{name}') "
                    "has one value beside 0."
                )
        known = (*masks, *(labels or {}).values())
    elif pair.mask.suffix.lower() == ".json":
        size = (image.shape[0], image.shape[1])
        if is_coco(pair.mask):
            coco = read_coco(pair.mask)
            masks, known = coco.masks(pair.entry), coco.structures
        else:
            masks, known = read_labelme(pair.mask, *size), tuple((labels or {}).values())
    elif legend is not None:
        masks, known = _by_colour(pair.mask, legend, as_stored)
    else:
        masks, known = _by_label(pair.mask, labels, as_stored)
    for name, mask in masks.items():
        if mask.shape != image.shape[:2]:
            where = dict(pair.parts).get(name, pair.mask)
            raise InputError(
                f"{where} is {_size(mask)} pixels, its image {pair.image.name} is {_size(image)}. "
                "A label map must have the image's height and width."
            )
    shown = {check_name(name): mask != 0 for name, mask in masks.items() if mask.any()}
    absent = tuple(check_name(name) for name in dict.fromkeys(known) if name not in shown)
    return Annotated(pair.name, image, shown, absent if missing == "absent" else ())


def needs_labels(pairs: Sequence[Pair]) -> bool:
    """Whether any of the masks is a label map, whose values somebody must name."""
    return any(not pair.parts and pair.mask.suffix.lower() != ".json" for pair in pairs)


class _Drawn:
    """Masks by the name of the image that they belong to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.by_image: dict[str, list[Pair]] = {}
        self.taken: set[Path] = set()

    def add_beside(self, path: Path) -> None:
        """Add ``NAME.mask.png`` or ``NAME.mask.STRUCTURE.png``."""
        name = path.relative_to(self._folder).with_suffix("").as_posix()
        image, _, structure = name.rpartition(MASK_SUFFIX)
        self._add(image, path, structure.removeprefix("."))

    def add_json(self, path: Path, images: Mapping[str, Sequence[Path]]) -> bool:
        """Add LabelMe's or COCO's file; say whether it was one."""
        if is_labelme(path):
            name = path.relative_to(self._folder).with_suffix("").as_posix()
            if name not in images:
                return False
            self._add(name, path, "")
            return True
        if not is_coco(path):
            return False
        by_path = {file: name for name, files in images.items() for file in files}
        by_name: dict[str, list[str]] = {}
        for file, name in by_path.items():
            by_name.setdefault(file.name, []).append(name)
        for entry in read_coco(path).images:
            places = (path.parent / entry, self._folder / entry)
            names = [by_path[place] for place in places if place in by_path][:1]
            names = names or by_name.get(Path(entry).name, [])
            if len(names) == 1:
                pair = Pair(names[0], path, path, (), entry)
                self.by_image.setdefault(names[0], []).append(pair)
        self.taken.add(path)
        return True

    def add_elsewhere(self, masks: Path, images: Mapping[str, Sequence[Path]]) -> None:
        """Add a COCO file, or a folder of masks, that a person named."""
        if masks.is_file():
            if not self.add_json(masks, images):
                raise InputError(
                    f"{printable(masks)} is neither a COCO file nor a folder of masks."
                )
            return
        found = find_in_folder(masks)
        check_given(found, folders=True)
        files = [*(item.path for item in found.items), *found.masks]
        for path in sorted(file for file in files if is_image(file)):
            relative = path.relative_to(masks).with_suffix("").as_posix()
            relative = relative.removesuffix(MASK_SUFFIX)
            structure, _, below = relative.partition("/")
            if relative in images:
                self._add(relative, path, "")
            elif below in images:
                self._add(below, path, structure)
            else:
                self._add(relative, path, "")

    def _add(self, image: str, path: Path, structure: str) -> None:
        self.taken.add(path)
        pairs = self.by_image.setdefault(image, [])
        if structure and pairs and pairs[0].parts:
            pairs[0] = replace(pairs[0], parts=(*pairs[0].parts, (structure, path)))
        else:
            pairs.append(Pair(image, path, path, ((structure, path),) if structure else ()))


def labelled(
    path: Path, labels: Mapping[int, str], *, as_stored: bool = False
) -> NDArray[np.unsignedinteger[Any]]:
    """Read a label map HxW of which every value has a name; 0 and 255 alone become 0 and 1.

    Raises
    ------
    InputError
        As :func:`read_label_map`, or if a value is not among ``labels``.
    """
    label_map = read_label_map(path, as_stored=as_stored)
    values = [int(value) for value in np.unique(label_map) if value]
    if values == [np.iinfo(label_map.dtype).max] and list(labels) == [1]:
        label_map, values = (label_map > 0).astype(np.uint8), [1]
    unknown = [value for value in values if value not in labels]
    if unknown:
        lossy = " JPEG does not keep label maps: save them as PNG." if _is_jpeg(path) else ""
        raise InputError(
            f"{path} has label {_listed(unknown)}, which --labels does not name; known are "
            f"{', '.join(f'{value}={name}' for value, name in labels.items())}.{lossy}"
        )
    return label_map


def _by_label(
    path: Path, labels: Mapping[int, str] | None, as_stored: bool
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    if labels is None:
        raise InputError(f"{path} is a label map: say what its values mean, --labels 1=liver.")
    label_map = labelled(path, labels, as_stored=as_stored)
    present = set(np.unique(label_map).tolist())
    drawn = [value for value in labels if value in present] or list(labels)[:1]
    # One that is empty still says the size.
    return {labels[value]: label_map == value for value in drawn}, tuple(labels.values())


def _by_colour(
    path: Path, legend: Legend, as_stored: bool
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    colours = read_colours(path, as_stored=as_stored).astype(np.uint32)
    packed = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    named = {red << 16 | green << 8 | blue: name for (red, green, blue), name in legend.items()}
    named.setdefault(0, BACKGROUND)
    values, counts = np.unique(packed, return_counts=True)
    unknown = [(f"#{v:06x}", int(n)) for v, n in zip(values, counts, strict=True) if v not in named]
    if unknown:
        shown = ", ".join(f"{colour} ({n} pixels)" for colour, n in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        lossy = " JPEG does not keep colours: save masks as PNG." if _is_jpeg(path) else ""
        raise InputError(
            f"{path} has colours that the legend does not name: {shown}{more}. Name them, "
            f"'background' for those that are no structure.{lossy}"
        )
    known = tuple(name for name in named.values() if name != BACKGROUND)
    masks: dict[str, NDArray[Any]] = {name: np.zeros(packed.shape, bool) for name in known}
    for value in values:
        if (name := named[int(value)]) != BACKGROUND:
            masks[name] |= packed == value
    return masks, known


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (
        f" and {len(values) - 5} more" if len(values) > 5 else ""
    )


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
