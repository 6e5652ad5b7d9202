"""Our own DICOM Segmentation objects (SEG, PS3.3 A.51); those of others: ``dicom_seg_reading``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.concepts import Code, Concept, concepts_for
from recallseg.runtime.formats.dicom import DicomSource
from recallseg.runtime.formats.volume import Volume

__all__ = ["Algorithm", "check_segmentation", "write_dicom_seg"]

SERIES_NUMBER = 900  # above what scanners number their own series with
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
class Algorithm:
    """What made a segmentation; a library changes the output as a model does, so both are named."""

    version: str
    parameters: Mapping[str, str]
    serial_number: str = ""
    notice: str = ""


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
    source = _source(volume)
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


def write_dicom_seg(
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
        If no structure is in a mask: DICOM knows no empty SEG; or the volume is not DICOM's.
    OutputError
        If it cannot be made.
    OSError
        If the folder cannot be written.
    """
    from recallseg import __version__

    _source(volume)
    present = [name for name in masks if masks[name].any()]
    if not present:
        raise InputError("no structure was found, and DICOM knows no empty SEG.")
    made_by = algorithm or Algorithm(__version__, {})
    replace_file(Path(path), _encode(volume, masks, present, made_by, concepts))


def _source(volume: Volume) -> DicomSource:
    if not isinstance(volume.origin, DicomSource):
        raise InputError(
            "a SEG repeats what its DICOM source says, and this volume has none. Write .nii.gz or "
            ".seg.nrrd."
        )
    return volume.origin


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

    source = _source(volume)
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

    source = _source(volume)
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
