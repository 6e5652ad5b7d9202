"""Answers beside a SEG: a Basic Text SR with volumes and quality, a picture as secondary capture.

Both are made of the record that was written with the segmentation, and repeat the study of its
source. A Basic Text SR knows no measurements, so numbers are texts.
"""

from __future__ import annotations

import datetime
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from recallseg.engines.durable import write_file
from recallseg.engines.errors import OutputError
from recallseg.engines.reading import read_file
from recallseg.runtime.formats.dicom import DicomSource
from recallseg.runtime.formats.dicom_seg import STUDY
from recallseg.runtime.formats.volume import Volume

__all__ = ["write_capture", "write_report"]

BASIC_TEXT = "1.2.840.10008.5.1.4.1.1.88.11"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
EXPLICIT = "1.2.840.10008.1.2.1"
_NUMBERS = {BASIC_TEXT: 901, CAPTURE: 902}  # of the series; a SEG's is 900


def write_report(path: Path, volume: Volume, record: Mapping[str, Any], rule: str) -> None:
    """Write volumes, quality and what made them as a Basic Text SR.

    Raises
    ------
    OutputError
        If the source lacks what it must repeat.
    """
    dataset = _of_study(volume, BASIC_TEXT, "SR", "RecallSeg report")
    dataset.CompletionFlag, dataset.VerificationFlag = "COMPLETE", "UNVERIFIED"
    dataset.ReferencedPerformedProcedureStepSequence = []
    dataset.PerformedProcedureCodeSequence = []
    dataset.ValueType, dataset.ContinuityOfContent = "CONTAINER", "SEPARATE"
    dataset.ConceptNameCodeSequence = [_code("126000", "DCM", "Imaging Measurement Report")]
    series = _item(
        SeriesInstanceUID=volume.origin.header.SeriesInstanceUID,
        ReferencedSOPSequence=[
            _item(ReferencedSOPClassUID=c, ReferencedSOPInstanceUID=i)
            for c, i in dict.fromkeys(plane.instance for plane in volume.origin.planes)
        ],
    )
    dataset.CurrentRequestedProcedureEvidenceSequence = [
        _item(StudyInstanceUID=dataset.StudyInstanceUID, ReferencedSeriesSequence=[series])
    ]
    dataset.ContentSequence = [
        _item(
            RelationshipType="CONTAINS",
            ValueType="TEXT",
            ConceptNameCodeSequence=[_code("121071", "DCM", "Finding")],
            TextValue=text,
        )
        for text in _lines(record, rule)
    ]
    _write(path, dataset)


def write_capture(path: Path, volume: Volume, picture: Path) -> None:
    """Write a picture (PNG) as a secondary capture.

    Raises
    ------
    OutputError
        As :func:`write_report`.
    """
    found = cv2.imdecode(np.frombuffer(read_file(picture), np.uint8), cv2.IMREAD_COLOR)
    if found is None:
        raise OutputError("the picture of the segmentation cannot be read again.")
    pixels = np.ascontiguousarray(found[..., ::-1])
    dataset = _of_study(volume, CAPTURE, "OT", "RecallSeg preview")
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.PatientOrientation = None
    dataset.BurnedInAnnotation = "NO"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB"
    _write(path, dataset)


def _lines(record: Mapping[str, Any], rule: str) -> list[str]:
    voxels, volumes, areas = (record.get(n) or {} for n in ("voxels", "millilitres", "square_mm"))
    lines = []
    for name in record["labels"]:
        if name in volumes:
            size = f"{volumes[name]:.3f} ml"
        elif name in areas:
            size = f"{areas[name]:.3f} mm2"
        else:
            size = f"{voxels.get(name, 0)} pixels"
        lines.append(f"{name}: {size}" if voxels.get(name) else f"{name}: not found")
    quality = record["quality"]
    flags = ", ".join(f"{flag} {count}" for flag, count in quality["flags"].items())
    lines.append(f"Quality of slices: {flags}")
    provenance = record["provenance"]
    lines.append(
        f"Made by RecallSeg {record['recallseg']}, rule {rule}, provenance {provenance['digest']}, "
        f"library {provenance['library_digest'][:16]}"
    )
    lines += [f"Note: {note}" for note in record.get("notes", ())]
    if record.get("notice"):
        lines.append(str(record["notice"]))
    return [line[:1024] for line in lines]


def _of_study(volume: Volume, sop_class: str, modality: str, description: str) -> Any:
    """Return a new object of the study that a volume is of, in a series of its own."""
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid

    from recallseg import __version__

    source = volume.origin
    if not isinstance(source, DicomSource) or not source.header.get("StudyInstanceUID"):
        raise OutputError("the source has no StudyInstanceUID, which an answer must repeat.")
    now = datetime.datetime.now()
    dataset = Dataset()
    for name in STUDY:
        element = source.header.get(name)
        setattr(dataset, name, "" if element is None else element)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID = source.header.StudyInstanceUID
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.SeriesInstanceUID = generate_uid()
    dataset.SeriesNumber, dataset.InstanceNumber = _NUMBERS[sop_class], 1
    dataset.Modality, dataset.SeriesDescription = modality, description
    dataset.Manufacturer = dataset.ManufacturerModelName = "RecallSeg"
    dataset.SoftwareVersions, dataset.DeviceSerialNumber = __version__, "0"
    dataset.ContentDate = dataset.SeriesDate = now.strftime("%Y%m%d")
    dataset.ContentTime = dataset.SeriesTime = now.strftime("%H%M%S")
    return dataset


def _code(value: str, scheme: str, meaning: str) -> Any:
    return _item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _item(**fields: Any) -> Any:
    from pydicom.dataset import Dataset

    made = Dataset()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _write(path: Path, dataset: Any) -> None:
    import warnings

    from pydicom.dataset import FileMetaDataset

    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = EXPLICIT
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values outside the standard in the source
            dataset.save_as(stream, enforce_file_format=True)
    except Exception as error:
        raise OutputError(
            f"{path.name} cannot be written: {type(error).__name__}: {error}"
        ) from error
    write_file(path, stream.getvalue())
