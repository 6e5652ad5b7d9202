"""DICOM files: which are some, what kind of object is in one, and its data set, within limits."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.engines.limits import describe_bytes, max_bytes
from recallseg.runtime.formats.guards import check_given, of_file
from recallseg.runtime.formats.walking import files_below

__all__ = [
    "DEFLATED",
    "OTHERS",
    "RT_STRUCTURE_SET",
    "SEGMENTATIONS",
    "damaged_is_input_error",
    "find_series",
    "is_dicom",
    "names_by_number",
    "object_kind",
    "open_dicom",
]

DEFLATED = "1.2.840.10008.1.2.1.99"
SEGMENTATIONS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation (SEG)",
    "1.2.840.10008.5.1.4.1.1.66.5": "surface segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "label map segmentation (SEG)",
    "1.2.840.10008.5.1.4.1.1.66.8": "height map segmentation",
}
RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
OTHERS = {
    "1.2.840.10008.5.1.4.1.1.481.2": "dose distribution (RTDOSE)",
    "1.2.840.10008.5.1.4.1.1.4.2": "MR spectroscopy",
    "1.2.840.10008.5.1.4.1.1.30": "parametric map",
}
"""Objects with pixels that are not images of a patient."""
MAX_FILES = 20_000
_PREAMBLE = 128
_VALUE_REPRESENTATIONS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR "
    b"US UT UV".split()
)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as a DICOM file does (PS3.10: 128 bytes, then ``DICM``), or, without
    that preamble, as a data set of the groups that all images begin with.

    Raises
    ------
    InputError
        If the machine does not give it, see :func:`recallseg.runtime.formats.guards.check_given`:
        a series must not lack a slice for that.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_PREAMBLE + 4)
    except OSError as error:
        check_given(path, error)
        return False
    if head[_PREAMBLE:] == b"DICM":
        return True
    return _begins_as_data_set(head) and _has_sop_class(path)


def object_kind(dataset: Any) -> str:
    """Return ``image``, or what else a DICOM object is, in words for people."""
    uid = str(dataset.get("SOPClassUID", ""))
    found = SEGMENTATIONS.get(uid) or OTHERS.get(uid)
    if found is not None:
        return found
    if "Rows" in dataset and "Columns" in dataset:
        return "image"
    from pydicom.uid import UID

    name = UID(uid).name.removesuffix(" Storage")
    if not name or name == uid:
        return "object without pixels"
    return f"{name} without pixels" if "Image" in name else name


def find_series(folder: Path) -> list[Path]:
    """Return the DICOM files in a folder and below, DICOMDIR and hidden ones left out.

    Raises
    ------
    InputError
        For more than ``MAX_FILES``; if the machine does not give a file, or list a folder: a series
        must not lack a slice for that.
    """
    files = []
    for path in files_below(folder):
        if path.name != "DICOMDIR" and is_dicom(path):
            files.append(path)
            if len(files) > MAX_FILES:
                raise InputError(f"{folder} has more than {MAX_FILES} DICOM files. Split it.")
    return files


def open_dicom(path: Path, *, pixels: bool = False, only: list[str] | None = None) -> Any:
    """Return a file's data set: its header, or all of it, pixels undecoded.

    Files without preamble or file meta information are taken for uncompressed, deflated ones are
    unpacked within :func:`recallseg.engines.limits.max_bytes`.

    Parameters
    ----------
    pixels : read them too.
    only : names of the attributes to read.

    Raises
    ------
    InputError
        If it is no DICOM file, or unpacks to too much. Damage raises what pydicom raises.
    """
    import pydicom
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not is_dicom(path):
        raise InputError(f"{path} is no DICOM file: it does not begin as one.")
    options: dict[str, Any] = {"stop_before_pixels": not pixels, "specific_tags": only}
    with path.open("rb") as file:
        whole = file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"
    if whole and str(read_file_meta_info(path).get("TransferSyntaxUID", "")) == DEFLATED:
        return pydicom.dcmread(io.BytesIO(_inflated(path)), **options)
    dataset = pydicom.dcmread(path, force=not whole, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        )
    return dataset


@contextmanager
def damaged_is_input_error(path: Path) -> Iterator[None]:
    """Turn what pydicom, highdicom and decoders raise, of every kind, into one InputError."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"), of_file(path):
            warnings.simplefilter("ignore")  # about values outside the standard; pixels decide
            yield
    except (InputError, ModuleNotFoundError):
        raise
    except (Exception, struct.error) as error:
        check_given(path, error)
        kind = type(error).__name__
        raise InputError(
            f"{path} cannot be read as DICOM: {kind}: {error}. It is damaged, cut off or of a kind "
            "that is not read; send or export it again."
        ) from error


def names_by_number(
    path: Path, described: Sequence[Any], number: str, name: str, *, what: str, whose: str
) -> dict[int, str]:
    """Return names by number, of what a sequence describes.

    Parameters
    ----------
    number, name : attributes of an item.
    what, whose : what is numbered, and what bears its number; for the message.

    Raises
    ------
    InputError
        If a number is described twice.
    """
    names = {int(getattr(one, number)): str(one.get(name) or "") for one in described}
    if len(names) < len(described):
        raise InputError(
            f"{path} describes {what}'s number twice, so whose {whose} is cannot be told. Export "
            "it again."
        )
    return names


def _begins_as_data_set(head: bytes) -> bool:
    """Whether bytes begin with an element of group 2 or 8 whose representation or length fits."""
    if len(head) < 16:
        return False
    group, element = struct.unpack_from("<HH", head)
    if group not in (0x0002, 0x0008) or element > 0x0100:
        return False
    if head[4:6] in _VALUE_REPRESENTATIONS:
        return True
    (length,) = struct.unpack_from("<I", head, 4)
    return int(length) <= 128 and length % 2 == 0


def _has_sop_class(path: Path) -> bool:
    import pydicom

    try:
        with path.open("rb") as file:
            if DEFLATED.encode() in file.read(4096):
                return False  # merely to look, pydicom would unpack all of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(
                path, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"]
            )
            return str(header.get("SOPClassUID", "")).startswith("1.2.840.10008.")
    except Exception as error:  # it is none; whatever made pydicom stumble
        check_given(path, error)
        return False


def _inflated(path: Path) -> bytes:
    """Return a deflated file (PS3.5 A.5) as an uncompressed one of explicit VR."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filereader import read_file_meta_info
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import ExplicitVRLittleEndian

    with path.open("rb") as file:
        meta = read_file_meta_info(path)  # dcmread would unpack the whole, without a limit
        file.seek(_PREAMBLE + 4)
        file.seek(12 + int(meta.FileMetaInformationGroupLength), io.SEEK_CUR)
        engine = zlib.decompressobj(-zlib.MAX_WBITS)
        data = engine.decompress(file.read(), max_bytes())
    if engine.unconsumed_tail:
        raise InputError(
            f"{path} unpacks to more than {describe_bytes(max_bytes())}. Store it another way."
        )
    if not engine.eof:
        raise InputError(f"{path} is cut off: its deflated data has no end. Copy it again.")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stream = DicomBytesIO()
    stream.write(b"\0" * _PREAMBLE + b"DICM")
    write_file_meta_info(stream, meta)
    return bytes(stream.getvalue()) + data
