"""Volumes with segmentations beside them, and the slices of them that become exemplars.

A segmentation is a DICOM SEG drawn on the series, a label map (NIfTI, MetaImage), or 3D Slicer's
``.seg.nrrd``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import MAX_NAME
from recallseg.runtime.formats.dicom_seg_reading import is_segmentation, read_segmentation
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.formats.kinds import suffixes
from recallseg.runtime.formats.lattice import check_overlap, resample
from recallseg.runtime.formats.nifti import read_nifti
from recallseg.runtime.formats.nrrd import read_seg_nrrd
from recallseg.runtime.formats.pairs import Annotated, Missing, labelled
from recallseg.runtime.formats.reading import read_item, read_volume, volume_format
from recallseg.runtime.formats.rtstruct import is_structure_set, read_structure_set
from recallseg.runtime.formats.volume import Slicing, Volume

__all__ = [
    "SliceChoice",
    "VolumeReader",
    "annotated_slices",
    "farthest_first",
    "read_annotated_volume",
    "structure_name",
    "volume_reader",
]

SEGMENTATIONS = (*(f".mask{each}" for each in suffixes(labels=True)), ".seg.nrrd", ".seg.dcm")
"""In which names of what was drawn on a volume end, behind the volume's own name."""
SEGMENTS = ("union", "by-number")
Embed = Callable[[NDArray[Any]], NDArray[np.float32]]


@dataclass(frozen=True)
class SliceChoice:
    """Which slices of a volume to take.

    Attributes
    ----------
    rule : ``all``, ``every`` (every n-th), or ``different``: n slices, each as far as can be from
        what the library holds and from those taken before (farthest point first, by embedding).
    n : for the other two.
    empty : whether slices that show no structure are among those to choose from.
    """

    rule: Literal["all", "every", "different"] = "all"
    n: int = 1
    empty: bool = False

    @classmethod
    def parse(cls, text: str, *, empty: bool = False) -> SliceChoice:
        """Parse ``all``, ``every:5`` or ``different:16``; raises InputError otherwise."""
        rule, _, number = text.partition(":")
        if rule == "all" and not number:
            return cls(empty=empty)
        if (
            rule in ("every", "different")
            and number.isascii()
            and number.isdecimal()
            and int(number)
        ):
            return cls("every" if rule == "every" else "different", int(number), empty)
        raise InputError(f"slices must read all, every:5 or different:16, got '{text}'.")


VolumeReader = Callable[
    [Item, Path, Optional[Mapping[int, str]]], tuple[Volume, dict[str, NDArray[np.bool_]]]
]
"""As :func:`read_annotated_volume`, options bound."""


def volume_reader(
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    resample: bool = False,
    segments: str = "union",
) -> VolumeReader:
    """Return what reads annotated volumes.

    Parameters
    ----------
    voi, time, stack : see :func:`recallseg.runtime.formats.reading.read_volume`.
    resample : take masks on another lattice too, each voxel from the nearest.
    segments : of those with one name: ``union``, or ``by-number`` to keep them apart.

    Raises
    ------
    InputError
        For other ``segments``.
    """
    if segments not in SEGMENTS:
        raise InputError(f"segments must be one of {', '.join(SEGMENTS)}, got '{segments}'.")
    return partial(
        read_annotated_volume,
        voi=voi,
        time=time,
        stack=stack,
        resampled=resample,
        by_number=segments == "by-number",
    )


def read_annotated_volume(
    image: Path | Item,
    segmentation: Path,
    labels: Mapping[int, str] | None,
    *,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    resampled: bool = False,
    by_number: bool = False,
) -> tuple[Volume, dict[str, NDArray[np.bool_]]]:
    """Read a volume and the masks that were drawn on it.

    Positions decide where masks belong, of every format. A mask on the image's own lattice, however
    its axes run and whatever part of the image it covers, comes voxel for voxel.

    Parameters
    ----------
    image : a file, a folder with one series, or what the finder found.
    labels : structure by label value, for label maps; segments that carry names need none.
    voi, time, stack : see :func:`recallseg.runtime.formats.reading.read_volume`.
    resampled : take masks on another lattice too, each voxel from the nearest; the volume's tags
        and notes then say so.
    by_number : of segments with one name, make structures of their own (``Lesion 1``); else they
        are united.

    Returns
    -------
    volume : its ``notes`` say what had to be decided for the masks too.
    masks : boolean IxJxK on the volume's grid, by structure; they may overlap.

    Raises
    ------
    InputError
        If either cannot be read, or they are on different lattices.
    """
    if isinstance(image, Path):
        path, volume = image, read_volume(image, voi=voi, time=time, stack=stack)
    else:
        path, volume = image.path, read_item(image, voi=voi, time=time, stack=stack)
    if segmentation.is_file() and is_segmentation(segmentation):
        drawn = read_segmentation(segmentation, volume, resampled=resampled)
        named, notes = _named(segmentation, drawn.labels, by_number)
        masks = _united(named, drawn.masks)
        return _with_notes(volume, (*drawn.notes, *notes), drawn.resampled), masks
    if segmentation.is_file() and is_structure_set(segmentation):
        names, outlined = read_structure_set(segmentation, volume)
        named, notes = _named(segmentation, names, by_number)
        masks = _united(named, outlined)
        return _with_notes(volume, notes, False), masks
    kind = volume_format(segmentation)
    if kind == "image":
        return volume, _drawn_on_picture(path, volume, segmentation, labels)
    if segmentation.name.lower().endswith(".seg.nrrd"):
        grid, segments = read_seg_nrrd(segmentation)
        named, notes = _named(segmentation, {n: s[0] for n, s in enumerate(segments, 1)}, by_number)
        masks = _united(named, {n: s[1] for n, s in enumerate(segments, 1)})
    elif kind in (None, "dicom"):
        raise InputError(
            f"{segmentation} is no segmentation of a volume: SEG, RTSTRUCT, .seg.nrrd, or a label "
            f"map of {', '.join(suffixes(labels=True))}."
        )
    elif labels is None:
        raise InputError(f"{segmentation} is a label map: say what its values mean with --labels.")
    else:
        nifti = kind == "nifti"
        grid = read_nifti(segmentation, anywhere=True) if nifti else read_volume(segmentation)
        masks, notes = _labelled(segmentation, grid, labels), ()
    placed, more, other_grid = _placed(path, volume, segmentation, grid, masks, resampled)
    return _with_notes(volume, (*notes, *more), other_grid), placed


def _drawn_on_picture(
    path: Path, volume: Volume, segmentation: Path, labels: Mapping[int, str] | None
) -> dict[str, NDArray[np.bool_]]:
    """Split a picture's label map, of the one image that a DICOM file holds, into structures."""
    if labels is None:
        raise InputError(f"{segmentation} is a label map: say what its values mean with --labels.")
    values = labelled(segmentation, labels)
    if volume.frame != "image" or volume.shape[0] != 1 or values.shape != volume.shape[1:]:
        raise InputError(
            f"{segmentation} is a picture of {values.shape[0]}x{values.shape[1]} pixels, {path} is "
            f"{volume.shape}: it can only be the mask of one image of its own size."
        )
    return {name: (values == value)[None] for value, name in labels.items()}


def annotated_slices(
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    name: str,
    choice: SliceChoice,
    *,
    plane: str | None = None,
    missing: Missing = "absent",
    embed: Embed | None = None,
    known: NDArray[np.float32] | None = None,
) -> list[Annotated]:
    """Return the chosen slices, upright, in the order of their index.

    Parameters
    ----------
    name : of the volume; a slice is called ``NAME-axial-0012``.
    plane : see :meth:`Slicing.of`.
    missing : whether a structure that a slice does not show is known to be absent.
    embed, known : for ``different``: embeds an image to D, and NxD of what the library holds.

    Raises
    ------
    InputError
        If no slice is left.
    """
    slicing = Slicing.of(volume, plane)
    shown = np.zeros(slicing.count(volume), bool)
    for mask in masks.values():
        shown |= np.moveaxis(mask, slicing.axis, 0).any(axis=(1, 2))
    candidates = [int(i) for i in (range(len(shown)) if choice.empty else np.flatnonzero(shown))]
    if not candidates:
        raise InputError(f"no slice of {name} shows {' or '.join(masks)}.")
    if choice.rule == "every":
        candidates = candidates[:: choice.n]
    elif choice.rule == "different" and embed is not None:
        pictures = [np.ascontiguousarray(slicing.view(volume.array, i)) for i in candidates]
        taken = farthest_first(np.stack([embed(p) for p in pictures]), known, choice.n)
        candidates = [candidates[i] for i in sorted(taken)]

    def cut(index: int) -> Annotated:
        planes = {key: slicing.view(mask, index) for key, mask in masks.items()}
        here = {key: np.ascontiguousarray(mask) for key, mask in planes.items() if mask.any()}
        absent = tuple(key for key in masks if key not in here) if missing == "absent" else ()
        image = np.ascontiguousarray(slicing.view(volume.array, index))
        return Annotated(f"{name}-{slicing.plane}-{index:04d}", image, here, absent)

    return [cut(index) for index in candidates]


def farthest_first(
    embeddings: NDArray[np.float32], known: NDArray[np.float32] | None, count: int
) -> list[int]:
    """Return indices of embeddings, each the farthest from everything known and taken before.

    Parameters
    ----------
    embeddings, known : N x D and M x D of unit length; where nothing is known, the most typical one
        comes first.
    """
    if known is not None and len(known):
        distance = 1 - (embeddings @ known.T).max(axis=1)
    else:
        distance = (embeddings @ embeddings.mean(axis=0)).astype(np.float32)
    taken: list[int] = []
    for _ in range(min(count, len(embeddings))):
        best = int(np.argmax(distance))
        if not taken and (known is None or not len(known)):
            distance = np.full(len(embeddings), np.inf, np.float32)
        taken.append(best)
        distance = np.minimum(distance, 1 - embeddings @ embeddings[best])
        distance[taken] = -1.0
    return taken


def _labelled(
    segmentation: Path, grid: Volume, labels: Mapping[int, str]
) -> dict[str, NDArray[np.bool_]]:
    """Split a label map into structures."""
    if grid.array.ndim != 3:
        raise InputError(
            f"{segmentation} is no label map: it has colours. Save it as one of numbers."
        )
    if not (np.rint(grid.array) == grid.array).all():
        raise InputError(f"{segmentation} is no label map: its values are not whole numbers.")
    known = {0, *labels}
    unknown = [value for value in np.unique(grid.array).tolist() if value not in known]
    if unknown:
        raise InputError(
            f"{segmentation} has label {unknown[0]:.0f}, which --labels does not name. Name it, or "
            "remove it from the file."
        )
    return {name: grid.array == value for value, name in labels.items()}


def _placed(
    path: Path,
    volume: Volume,
    segmentation: Path,
    grid: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    resampled: bool,
) -> tuple[dict[str, NDArray[np.bool_]], tuple[str, ...], bool]:
    """Put masks on the volume's grid; return them, what is to be said, and whether resampled."""
    if volume.frame == "image" or grid.frame == "image":
        if volume.frame == grid.frame and volume.shape == grid.shape:
            return dict(masks), (), False
        missing = path if volume.frame == "image" else segmentation
        raise InputError(
            f"{missing} does not say how the patient lay, so a mask cannot be laid on the image. "
            "Save both with their orientation."
        )
    onto = volume.lattice
    try:
        placement = grid.lattice.relate(onto)
    except InputError as error:
        if not resampled:
            raise InputError(
                f"{segmentation} and {path} are on different grids: {error}. Give --resample to "
                "take each voxel from the nearest, or resample the segmentation first."
            ) from error
        moved = {name: resample(mask, grid.lattice, onto) for name, mask in masks.items()}
        notes = check_overlap(segmentation, path, masks, moved, 0)
        said = f"{segmentation.name} was resampled to the image by the nearest neighbour: {error}"
        return moved, (said, *notes), True
    moved, outside = {}, 0
    for name, mask in masks.items():
        moved[name] = np.zeros(onto.shape, bool)
        outside += placement.put(mask, moved[name])
    return moved, check_overlap(segmentation, path, masks, moved, outside), False


def _named(
    segmentation: Path, labels: Mapping[int, str], by_number: bool
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Return the segments' numbers by structure, and which names had to be changed."""
    notes = []
    named: dict[str, list[int]] = {}
    written: dict[str, str] = {}
    for number, label in labels.items():
        name = structure_name(label) or f"segment {number}"
        several = list(labels.values()).count(label) > 1
        if by_number and several:
            name = f"{name[: MAX_NAME - 6]} {number}"
        if written.setdefault(name, label) != label:  # two labels that differ in what was changed
            name = f"{name[: MAX_NAME - 6]} {number}"
            written[name] = label
        if name != label and not (by_number and several):
            notes.append(f"{segmentation.name}: segment {number} '{label}' is called '{name}'")
        named.setdefault(name, []).append(number)
    for name, numbers in named.items():
        if len(numbers) > 1:
            notes.append(
                f"{segmentation.name}: segments {', '.join(map(str, numbers))} are one structure, "
                f"'{name}' (--segments by-number keeps them apart)"
            )
    return named, tuple(notes)


def structure_name(label: str) -> str:
    """Return a name that :func:`recallseg.runtime.checks.check_name` takes; empty if none is left.

    ``GTV/primary`` becomes ``GTV-primary``.
    """
    text = unicodedata.normalize("NFC", label)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text.replace("/", "-").replace("\\", "-")
    return " ".join(text.split()).lstrip(".").strip()[:MAX_NAME].strip()


def _united(
    named: Mapping[str, list[int]], masks: Mapping[int, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """Return the masks by structure; those of several segments are united."""
    united = {}
    for name, numbers in named.items():
        first, *others = (masks[number] for number in numbers)
        united[name] = np.logical_or.reduce([first, *others]) if others else first
    return united


def _with_notes(volume: Volume, notes: tuple[str, ...], resampled: bool) -> Volume:
    tags = {**volume.tags, "mask": "resampled"} if resampled else volume.tags
    return replace(volume, notes=(*volume.notes, *notes), tags=tags)
