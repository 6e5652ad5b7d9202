"""What decides about a DICOM file before it is read: a few attributes of its header."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from recallseg.engines.errors import InputError
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.formats.dicom_files import (
    damaged_is_input_error,
    is_dicom,
    object_kind,
    open_dicom,
)

__all__ = ["DicomHeader", "Header", "NotGiven", "patient_of", "read_header"]


@dataclass(frozen=True)
class DicomHeader:
    """What decides about a DICOM file; empty strings and 0 where it does not say.

    ``what`` is as :func:`recallseg.runtime.formats.dicom_files.object_kind` says.
    """

    what: str
    sop_class: str
    instance: str
    series: str
    modality: str
    number: int
    frames: int
    placed: bool
    refers_to: tuple[str, ...]  # SeriesInstanceUIDs of what a segmentation was drawn on
    study: str = ""
    body_part: str = ""
    description: str = ""  # of the series


@dataclass(frozen=True)
class NotGiven:
    """Why the machine did not give a file, and the number of its error: ask again later.

    ``awaited``: whether a series that it may belong to is not taken before.
    """

    why: str
    number: int
    awaited: bool = True


Header = Union["DicomHeader", NotGiven, str, None]
"""A text is why a file that says that it is DICOM has none; None: it says nothing of the kind."""


def patient_of(header: Any) -> str | None:
    """Return what all images of a header's patient belong to; None where it names no patient.

    Two issuers may give one number to two patients.
    """
    patient, issuer = (
        str(getattr(header, name, "") or "").strip() for name in ("PatientID", "IssuerOfPatientID")
    )
    if not patient:
        return None
    return f"patient {patient} of {issuer}" if issuer else f"patient {patient}"


def read_header(path: Path) -> Header:
    """Return what decides about a DICOM file, why there is no such thing, or None for another."""
    wanted = [
        *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber"),
        *("Rows", "Columns", "NumberOfFrames", "ImagePositionPatient"),
        *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
        *("SpecificCharacterSet", "StudyInstanceUID", "BodyPartExamined", "SeriesDescription"),
    ]
    try:
        if not is_dicom(path):
            return None
        with damaged_is_input_error(path):
            header = open_dicom(path, only=wanted)
            # "IS" may hold what is no number: a series number only names, so that is no fault.
            number = str(header.get("SeriesNumber", "") or "")
            frames = str(header.get("NumberOfFrames", "") or "1")
            return DicomHeader(
                object_kind(header),
                str(header.get("SOPClassUID", "")),
                str(header.get("SOPInstanceUID", "")),
                str(header.get("SeriesInstanceUID", "")),
                "".join(c for c in str(header.get("Modality", "") or "") if c.isalnum())[:16],
                int(number) if number.isascii() and number.isdecimal() else 0,
                int(frames) if frames.isascii() and frames.isdecimal() else 1,
                bool(header.get("ImagePositionPatient")),
                tuple(_series_referred_to(header)),
                str(header.get("StudyInstanceUID", "") or ""),
                str(header.get("BodyPartExamined", "") or "").strip(),
                str(header.get("SeriesDescription", "") or "").strip(),
            )
    except InputError as error:
        fault = machine_fault(error)
        return NotGiven(str(error), fault) if fault else str(error)


def _series_referred_to(header: object) -> Iterator[str]:
    """Yield the SeriesInstanceUIDs that a segmentation or structure set names, at any depth."""
    from pydicom.dataset import Dataset

    assert isinstance(header, Dataset)
    own = header.get("SeriesInstanceUID")
    for element in header.iterall():
        if element.keyword == "SeriesInstanceUID" and element.value not in (None, "", own):
            yield str(element.value)
