"""DICOM Segmentation objects (SEG, PS3.3 A.51): of every maker in, our own out.

Each frame is put where its own position and orientation say. References to source images are
optional where there is a frame of reference, and decide nothing there; so do the order of frames,
and whether spatial locations are said to be preserved.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.concepts import Code, Concept, concepts_for
from recallseg.runtime.formats.dicom import (
    SEGMENTATIONS,
    DicomSource,
    damaged_is_input_error,
    is_dicom,
    open_dicom,
)
from recallseg.runtime.formats.dicom_pixels import check_pixels, stored_frames
from recallseg.runtime.formats.dicom_planes import Plane, item, place, planes_of
from recallseg.runtime.formats.guards import check_size
from recallseg.runtime.formats.lattice import SAME_PLACE, Lattice, check_overlap, resample
from recallseg.runtime.formats.volume import Volume

__all__ = [
    "Algorithm",
    "Drawn",
    "check_segmentation",
    "is_segmentation",
    "read_segmentation",
    "write_segmentation",
]

SERIES_NUMBER = 900  # above what scanners number their own series with
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
READ = ("1.2.840.10008.5.1.4.1.1.66.4", LABEL_MAP)
HALF = 0.5
"""Of the declared maximum: a voxel of a FRACTIONAL segmentation counts from here on."""
EVEN = 0.005
"""Of the gap: planes whose positions are rounded by more are written at even ones."""
STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"),
)
"""Attributes of type 2: they may be empty, not absent. Anonymisers take them out."""
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality")
"""Attributes of type 1: a segmentation without them belongs to nothing."""


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


@dataclass(frozen=True)
class Algorithm:
    """What made a segmentation; a library changes the output as a model does, so both are named."""

    version: str
    parameters: Mapping[str, str]
    serial_number: str = ""
    notice: str = ""


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
        segments = {
            int(segment.SegmentNumber): str(segment.get("SegmentLabel") or "")
            for segment in header.get("SegmentSequence") or ()
        }
        segments.pop(0, None)  # a label map's background
        if not segments:
            raise InputError(f"{path} has no segments.")
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


def check_segmentation(
    volume: Volume,
    structures: Sequence[str],
    algorithm: Algorithm,
    concepts: Mapping[str, Concept] | None = None,
) -> None:
    """See before the work whether a SEG of these images can be written.

    Raises
    ------
    InputError
        If the source lacks what a SEG must repeat; the message names it.
    OutputError
        If it cannot be written for another reason.
    """
    source = volume.origin
    if not isinstance(source, DicomSource):
        raise InputError("a SEG repeats what its DICOM source says, and there is none.")
    missing = [name for name in NEEDED if not source.header.get(name)]
    if not missing and not all(all(plane.instance) for plane in source.planes):
        missing = ["SOPInstanceUID in each image"]
    if missing:
        raise InputError(
            f"the source has no {' and no '.join(missing)}, which a SEG must repeat. Keep them, "
            "or make new ones, when anonymising."
        )
    one = Volume(
        volume.array[:1],
        volume.affine,
        volume.frame,
        origin=DicomSource(source.header, source.planes[:1], source.reference),
    )
    dot = np.zeros(one.shape, bool)
    dot[0, 0, 0] = True
    _encode(one, dict.fromkeys(structures, dot), structures, algorithm, concepts)


def write_segmentation(
    path: str | Path,
    masks: Mapping[str, NDArray[np.bool_]],
    volume: Volume,
    algorithm: Algorithm | None = None,
    concepts: Mapping[str, Concept] | None = None,
) -> None:
    """Write masks as a BINARY SEG on the source's own pixel grid: in full, or not at all.

    Parameters
    ----------
    masks : boolean IxJxK by structure; they may overlap.
    volume : as read by :func:`recallseg.runtime.formats.dicom.read_dicom`.
    algorithm : what made the masks; None: this version of RecallSeg.
    concepts : coded meaning by structure; what is not there comes from
        :func:`recallseg.runtime.formats.concepts.concepts_for`.

    Raises
    ------
    InputError
        If no structure is in a mask: DICOM knows no empty SEG.
    OutputError
        If it cannot be made.
    OSError
        If the folder cannot be written.
    """
    from recallseg import __version__

    present = [name for name in masks if masks[name].any()]
    if not present:
        raise InputError("no structure was found, and DICOM knows no empty SEG.")
    made_by = algorithm or Algorithm(__version__, {})
    replace_file(Path(path), _encode(volume, masks, present, made_by, concepts))


def _encode(
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    names: Sequence[str],
    algorithm: Algorithm,
    concepts: Mapping[str, Concept] | None,
) -> bytes:
    """Return a SEG as a file."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values outside the standard in the source
            segmentation = _segmentation(volume, masks, names, algorithm, concepts)
            stream = io.BytesIO()
            segmentation.save_as(stream)
    except (InputError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise OutputError(
            f"the segmentation cannot be written as a DICOM SEG: {type(error).__name__}: {error}"
        ) from error
    return stream.getvalue()


def _segmentation(
    volume: Volume,
    masks: Mapping[str, NDArray[np.bool_]],
    names: Sequence[str],
    algorithm: Algorithm,
    concepts: Mapping[str, Concept] | None,
) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    from recallseg import __version__

    source: DicomSource = volume.origin
    known = concepts_for(names, concepts)
    made_by = highdicom.AlgorithmIdentificationSequence(
        name="RecallSeg",
        family=codes.cid7162.ArtificialIntelligence,
        version=algorithm.version[:64],
        source="RecallSeg",
        parameters=dict(algorithm.parameters),
    )
    stand_ins = _stand_ins(volume)
    at, planes = _planes(volume, masks, names)
    segmentation = highdicom.seg.Segmentation(
        source_images=[stand_ins[i] for i in at],
        pixel_array=planes,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(number, name, known[name], made_by) for number, name in enumerate(names, 1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="RecallSeg",
        manufacturer_model_name="RecallSeg",
        software_versions=__version__,
        device_serial_number=algorithm.serial_number or "0",
        content_description=algorithm.notice[:64] or None,
        content_label="RECALLSEG",
        series_description="RecallSeg segmentation",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set="ISO_IR 192",
    )
    segmentation.SeriesDate = segmentation.ContentDate  # archives order a study's series by it
    segmentation.SeriesTime = segmentation.ContentTime
    _refer_to_the_source(segmentation, source)
    return segmentation


def _planes(
    volume: Volume, masks: Mapping[str, NDArray[np.bool_]], names: Sequence[str]
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Return the index of each plane that shows something, and those planes: with segment numbers,
    which take little room, or where masks overlap with an axis of segments at the end.
    """
    numbers = np.zeros(volume.shape, np.uint8 if len(names) < 256 else np.uint16)
    overlap = False
    for number, name in enumerate(names, 1):
        mask = masks[name]
        overlap = overlap or bool(numbers[mask].any())
        numbers[mask] = number
    at = np.flatnonzero(numbers.any(axis=(1, 2)))
    if overlap:
        return at, np.stack([masks[name][at] for name in names], axis=-1)
    return at, numbers if len(at) == len(numbers) else numbers[at]


def _description(number: int, name: str, concept: Concept, made_by: Any) -> Any:
    import highdicom

    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=_coded(concept.category),
        segmented_property_type=_coded(concept.type),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=made_by,
        tracking_uid=highdicom.UID(),
        tracking_id=name[:64],
        anatomic_regions=[_coded(concept.region)] if concept.region else None,
        display_color=highdicom.color.CIELabColor.from_rgb(*concept.colour),
    )
    if concept.modifier is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(concept.modifier)]
    return description


def _coded(code: Code) -> Any:
    import highdicom

    return highdicom.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _stand_ins(volume: Volume) -> list[Any]:
    """Return an image header of one frame for each plane, with an instance UID of its index.

    So a SEG is made alike of series and multi-frame objects, in the order of positions, with the
    first image's orientation (others may be rounded otherwise), text in Unicode, and empty where
    anonymising took an attribute away.
    """
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DSfloat

    source: DicomSource = volume.origin
    base = Dataset()
    base.SpecificCharacterSet = "ISO_IR 192"
    own = ("SOPInstanceUID", "SOPClassUID", "ImagePositionPatient")  # of each image
    for element in source.header:
        taken = element.VR != "SQ" and element.tag.group in (0x0008, 0x0010, 0x0012, 0x0020, 0x0040)
        if taken and element.keyword not in own:
            _copy_text(element, base)
    base.SpecificCharacterSet = "ISO_IR 192"
    for name in STUDY:
        if name not in base:
            setattr(base, name, "")
    base.Rows, base.Columns = volume.shape[1:]
    base.FrameOfReferenceUID = source.reference
    base.PixelSpacing = [DSfloat(v, auto_format=True) for v in volume.spacing[1:]]
    base.SliceThickness = DSfloat(volume.spacing[0], auto_format=True)
    base.SpacingBetweenSlices = DSfloat(volume.spacing[0], auto_format=True)
    directions = volume.affine_in("LPS")[:3, :3] / volume.spacing
    base.ImageOrientationPatient = [
        DSfloat(float(v), auto_format=True) for v in (*directions[:, 2], *directions[:, 1])
    ]
    affine = volume.affine_in("LPS")
    even = affine[:3, 3] + np.outer(np.arange(len(source.planes)), affine[:3, 0])
    positions = np.array([plane.at.position for plane in source.planes])
    if np.linalg.norm(positions - even, axis=1).max() > EVEN * volume.spacing[0]:
        positions = even  # readers refuse a stack whose rounded positions are uneven
    stand_ins = []
    for index in range(len(source.planes)):
        image = Dataset()
        image.update(base)
        image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        image.SOPInstanceUID = _stand_in_uid(index)
        image.ImagePositionPatient = [DSfloat(float(v), auto_format=True) for v in positions[index]]
        stand_ins.append(image)
    return stand_ins


def _stand_in_uid(index: int) -> str:
    return f"2.25.{index + 1}"


def _copy_text(element: Any, base: Any) -> None:
    """Copy an element, its text decoded, so that it may be written as Unicode."""
    value = element.value
    if element.VR == "PN":
        value = str(value)
    base.add_new(element.tag, element.VR, value)


def _refer_to_the_source(segmentation: Any, source: DicomSource) -> None:
    """Put the real images, and frames of them, in the place of the stand-ins."""
    real = {_stand_in_uid(index): plane for index, plane in enumerate(source.planes)}

    def correct(each: Any, frame: bool) -> None:
        plane = real.get(str(each.ReferencedSOPInstanceUID))
        if plane is None:  # one item may stand in several sequences
            return
        each.ReferencedSOPClassUID, each.ReferencedSOPInstanceUID = plane.instance
        if frame and plane.frames > 1:
            each.ReferencedFrameNumber = plane.frame + 1

    def once(sequence: Any) -> list[Any]:
        kept: dict[str, Any] = {}
        for each in sequence:
            correct(each, False)
            kept.setdefault(str(each.ReferencedSOPInstanceUID), each)
        return list(kept.values())

    for series in segmentation.get("ReferencedSeriesSequence") or ():
        series.ReferencedInstanceSequence = once(series.ReferencedInstanceSequence)
    if "SourceImageSequence" in segmentation:
        segmentation.SourceImageSequence = once(segmentation.SourceImageSequence)
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence") or ():
            for each in derivation.SourceImageSequence:
                correct(each, True)
