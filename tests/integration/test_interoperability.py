"""What we write lies right in programs that share no code with ours, and theirs in ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from support.dicom_series import make_slice, write_series
from support.multi_frame import write_multi_frame

from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.concepts import concepts_for
from recallseg.runtime.formats.dicom_seg import Algorithm, write_dicom_seg
from recallseg.runtime.formats.metaimage import write_metaimage
from recallseg.runtime.formats.nifti import write_nifti
from recallseg.runtime.formats.nrrd import write_seg_nrrd
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.volume import Volume

SHAPE = (5, 20, 16)
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, -0.8)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
FEET_FIRST = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
SOURCES = (
    "axial",
    "oblique",
    "flipped",
    "feet first",
    "anisotropic",
    "multi-frame",
    "rounded",
    "one slice",
)


def source(folder: Path, kind: str) -> Volume:
    """A small series or multi-frame object of that kind, read."""
    array = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    if kind == "multi-frame":
        order = [3, 0, 4, 2, 1]  # as they are stored
        return read_volume(write_multi_frame(folder / "m.dcm", array, order, orientation=OBLIQUE))
    turned = {"oblique": OBLIQUE, "flipped": FLIPPED, "feet first": FEET_FIRST}
    spacing = (7.5, 0.4, 1.3) if kind == "anisotropic" else (3.0, 0.8, 0.9)
    array = array[:1] if kind == "one slice" else array
    orientation = turned.get(kind, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    spacing = (0.625, 0.8, 0.9) if kind == "rounded" else spacing
    paths = write_series(folder / "series", array, orientation=orientation, spacing=spacing)
    for path in paths if kind == "rounded" else ():
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient = [f"{v:.1f}" for v in dataset.ImagePositionPatient]
        dataset.save_as(path)
    return read_volume(folder / "series")


def masks_of(volume: Volume) -> dict[str, np.ndarray]:
    """Two structures that overlap, and look like none of their own mirror images."""
    liver, tumour = np.zeros((2, *volume.shape), bool)
    liver[:, 2:9, 3:12] = True
    liver[0, 2:4] = False
    liver[-1, 2:12, 3:6] = True
    tumour[:1, 6:13, 10:14] = True
    return {"liver": liver, "tumour": tumour}


def centres(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]


def assert_same_place(found: np.ndarray, expected: np.ndarray) -> None:
    """Each centre has exactly one partner."""
    assert len(found) == len(expected)
    assert len(found) > 0
    apart = np.linalg.norm(found[:, None] - expected[None], axis=-1)
    assert apart.min(axis=1).max() < 0.02
    assert apart.min(axis=0).max() < 0.02


def itk_centres(path: Path, value: int | None = None, component: int | None = None) -> np.ndarray:
    """LPS centres of the voxels of a label, as ITK lays them."""
    image = SimpleITK.ReadImage(str(path))
    array = SimpleITK.GetArrayFromImage(image)  # k, j, i (, component)
    if component is not None:
        array = array[..., component]
    index = np.argwhere(array != 0 if value is None else array == value)
    return np.array([image.TransformIndexToPhysicalPoint(row[::-1].tolist()) for row in index])


def dcmqi(program: str, *arguments: object) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def written(folder: Path, kind: str) -> tuple[Volume, dict[str, np.ndarray], Path]:
    volume = source(folder, kind)
    masks = masks_of(volume)
    path = folder / "x.seg.dcm"
    write_dicom_seg(path, masks, volume, Algorithm("bundle 1", {"k": "4"}, "1"))
    return volume, masks, path


@pytest.mark.parametrize("kind", SOURCES)
def test_a_seg_lies_right_in_dcmqi_and_itk(tmp_path: Path, kind: str) -> None:
    volume, masks, path = written(tmp_path, kind)
    dcmqi(
        *("segimage2itkimage", "--inputDICOM", path, "--outputDirectory", tmp_path),
        *("--outputType", "nrrd", "--prefix", "s"),
    )
    affine = volume.affine_in("LPS")
    names = {}
    about = json.loads((tmp_path / "s-meta.json").read_text())
    for group in about["segmentAttributes"]:
        for segment in group:
            names[segment["SegmentLabel"]] = segment["labelID"]
    assert set(names) == set(masks)
    files = sorted(tmp_path.glob("s-*.nrrd"))
    for name, mask in masks.items():
        found = [itk_centres(file, names[name]) for file in files]
        found = [each for each in found if len(each)]
        assert_same_place(np.concatenate(found), centres(mask, affine))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_seg_lies_right_in_highdicom_and_in_ours(tmp_path: Path, kind: str) -> None:
    volume, masks, path = written(tmp_path, kind)
    segmentation = highdicom.seg.segread(path)
    uids = {plane.instance[1] for plane in volume.origin.planes}
    assert {str(uid) for _, _, uid in segmentation.get_source_image_uids()} <= uids
    place = tmp_path / ("m.dcm" if kind == "multi-frame" else "series")
    again, own = read_annotated_volume(place, path, None)
    for number, (name, mask) in enumerate(masks.items(), 1):
        theirs = segmentation.get_volume(segment_numbers=[number], combine_segments=False)
        assert_same_place(
            centres(theirs.array[..., 0] > 0, theirs.affine),
            centres(mask, volume.affine_in("LPS")),
        )
        assert np.array_equal(own[name], mask)
    assert again.notes == volume.notes


@pytest.mark.parametrize("kind", ["multi-frame"])
def test_frames_name_the_frames_they_were_drawn_on(tmp_path: Path, kind: str) -> None:
    volume, _, path = written(tmp_path, kind)
    by_frame = {plane.frame + 1: plane.at.position for plane in volume.origin.planes}
    for group in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
        named = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert group.PlanePositionSequence[0].ImagePositionPatient == pytest.approx(
            by_frame[named.ReferencedFrameNumber], abs=1e-4
        )


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs Debian's dicom3tools")
@pytest.mark.parametrize("kind", SOURCES)
def test_a_seg_is_valid(tmp_path: Path, kind: str) -> None:
    _, _, path = written(tmp_path, kind)
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert not errors, errors


def test_codes_sides_and_colours_are_in_a_seg(tmp_path: Path) -> None:
    volume = source(tmp_path, "axial")
    masks = {"left kidney": masks_of(volume)["liver"], "thing": masks_of(volume)["tumour"]}
    write_dicom_seg(tmp_path / "x.dcm", masks, volume, Algorithm("1", {}))
    kidney, thing = pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert len(kidney.RecommendedDisplayCIELabValue) == 3
    assert thing.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"


@pytest.mark.parametrize("kind", SOURCES)
def test_overlapping_segments_survive_in_layers(tmp_path: Path, kind: str) -> None:
    volume = source(tmp_path, kind)
    masks = masks_of(volume)
    path = tmp_path / "x.seg.nrrd"
    write_seg_nrrd(path, masks, volume, concepts_for(masks))
    affine = volume.affine_in("LPS")
    for layer, (value, mask) in enumerate(zip((1, 2), masks.values(), strict=True)):
        assert_same_place(itk_centres(path, value, layer), centres(mask, affine))
    place = tmp_path / ("m.dcm" if kind == "multi-frame" else "series")
    _, own = read_annotated_volume(place, path, None)
    for name, mask in masks.items():
        assert np.array_equal(own[name], mask)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_metaimage_lies_right_in_itk(tmp_path: Path, kind: str) -> None:
    volume = source(tmp_path, kind)
    liver = masks_of(volume)["liver"]
    path = tmp_path / "x.mask.mha"
    write_metaimage(path, liver.astype(np.uint8), volume)
    assert_same_place(itk_centres(path), centres(liver, volume.affine_in("LPS")))
    place = tmp_path / ("m.dcm" if kind == "multi-frame" else "series")
    _, own = read_annotated_volume(place, path, {1: "liver"})
    assert np.array_equal(own["liver"], liver)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_label_map_lies_right_in_itk_and_nibabel(tmp_path: Path, kind: str) -> None:
    volume = source(tmp_path, kind)
    mask = masks_of(volume)["liver"]
    write_nifti(tmp_path / "m.nii.gz", mask.astype(np.uint8), volume)
    expected = centres(mask, volume.affine_in("LPS"))
    assert_same_place(itk_centres(tmp_path / "m.nii.gz", 1), expected)
    image = nibabel.load(tmp_path / "m.nii.gz")
    found = centres(np.asanyarray(image.dataobj) == 1, image.affine) * [-1, -1, 1]
    assert_same_place(found, expected)
    place = tmp_path / ("m.dcm" if kind == "multi-frame" else "series")
    _, own = read_annotated_volume(place, tmp_path / "m.nii.gz", {1: "liver"})
    assert np.array_equal(own["liver"], mask)


@pytest.mark.parametrize("kind", ["axial", "oblique", "flipped", "anisotropic", "one slice"])
def test_a_seg_of_dcmqi_is_read(tmp_path: Path, kind: str) -> None:
    """Written from an ITK image with axes of its own, as 3D Slicer does."""
    volume = source(tmp_path, kind)
    mask = masks_of(volume)["liver"]
    write_nifti(tmp_path / "m.nii.gz", mask.astype(np.uint8), volume)
    image = SimpleITK.ReadImage(str(tmp_path / "m.nii.gz"))
    order = [2, 1, 0]  # column, row, slice, as ITK reads a DICOM series
    SimpleITK.WriteImage(SimpleITK.PermuteAxes(image, order), str(tmp_path / "m.nrrd"))
    code = {"CodeValue": "10200004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Liver"}
    about = {
        "ContentCreatorName": "A", "ClinicalTrialSeriesID": "1", "ClinicalTrialTimePointID": "1",
        "SeriesDescription": "s", "SeriesNumber": "300", "InstanceNumber": "1",
        "segmentAttributes": [[{
            "labelID": 1, "SegmentDescription": "liver", "SegmentLabel": "liver",
            "SegmentAlgorithmType": "MANUAL", "recommendedDisplayRGBValue": [1, 2, 3],
            "SegmentedPropertyCategoryCodeSequence": {**code, "CodeValue": "123037004"},
            "SegmentedPropertyTypeCodeSequence": code,
        }]],
    }  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(about))
    dcmqi(
        *("itkimage2segimage", "--inputImageList", tmp_path / "m.nrrd"),
        *("--inputDICOMDirectory", tmp_path / "series"),
        *("--outputDICOM", tmp_path / "q.dcm", "--inputMetadata", tmp_path / "m.json"),
    )
    _, own = read_annotated_volume(tmp_path / "series", tmp_path / "q.dcm", None)
    assert np.array_equal(own["liver"], mask)


def test_the_public_functions_read_and_write(tmp_path: Path) -> None:
    import recallseg

    volume = recallseg.read_volume(source(tmp_path, "axial") and tmp_path / "series")
    assert isinstance(volume, recallseg.Volume)
    masks = masks_of(volume)
    recallseg.write_segmentation(str(tmp_path / "x.dcm"), masks, volume)
    _, own = read_annotated_volume(tmp_path / "series", tmp_path / "x.dcm", None)
    assert all(np.array_equal(own[name], mask) for name, mask in masks.items())


def test_characters_of_a_patients_name_are_kept(tmp_path: Path) -> None:
    volume = source(tmp_path, "axial")
    header = volume.origin.header
    header.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    header.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    volume = replace(volume, origin=replace(volume.origin, header=header))
    write_dicom_seg(tmp_path / "x.dcm", masks_of(volume), volume, Algorithm("1", {}))
    assert str(pydicom.dcmread(tmp_path / "x.dcm").PatientName) == str(header.PatientName)


def test_pictures_without_a_place_are_segmented_by_reference(tmp_path: Path) -> None:
    make_slice(np.zeros((20, 16), np.uint16), Modality="DX", ImagerPixelSpacing=[0.1, 0.1]).save_as(
        tmp_path / "x.dcm", enforce_file_format=True
    )
    image = pydicom.dcmread(tmp_path / "x.dcm")
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    image.save_as(tmp_path / "x.dcm")
    mask = np.zeros((20, 16), np.uint8)
    mask[2:9, 3:5] = 1
    code = highdicom.sr.CodedConcept("10200004", "SCT", "Liver")
    description = highdicom.seg.SegmentDescription(1, "bone", code, code, "MANUAL")
    highdicom.seg.Segmentation(
        [image], mask, "BINARY", [description], "1.2.5", 1, "1.2.6", 1, "m", "m", "1", "1"
    ).save_as(tmp_path / "s.dcm")
    _, masks = read_annotated_volume(tmp_path / "x.dcm", tmp_path / "s.dcm", None)
    assert np.array_equal(masks["bone"][0], mask == 1)
