"""DICOM Segmentation objects (SEG, PS3.3 A.51) of every maker, read onto an image's grid.

Each frame is put where its own position and orientation say. References to source images are
optional where there is a frame of reference, and decide nothing there; so do the order of frames,
and whether spatial locations are said to be preserved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import DicomSource
from recallseg.runtime.formats.dicom_files import (
    SEGMENTATIONS,
    damaged_is_input_error,
    is_dicom,
    names_by_number,
    open_dicom,
)
from recallseg.runtime.formats.dicom_grid import place
from recallseg.runtime.formats.dicom_pixels import check_length, check_pixels, stored_frames
from recallseg.runtime.formats.dicom_planes import Plane, item, planes_of
from recallseg.runtime.formats.guards import check_size
from recallseg.runtime.formats.lattice import SAME_PLACE, Lattice, check_overlap, resample
from recallseg.runtime.formats.volume import Volume

__all__ = ["Drawn", "is_segmentation", "read_segmentation"]

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
READ = ("1.2.840.10008.5.1.4.1.1.66.4", LABEL_MAP)
HALF = 0.5
"""Of the declared maximum: a voxel of a FRACTIONAL segmentation counts from here on."""


@dataclass(frozen=True)
class Drawn:
    """What a SEG has drawn, on an image's grid.

    Attributes
    ----------
    labels : segment label by segment number; labels may repeat.
    masks : boolean IxJxK by segment number; they may overlap.
    notes : what had to be decided.
    resampled : whether the image is on another lattice.
    """

    labels: Mapping[int, str]
    masks: Mapping[int, NDArray[np.bool_]]
    notes: tuple[str, ...]
    resampled: bool


def is_segmentation(path: Path) -> bool:
    """Whether a file is a DICOM segmentation of any kind."""
    if not is_dicom(path):
        return False
    with damaged_is_input_error(path):
        header = open_dicom(path, only=["SOPClassUID"])
        return str(header.get("SOPClassUID", "")) in SEGMENTATIONS


def read_segmentation(path: Path, volume: Volume, *, resampled: bool = False) -> Drawn:
    """Read the segments of a SEG onto the grid of an image.

    Parameters
    ----------
    volume : any volume in the same frame of reference. Of a picture without a place, the SEG's
        references to its frames decide.
    resampled : take a SEG on another lattice too, each voxel from the nearest.

    Raises
    ------
    InputError
        If it is damaged, of another frame of reference or patient position, or on another lattice.
    """
    with damaged_is_input_error(path):
        header = open_dicom(path)
        kind = str(header.get("SOPClassUID", ""))
        if kind not in READ:
            raise InputError(f"{path} is a {SEGMENTATIONS.get(kind, 'DICOM object')}, no SEG.")
        if header.get("TotalPixelMatrixRows") is not None:
            raise InputError(f"{path} is a segmentation of a slide, whose tiles are not read.")
        described = header.get("SegmentSequence") or ()
        segments = names_by_number(
            *(path, described, "SegmentNumber", "SegmentLabel"), what="a segment", whose="a pixel"
        )
        segments.pop(0, None)  # a label map's background
        if not segments:
            raise InputError(f"{path} has no segments.")
        check_length(path, header)
        planes = planes_of(header, 0, path)
        check_pixels(path, header, len(planes))
        notes = [*_check_reference(path, header, volume)]
        owners = _owners(path, header, planes)
        if kind == READ[0] and str(header.get("SegmentationType", "")) == "FRACTIONAL":
            notes.append(
                f"{path.name} is fractional: voxels of {HALF:g} of its maximum or more are taken"
            )
        check_size(path, [len(segments), *volume.shape], np.dtype(bool))
        masks = {number: np.zeros(volume.shape, bool) for number in segments}
        frames = _frames(path, header, segments, owners)
        if all(plane.where is None for plane in planes):
            outside = _put_by_reference(path, header, planes, frames, volume, masks)
            return Drawn(segments, masks, (*notes, *outside), False)
        if any(plane.where is None for plane in planes):
            raise InputError(f"{path}: a frame has no place, others have.")
        if volume.frame == "image":
            raise InputError(
                f"{path} lies in a patient's coordinates, the image does not say how the patient "
                "lay. Give the image that it was drawn on."
            )
        _check_preserved(path, header, planes, volume)
        try:
            said = _put(path, planes, frames, volume.lattice, masks)
        except _OtherLatticeError as error:
            if not resampled:
                raise InputError(
                    f"{path} is on another grid than the image: {error}. Give --resample to take "
                    "each voxel from the nearest, or resample the segmentation first."
                ) from error
            masks = {number: np.zeros(volume.shape, bool) for number in segments}
            frames = _frames(path, header, segments, owners)
            said = _put_resampled(path, planes, frames, volume.lattice, masks)
            why = f"{path.name} was resampled to the image by the nearest neighbour: {error}"
            return Drawn(segments, masks, (*notes, why, *said), True)
        return Drawn(segments, masks, (*notes, *said), False)


class _OtherLatticeError(Exception):
    """A frame lies between the image's planes or pixels."""


def _check_reference(path: Path, header: Any, volume: Volume) -> list[str]:
    """Refuse another frame of reference; return what is to be said."""
    source = volume.origin
    if not isinstance(source, DicomSource):
        return []
    referred = _referred(header)
    own = {plane.instance[1] for plane in source.planes}
    mine, theirs = source.planes[0].reference, str(header.get("FrameOfReferenceUID") or "")
    if referred & own:
        return []
    if mine and theirs and mine != theirs:
        raise InputError(
            f"{path} was drawn on other images than this series, in another frame of reference "
            f"({theirs}, here {mine}), so its positions mean another place. Give the series it "
            "refers to."
        )
    if not (mine and theirs):
        if referred:
            raise InputError(
                f"{path} was drawn on other images than this series, and one of the two has no "
                "frame of reference. Give the series it refers to."
            )
        return [f"{path.name} does not say which series it was drawn on; its positions are taken"]
    if referred:
        return [f"{path.name} was drawn on other images of the same frame of reference"]
    return []


def _referred(header: Any) -> set[str]:
    """Return the instance UIDs that a SEG says it was drawn on."""
    found: set[str] = set()
    for series in header.get("ReferencedSeriesSequence") or ():
        for each in series.get("ReferencedInstanceSequence") or ():
            found.add(str(each.get("ReferencedSOPInstanceUID", "")))
    for each in header.get("SourceImageSequence") or ():
        found.add(str(each.get("ReferencedSOPInstanceUID", "")))
    for group in header.get("PerFrameFunctionalGroupsSequence") or ():
        found |= {uid for uid, _ in _sources(group)}
    for group in header.get("SharedFunctionalGroupsSequence") or ():
        found |= {uid for uid, _ in _sources(group)}
    return found - {""}


def _sources(group: Any, *, preserved: bool = False) -> list[tuple[str, int]]:
    """Return the images that a frame was derived from: instance UID, and frame from 1 (0: of many
    it does not say which).

    ``preserved``: only those whose place it says that it kept.
    """
    found = []
    for derivation in group.get("DerivationImageSequence") or ():
        for each in derivation.get("SourceImageSequence") or ():
            if preserved and each.get("SpatialLocationsPreserved") != "YES":
                continue
            frames = each.get("ReferencedFrameNumber") or 0
            numbers = [frames] if isinstance(frames, (int, str)) else list(frames)
            uid = str(each.get("ReferencedSOPInstanceUID", ""))
            found += [(uid, int(number)) for number in numbers]
    return found


def _check_preserved(path: Path, header: Any, planes: Sequence[Plane], volume: Volume) -> None:
    """Refuse a SEG that contradicts itself: a frame that is said to keep the place of an image
    (SpatialLocationsPreserved), and has a position off its plane. Which one is wrong is not known.
    """
    source = volume.origin
    if not isinstance(source, DicomSource):
        return
    known: dict[tuple[str, int], list[Plane]] = defaultdict(list)
    for each in source.planes:
        known[each.instance[1], each.frame + 1].append(each)
        known[each.instance[1], 0].append(each)
    for plane, group in zip(
        planes, header.get("PerFrameFunctionalGroupsSequence") or (), strict=False
    ):
        named = _sources(group, preserved=True)
        own = [p for each in named if each in known for p in known[each]]
        if not own:
            continue
        normal = own[0].at.normal
        off = min(abs(np.dot(np.subtract(plane.at.position, p.at.position), normal)) for p in own)
        if off > HALF * volume.spacing[0]:
            raise InputError(
                f"{path} contradicts itself: a frame lies {off:.1f} mm off the image whose place "
                "it says that it kept, so where it belongs is unknown. Export it again."
            )


def _owners(path: Path, header: Any, planes: Sequence[Plane]) -> list[int | None]:
    """Return the segment number of each frame; None of a label map's."""
    if str(header.get("SOPClassUID", "")) == LABEL_MAP:
        return [None] * len(planes)
    shared = item(item(header, "SharedFunctionalGroupsSequence"), "SegmentIdentificationSequence")
    groups = header.get("PerFrameFunctionalGroupsSequence") or [None] * len(planes)
    owners: list[int | None] = []
    for group in groups:
        found = item(group, "SegmentIdentificationSequence") or shared
        number = None if found is None else found.get("ReferencedSegmentNumber")
        if number is None:
            raise InputError(f"{path}: a frame does not say whose segment it is.")
        owners.append(int(number))
    return owners


def _frames(
    path: Path, header: Any, segments: Mapping[int, str], owners: Sequence[int | None]
) -> Any:
    """Yield (frame, segment number, boolean HxW) for whatever is drawn in each frame."""
    dataset = open_dicom(path, pixels=True)
    least = 1.0
    if owners and owners[0] is not None and header.get("SegmentationType") == "FRACTIONAL":
        least = HALF * float(header.MaximumFractionalValue)
    decoded = 0
    for frame, stored in enumerate(stored_frames(dataset, range(len(owners)))):
        decoded += 1
        owner = owners[frame]
        if owner is not None:
            if owner not in segments:
                raise InputError(f"{path}: a frame is of segment {owner}, which is not described.")
            yield frame, owner, stored >= max(least, 1e-9)
            continue
        for value in np.unique(stored):
            if int(value) in segments:
                yield frame, int(value), stored == value
            elif value:
                raise InputError(f"{path}: a pixel is of segment {value}, which is not described.")
    if decoded != len(owners):
        raise InputError(f"{path} has {decoded} frames of pixels, {len(owners)} are declared.")


def _plane_lattice(plane: Plane) -> Lattice:
    """Return one frame as a grid of one slice."""
    at = plane.at
    affine = np.eye(4)
    affine[:3, 0] = at.normal * (plane.thickness or 1.0)
    affine[:3, 1] = np.array(at.column) * at.spacing[0]
    affine[:3, 2] = np.array(at.row) * at.spacing[1]
    affine[:3, 3] = at.position
    return Lattice(affine, (1, *plane.shape))


def _put(
    path: Path,
    planes: Sequence[Plane],
    frames: Any,
    onto: Lattice,
    masks: Mapping[int, NDArray[np.bool_]],
) -> tuple[str, ...]:
    """Put every frame on the image's lattice; raises _OtherLatticeError if one does not fit."""
    drawn: dict[int, NDArray[np.bool_]] = {}
    outside, placements = 0, {}
    for frame, number, mask in frames:
        if frame not in placements:
            try:
                placements[frame] = _plane_lattice(planes[frame]).relate(onto)
            except InputError as error:
                raise _OtherLatticeError(str(error)) from error
        outside += placements[frame].put(mask[None], masks[number])
        drawn[number] = drawn.get(number, np.zeros(1, bool)) | mask.any()
    return check_overlap(path, Path("the image"), drawn, masks, outside)


def _put_resampled(
    path: Path,
    planes: Sequence[Plane],
    frames: Any,
    onto: Lattice,
    masks: dict[int, NDArray[np.bool_]],
) -> tuple[str, ...]:
    """Build each segment's own volume, and take every voxel of the image from the nearest of it."""
    normal = planes[0].at.normal
    unique = {round(float(np.dot(plane.at.position, normal)), 3): plane for plane in planes}
    at = np.array(sorted(unique))
    gap = float(np.diff(at).min()) if len(at) > 1 else 1.0
    thickness = planes[0].thickness
    if thickness:  # frames between those that are stored may be empty
        steps = (at - at[0]) / thickness
        gap = thickness if np.abs(steps - np.rint(steps)).max() < SAME_PLACE else gap
    affine, _, _ = place([unique[float(at[0])]], path)
    affine[:3, 0] = normal * gap
    count = round((at[-1] - at[0]) / gap) + 1
    grid = Lattice(affine, (count, *planes[0].shape))
    stacks: dict[int, NDArray[np.bool_]] = {}
    for frame, number, mask in frames:
        stack = stacks.setdefault(number, np.zeros(grid.shape, bool))
        try:
            _plane_lattice(planes[frame]).relate(grid).put(mask[None], stack)
        except InputError as error:
            raise InputError(
                f"{path}: its frames lie on several grids ({error}), so it cannot be resampled."
            ) from error
    for number, stack in stacks.items():
        masks[number] = resample(stack, grid, onto)
    return check_overlap(path, Path("the image"), stacks, masks, 0)


def _put_by_reference(
    path: Path,
    header: Any,
    planes: Sequence[Plane],
    frames: Any,
    volume: Volume,
    masks: Mapping[int, NDArray[np.bool_]],
) -> tuple[str, ...]:
    """Put frames without a place on the pictures that they name."""
    source = volume.origin
    if volume.frame != "image" or not isinstance(source, DicomSource):
        raise InputError(f"{path}: its frames have no place, so they cannot be laid on a volume.")
    known = {(p.instance[1], p.frame + 1): index for index, p in enumerate(source.planes)}
    known |= {(p.instance[1], 0): i for i, p in enumerate(source.planes) if p.frames == 1}
    groups = header.get("PerFrameFunctionalGroupsSequence") or [None] * len(planes)
    shared = item(header, "SharedFunctionalGroupsSequence")
    for frame, number, mask in frames:
        group = groups[frame]
        named = _sources(group) if group is not None else []
        named = named or (_sources(shared) if shared is not None else [])
        index = next((known[each] for each in named if each in known), None)
        if index is None and not named and len(source.planes) == 1 and len(planes) == 1:
            index = 0  # one picture, one frame
        if index is None:
            raise InputError(
                f"{path} was drawn on other images than this: a frame names none of its pictures."
            )
        if mask.shape != volume.shape[1:]:
            raise InputError(
                f"{path}: a frame is {mask.shape[0]} x {mask.shape[1]} pixels, the picture "
                f"{volume.shape[1]} x {volume.shape[2]}."
            )
        masks[number][index] |= mask
    return ()
