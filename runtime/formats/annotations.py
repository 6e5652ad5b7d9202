"""Annotated images and volumes in a folder: what belongs to what, for import and evaluation."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import SEGMENTATIONS
from recallseg.runtime.formats.finding import (
    Finding,
    Item,
    PassedOver,
    check_given,
    find_in_folder,
    find_inputs,
)
from recallseg.runtime.formats.kinds import is_image
from recallseg.runtime.formats.pairs import Legend, Pair, find_pairs, needs_labels
from recallseg.runtime.formats.reading import volume_stem
from recallseg.runtime.formats.walking import mode_of
from recallseg.runtime.json_text import printable

__all__ = ["AnnotatedVolume", "Annotations", "find_annotations"]


PICTURE_MASKS = (".mask.png", ".mask.tif", ".mask.tiff", ".mask.bmp")


@dataclass(frozen=True)
class AnnotatedVolume:
    """A volume and the file of its segmentation."""

    item: Item
    segmentation: Path


@dataclass(frozen=True)
class Annotations:
    """What was found.

    Attributes
    ----------
    pairs, volumes : images and volumes with their masks.
    unclear : why it cannot be told which segmentation belongs to a volume, by the volume's name.
    unlabelled : images and volumes without any.
    passed : everything else that is not taken, with reasons.
    """

    pairs: tuple[Pair, ...]
    volumes: tuple[AnnotatedVolume, ...]
    unclear: Mapping[str, str] = field(default_factory=dict)
    unlabelled: tuple[Path, ...] = ()
    passed: tuple[PassedOver, ...] = ()

    @property
    def unseen(self) -> tuple[PassedOver, ...]:
        """Folders of those that the machine did not let be looked into: there may be more."""
        return tuple(each for each in self.passed if each.unseen)

    def check_whole(self) -> None:
        """Raise InputError unless all was seen: what is measured of a part is another number."""
        for each in self.unseen:
            raise InputError(f"{each}. See to the disk, or the permission, and try again.")

    def __len__(self) -> int:
        return len(self.pairs) + len(self.volumes) + len(self.unclear)

    def check_named(self, labels: Mapping[int, str] | None, legend: Legend | None) -> None:
        """Raise InputError if there are label maps, and nothing says what their values mean."""
        if labels is None and legend is None and needs_labels(self.pairs):
            raise InputError(
                "say what the values of the label maps mean: --labels 1=liver,2=spleen."
            )


def find_annotations(path: str | Path, mask: str | Path | None = None) -> Annotations:
    """Find annotated images and volumes.

    Parameters
    ----------
    path : a file, or a folder with what :func:`find_pairs` takes, NIfTI, NRRD and MetaImage volumes
        with ``NAME.mask.nii.gz``, ``NAME.seg.nrrd`` or the like beside them, and DICOM series with
        the segmentation that refers to them, or the only one in their folder.
    mask : the segmentation of one volume or image; or a folder of masks, or a COCO file.

    Raises
    ------
    InputError
        If there is nothing annotated, the message says what there is instead; or if there is a
        file that the machine did not let be looked at: it may be a mask of what was found.
    """
    path = Path(path)
    mask = None if mask is None else Path(mask)
    if not mode_of(path):
        raise InputError(f"there is no file or folder {printable(path)}.")
    if mask is not None and not mode_of(mask):
        raise InputError(f"there is no mask {printable(mask)}.")
    found = find_in_folder(path) if path.is_dir() else find_inputs([path])
    check_given(found)
    pictures = [item for item in found.items if item.kind == "image"]
    volumes = [item for item in found.items if item.kind != "image"]
    if mask is not None and mask.is_file() and mask.suffix.lower() != ".json":
        return _of_one(path, found, mask)
    if mask is not None and not pictures:
        kind = "folder of masks" if mask.is_dir() else "COCO file"
        raise InputError(
            printable(
                f"{mask} is a {kind}, which belong to pictures, and {path} has none. Of a volume, "
                "name its segmentation with --mask."
            )
        )
    if path.is_file() and pictures:
        return _beside_one(pictures[0], mask)
    with_masks: list[AnnotatedVolume] = []
    unclear: dict[str, str] = {}
    unlabelled: list[Path] = []
    taken: set[Path] = set()
    for item in volumes:
        candidates = _segmentations(item, found)
        taken.update(candidates)
        if len(candidates) == 1:
            with_masks.append(AnnotatedVolume(item, candidates[0]))
        elif candidates:
            these = ", ".join(sorted(file.name for file in candidates))
            unclear[str(item.relative)] = (
                f"{item.path} has several segmentations, {these}: say which with --mask."
            )
        else:
            unlabelled.append(item.path)
    pairs: tuple[Pair, ...] = ()
    passed = tuple(each for each in found.passed if each.path not in taken)
    if pictures and path.is_dir():
        try:
            drawn = find_pairs(path, mask, found=found)
        except InputError:
            if mask is not None or (not with_masks and not unclear):
                raise
            unlabelled += [item.path for item in pictures]
        else:
            pairs = drawn.pairs
            unlabelled += drawn.unlabelled
            passed = tuple(each for each in drawn.passed if each.path not in taken)
    if not pairs and not with_masks and not unclear:
        if unlabelled:
            raise InputError(
                f"there is no segmentation beside {printable(path)}. Name it with --mask: a DICOM "
                "SEG, a NIfTI label map or a .seg.nrrd."
            )
        reasons = "".join(f"\n  {each}" for each in passed[:20])
        raise InputError(
            f"there are no pairs in {printable(path)}, and no volume with a segmentation: found 0 "
            f"images and 0 label maps.{reasons}"
        )
    return Annotations(pairs, tuple(with_masks), unclear, tuple(unlabelled), passed)


def _of_one(path: Path, found: Finding, mask: Path) -> Annotations:
    """Take the mask that a person named for the one image or volume that there is."""
    items = [item for item in found.items if item.path != mask]
    if len(items) != 1:
        these = ", ".join(str(item.relative) for item in items[:5]) or "nothing"
        raise InputError(
            printable(f"--mask belongs to one image or volume; {path} holds {these}. Name one.")
        )
    passed = tuple(each for each in found.passed if each.path != mask)
    if items[0].kind == "image":
        pair = Pair(items[0].relative.as_posix(), items[0].path, mask)
        return Annotations((pair,), (), passed=passed)
    return Annotations((), (AnnotatedVolume(items[0], mask),), passed=passed)


def _beside_one(item: Item, mask: Path | None) -> Annotations:
    """Return the pair of one image file."""
    everything = find_pairs(item.path.parent, mask)
    pairs = tuple(pair for pair in everything.pairs if pair.image == item.path)
    if not pairs:
        raise InputError(f"there is no label map beside {printable(item.path)}.")
    return Annotations(pairs, ())


def _segmentations(item: Item, found: Finding) -> list[Path]:
    """Return the segmentations that may belong to a volume."""
    folder = item.path if item.path.is_dir() else item.path.parent
    whole = item.path.resolve() if item.path.is_dir() else item.path  # "." has no name
    named = [whole.with_name(volume_stem(whole) + suffix) for suffix in SEGMENTATIONS]
    if item.kind == "dicom" and len(item.files) == 1:  # a radiograph and its drawn mask
        named += [whole.with_name(volume_stem(whole) + suffix) for suffix in PICTURE_MASKS]
    by_name = [file for file in named if stat.S_ISREG(mode_of(file)) and file not in item.files]
    if by_name or item.kind != "dicom":
        return by_name
    refers = [file for file, series in found.drawn_on.items() if item.series in series]
    if refers:
        return refers
    alone = all(
        other.path == item.path or folder not in (other.path, other.path.parent)
        for other in found.items
        if other.kind == "dicom"
    )
    near = [file for file in found.masks if file.parent == folder and not is_image(file)]
    return [file for file in near if not found.drawn_on.get(file)] if alone else []
