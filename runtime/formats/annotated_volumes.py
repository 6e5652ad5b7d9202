"""Volumes with segmentations beside them, and the slices of them that become exemplars.

A segmentation is a DICOM SEG drawn on the series, a NIfTI label map, or 3D Slicer's ``.seg.nrrd``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom_seg import is_segmentation, read_segmentation
from recallseg.runtime.formats.nifti import read_nifti
from recallseg.runtime.formats.nrrd import read_nrrd, read_seg_nrrd
from recallseg.runtime.formats.pairs import Annotated, Missing
from recallseg.runtime.formats.reading import read_volume, volume_format, volume_stem
from recallseg.runtime.formats.volume import Slicing, Volume

__all__ = ["SliceChoice", "annotated_slices", "find_segmentation", "read_annotated_volume"]

SEGMENTATIONS = (".mask.nii.gz", ".mask.nii", ".seg.nrrd", ".seg.dcm", ".mask.nrrd")
SAME_PLACE = 0.01
"""Largest distance between the corners of two grids that count as one, in voxels."""

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


def find_segmentation(path: Path) -> Path | None:
    """Return the segmentation beside a volume, ``NAME.mask.nii.gz`` or the like, or None."""
    for suffix in SEGMENTATIONS:
        candidate = path.with_name(volume_stem(path) + suffix)
        if candidate.is_file() and candidate != path:
            return candidate
    return None


def read_annotated_volume(
    path: Path, segmentation: Path, labels: Mapping[int, str] | None, *, voi: bool = False
) -> tuple[Volume, dict[str, NDArray[np.bool_]]]:
    """Read a volume and the masks that were drawn on it.

    Parameters
    ----------
    labels : structure by label value, for label maps; segments that carry names need none.

    Returns
    -------
    volume, masks : boolean IxJxK on the volume's grid, by structure.

    Raises
    ------
    InputError
        If either cannot be read, or they are on different grids.
    """
    volume = read_volume(path, voi=voi)
    if segmentation.is_file() and is_segmentation(segmentation):
        if volume_format(path) != "dicom":
            raise InputError(f"{segmentation} is a DICOM SEG: give the DICOM series it refers to.")
        return volume, read_segmentation(segmentation, volume)
    if segmentation.name.lower().endswith(".seg.nrrd"):
        grid, masks = read_seg_nrrd(segmentation)
        _check_grid(path, volume, segmentation, grid)
        return volume, masks
    if labels is None:
        raise InputError(f"{segmentation} is a label map: say what its values mean with --labels.")
    kind = volume_format(segmentation)
    if kind not in ("nifti", "nrrd"):
        raise InputError(f"{segmentation} is no segmentation of a volume: SEG, NIfTI or NRRD.")
    grid = read_nifti(segmentation) if kind == "nifti" else read_nrrd(segmentation)
    _check_grid(path, volume, segmentation, grid)
    if grid.array.ndim != 3 or not (np.rint(grid.array) == grid.array).all():
        raise InputError(f"{segmentation} is no label map: its values are not whole numbers.")
    known = {0, *labels}
    unknown = sorted(set(np.unique(grid.array).astype(int).tolist()) - known)
    if unknown:
        raise InputError(
            f"{segmentation} has label {unknown[0]}, which --labels does not name. Name it, or "
            "remove it from the file."
        )
    return volume, {name: grid.array == value for value, name in labels.items()}


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
        candidates = _farthest(candidates, np.stack([embed(p) for p in pictures]), known, choice.n)

    def cut(index: int) -> Annotated:
        planes = {key: slicing.view(mask, index) for key, mask in masks.items()}
        here = {key: np.ascontiguousarray(mask) for key, mask in planes.items() if mask.any()}
        absent = tuple(key for key in masks if key not in here) if missing == "absent" else ()
        image = np.ascontiguousarray(slicing.view(volume.array, index))
        return Annotated(f"{name}-{slicing.plane}-{index:04d}", image, here, absent)

    return [cut(index) for index in candidates]


def _farthest(
    candidates: list[int],
    embeddings: NDArray[np.float32],
    known: NDArray[np.float32] | None,
    count: int,
) -> list[int]:
    """Take the candidate farthest from everything taken or known, again and again."""
    if known is not None and len(known):
        distance = 1 - (embeddings @ known.T).max(axis=1)
    else:  # an empty library: begin with the most typical slice
        distance = (embeddings @ embeddings.mean(axis=0)).astype(np.float32)
    taken: list[int] = []
    for _ in range(min(count, len(candidates))):
        best = int(np.argmax(distance))
        if not taken and (known is None or not len(known)):
            distance = np.full(len(candidates), np.inf, np.float32)
        taken.append(best)
        distance = np.minimum(distance, 1 - embeddings @ embeddings[best])
        distance[taken] = -1.0
    return sorted(candidates[i] for i in taken)


def _check_grid(path: Path, volume: Volume, segmentation: Path, grid: Volume) -> None:
    if grid.shape != volume.shape:
        raise InputError(
            f"{segmentation} is {grid.shape}, {path} is {volume.shape}: they are on different "
            "grids. Resample the segmentation to the image first."
        )
    if volume.frame == "image" or grid.frame == "image":
        raise InputError(f"{path} or {segmentation} does not say how the patient lay.")
    corners = np.vstack(
        [np.diag(volume.shape), np.zeros((1, 3))]
    ).T  # four of the eight, as columns
    apart = (volume.affine_in("RAS") - grid.affine_in("RAS")) @ np.vstack([corners, np.ones(4)])
    off = float(np.linalg.norm(apart[:3], axis=0).max())
    if off > SAME_PLACE * min(volume.spacing):
        raise InputError(
            f"{segmentation} lies {off:.2f} mm away from {path}: they are on different grids. "
            "Resample the segmentation to the image first."
        )
