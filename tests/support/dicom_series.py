"""Small DICOM series made of an array, as a scanner would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

ORIENTATIONS = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
}
DX = "1.2.840.10008.5.1.4.1.1.1.1"


def write_series(
    folder: Path,
    array: np.ndarray,
    *,
    orientation: tuple[float, ...] = ORIENTATIONS["axial"],
    spacing: tuple[float, float, float] = (3.0, 0.8, 0.9),
    shuffle: bool = True,
    **fields: Any,
) -> list[Path]:
    """Write SxHxW uint16 or int16 as one file per slice; instance numbers are misleading."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, reference = generate_uid(), generate_uid(), generate_uid()
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    names = np.random.default_rng(1).permutation(len(array)) if shuffle else range(len(array))
    paths = []
    for index, plane in enumerate(array):
        dataset = make_slice(plane, **fields)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = reference
        dataset.ImageOrientationPatient = [float(v) for v in orientation]
        position = np.array([-50.0, -60.0, 20.0]) + normal * index * spacing[0]
        dataset.ImagePositionPatient = [round(float(v), 6) for v in position]
        dataset.PixelSpacing = [spacing[1], spacing[2]]
        dataset.SliceThickness = spacing[0]
        dataset.InstanceNumber = int(names[index]) + 1
        paths.append(folder / f"IM{int(names[index]):04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def make_slice(plane: np.ndarray, **fields: Any) -> FileDataset:
    """Return one image without a place; ``fields`` set or (None) remove attributes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    signed = plane.dtype == np.int16
    meta.MediaStorageSOPClassUID = CTImageStorage if signed else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "secret-77"
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.StudyDate = dataset.ContentDate = "20260101"
    dataset.StudyTime = dataset.ContentTime = "120000"
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.Modality = "CT" if signed else "MR"
    dataset.BodyPartExamined = "HEAD"
    dataset.SeriesNumber = 3
    dataset.Manufacturer = "Test"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = plane.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(signed)
    dataset.PixelData = np.ascontiguousarray(plane, plane.dtype.newbyteorder("<")).tobytes()
    for name, value in fields.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    return dataset


def write_object(path: Path, sop_class: str, **fields: Any) -> Path:
    """Write a DICOM object that is no image."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID = generate_uid()
    for name, value in fields.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_picture(path: Path, series: str, plane: np.ndarray, **fields: Any) -> Path:
    """Write a DICOM picture without a place in the patient."""
    made = {"SOPClassUID": DX, "SeriesInstanceUID": series, **fields}
    dataset = make_slice(plane, **made)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path
