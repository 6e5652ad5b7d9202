"""From DICOM, NIfTI and NRRD in to SEG, label map and segments out, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from support.dicom_series import ORIENTATIONS, write_series

from recallseg import Bundle, Library
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    annotated_slices,
    read_annotated_volume,
)
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg import Algorithm, write_dicom_seg
from recallseg.runtime.formats.dicom_seg_reading import read_segmentation
from recallseg.runtime.formats.nrrd import read_seg_nrrd, write_seg_nrrd
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.volumes.slices import clean_up, segment_volume

SHAPE = (6, 64, 48)


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """A bright bar in the upper half of slices 1 to 4, and its mask: [slice, row, column].

    The bar keeps to the 4x4 cells of the fake engine's features, so its mask can come back whole.
    """
    array = np.full(SHAPE, 300, np.uint16)
    mask = np.zeros(SHAPE, bool)
    mask[1:5, 0:32, 12:36] = True
    array[mask] = 2000
    array += np.arange(SHAPE[2], dtype=np.uint16)  # left and right differ
    array += np.arange(SHAPE[0], dtype=np.uint16)[:, None, None]  # and so do all slices
    return array, mask


def run(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "recallseg", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    array, mask = phantom()
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as made:
        made.add(array[2], {"bar": mask[2]})
        made.add(array[0], {}, absent=("bar",))
    return tmp_path / "lib"


@pytest.mark.parametrize("plane", list(ORIENTATIONS))
def test_dicom_to_seg_and_back(tmp_path: Path, library: Path, plane: str) -> None:
    array, mask = phantom()
    write_series(tmp_path / "series", array, orientation=ORIENTATIONS[plane])
    run(
        *("segment", library, tmp_path / "series", "--output", tmp_path / "out", "--k", 1),
        *("--engine", "fake", "--preview", "--audit", tmp_path / "log"),
    )
    out = tmp_path / "out"
    record = json.loads((out / "series.json").read_text())
    assert record["plane"] == plane
    assert record["millilitres"]["bar"] == pytest.approx(
        record["voxels"]["bar"] * 3 * 0.8 * 0.9 / 1000, abs=1e-3
    )
    segmentation = highdicom.seg.segread(out / "series.seg.dcm")
    found = read_annotated_volume(tmp_path / "series", out / "series.seg.dcm", None)[1]["bar"]
    assert (found != mask).mean() < 0.01
    assert not found[0].any()
    assert not found[5].any()
    algorithm = segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    made = record["provenance"]
    assert made["recipe"]["bundle_identity"][:16] in algorithm.AlgorithmVersion
    assert made["library_digest"][:16] in algorithm.AlgorithmVersion
    for text in (
        f"provenance={made['digest']}",
        f"recipe={made['recipe']['digest']}",
        f"library={made['library_digest']}",
        "memories=fake fp32: 2",
        "reach=3",
    ):
        assert text in algorithm.AlgorithmParameters
    (entry,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert entry["provenance"] == made
    assert entry["voi"] is record["voi"] is False
    assert record["format_version"] == 2
    assert segmentation.PatientID == "secret-77"  # a SEG belongs to its patient,
    assert "secret" not in (tmp_path / "log").read_text()  # a log does not
    assert "Doe" not in (out / "series.json").read_text()
    assert (out / "series.preview.png").stat().st_size > 1000
    assert "<script" not in (out / "series.preview.html").read_text()


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs Debian's dicom3tools")
def test_a_seg_is_valid_dicom(tmp_path: Path, library: Path) -> None:
    array, _ = phantom()
    write_series(tmp_path / "series", array)
    run("segment", library, tmp_path / "series", "--output", tmp_path, "--k", 1, "--engine", "fake")
    done = subprocess.run(
        ["dciodvfy", str(tmp_path / "series.seg.dcm")], capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert not errors, errors


def test_a_seg_of_other_images_is_refused(tmp_path: Path, library: Path) -> None:
    array, _ = phantom()
    for name in ("one", "other"):
        write_series(tmp_path / name, array)
    run("segment", library, tmp_path / "one", "--output", tmp_path, "--k", 1, "--engine", "fake")
    with pytest.raises(InputError, match="other images"):
        read_segmentation(tmp_path / "one.seg.dcm", read_dicom(tmp_path / "other"))


def test_nothing_found_gives_no_seg(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "series", np.zeros((2, 20, 20), np.uint16))
    volume = read_dicom(tmp_path / "series")
    with Library.open(library) as opened:
        result = segment_volume(Segmenter(opened, k=1, engine="fake"), volume)
    empty = {name: np.zeros(volume.shape, bool) for name in result.labels}
    with pytest.raises(InputError, match="no empty SEG"):
        write_dicom_seg(tmp_path / "x.dcm", empty, volume, Algorithm("1", {}))
    assert not (tmp_path / "x.dcm").exists()


def nifti(path: Path, array: np.ndarray) -> Path:
    """Slices along the third axis, head up, patient's right on the left: as the phantom is."""
    affine = np.array([[-0.9, 0, 0, 5], [0, -0.8, 0, 6], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return path


def test_nifti_in_and_out(tmp_path: Path, library: Path) -> None:
    array, mask = phantom()
    nifti(tmp_path / "scan.nii.gz", array)
    run(
        *("segment", library, tmp_path / "scan.nii.gz", "--output", tmp_path / "out", "--k", 1),
        *("--engine", "fake", "--propagate", 1),
    )
    image = nibabel.load(tmp_path / "out" / "scan.mask.nii.gz")
    assert np.allclose(image.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    found = np.asanyarray(image.dataobj).transpose(2, 1, 0) == 1
    assert (found != mask).mean() < 0.01
    assert "exists already" in run(
        *("segment", library, tmp_path / "scan.nii.gz", "--output", tmp_path / "out", "--k", 1),
        *("--engine", "fake"),
        status=1,
    )


def test_exemplars_from_a_series_with_its_seg(tmp_path: Path, library: Path) -> None:
    array, mask = phantom()
    write_series(tmp_path / "series", array)
    run("segment", library, tmp_path / "series", "--output", tmp_path, "--k", 1, "--engine", "fake")
    shutil.move(tmp_path / "series.seg.dcm", tmp_path / "series" / "seg.dcm")
    answer = run(
        *("library", "import", library, tmp_path / "series", "--engine", "fake", "--json"),
        *("--slices", "every:2", "--tag", "site=A"),
    )
    added = json.loads(answer)["added"]
    assert list(added) == ["series-axial-0001", "series-axial-0003"]
    with Library.open(library) as opened:
        exemplar = opened.get(added["series-axial-0003"])
        assert exemplar.key != "series-axial-0003"  # what a file is called names nobody here
        assert dict(exemplar.tags) == {
            **{"modality": "MR", "body_part": "HEAD", "site": "A"},
            "spacing_mm": "0.8x0.9",
        }
        image, masks = opened.source(exemplar.key)
    assert np.array_equal(image, array[3])
    assert (masks["bar"] != mask[3]).mean() < 0.01


def test_exemplars_from_nifti_and_slicer(tmp_path: Path, library: Path) -> None:
    array, mask = phantom()
    folder = tmp_path / "volumes"
    folder.mkdir()
    nifti(folder / "a.nii.gz", array + 50)  # slices that the library does not hold yet
    nifti(folder / "a.mask.nii.gz", mask.astype(np.uint8))
    nifti(folder / "b.nii", array + 100)
    image = nibabel.load(folder / "b.nii")
    like = Volume(np.asanyarray(image.dataobj), image.affine, "RAS")
    write_seg_nrrd(folder / "b.seg.nrrd", {"bar": mask.transpose(2, 1, 0)}, like)
    assert [name for name, _ in read_seg_nrrd(folder / "b.seg.nrrd")[1]] == ["bar"]
    answer = json.loads(
        run(
            *("library", "import", library, folder, "--engine", "fake", "--json"),
            *("--labels", "1=bar", "--slices", "different:2", "--empty"),
        )
    )
    assert len(answer["added"]) == 4
    assert {key.rpartition("-")[0] for key in answer["added"]} == {"a-axial", "b-axial"}


def test_slices_that_differ_are_chosen() -> None:
    volume = Volume(
        np.arange(6, dtype=np.int16)[:, None, None] * np.ones((6, 4, 4), np.int16),
        np.diag([5.0, 1, 1, 1]),
        "LPS",
    )
    masks = {"all": np.ones(volume.shape, bool)}

    def embed(image: np.ndarray) -> np.ndarray:
        angle = float(image[0, 0]) * np.pi / 12
        return np.array([np.cos(angle), np.sin(angle)], np.float32)

    known = embed(np.zeros((1, 1)))[None]
    chosen = annotated_slices(
        volume, masks, "v", SliceChoice.parse("different:2"), embed=embed, known=known
    )
    assert [int(each.image[0, 0]) for each in chosen] == [2, 5] or [
        int(each.image[0, 0]) for each in chosen
    ] == [3, 5]
    with pytest.raises(InputError, match="every:5"):
        SliceChoice.parse("some")


def test_a_segmentation_on_another_grid_is_refused(tmp_path: Path) -> None:
    array, mask = phantom()
    nifti(tmp_path / "a.nii.gz", array)
    image = nibabel.load(tmp_path / "a.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 1
    labels = mask.astype(np.uint8).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(labels, moved), tmp_path / "moved.nii.gz")
    scale = np.diag([1.5, 1.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(labels, image.affine @ scale), tmp_path / "wide.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels * 3, image.affine), tmp_path / "three.nii.gz")
    for name, message in {
        "moved": "0.10 mm beside",
        "wide": "0.9 x 0.8 x 3",
        "three": "label 3",
    }.items():
        with pytest.raises(InputError, match=message):
            read_annotated_volume(tmp_path / "a.nii.gz", tmp_path / f"{name}.nii.gz", {1: "bar"})
    with pytest.raises(InputError, match="--labels"):
        read_annotated_volume(tmp_path / "a.nii.gz", tmp_path / "three.nii.gz", None)


def test_clean_up_says_what_it_changed(tmp_path: Path, library: Path) -> None:
    array, _ = phantom()
    volume = Volume(array, np.diag([3.0, 0.8, 0.9, 1.0]), "LPS")
    with Library.open(library) as opened:
        result = segment_volume(Segmenter(opened, k=1, engine="fake"), volume)
    label_map = np.zeros(SHAPE, np.uint8)
    label_map[1:5, 10:30, 10:30] = 1
    label_map[2:4, 15:20, 15:20] = 0  # a hole of 50
    label_map[0, 50:52, 40:42] = 1  # a stray part of 4
    changed = clean_up(
        type(result)(**{**vars(result), "label_map": label_map}), largest=True, fill_holes=True
    )
    change = changed.cleaned["bar"]
    assert (change.parts_removed, change.voxels_removed, change.voxels_filled) == (1, 4, 50)
    assert int((changed.label_map == 1).sum()) == 4 * 20 * 20


def test_a_cine_without_a_place_becomes_nifti(tmp_path: Path, library: Path) -> None:
    from support.dicom_series import make_slice

    array, _ = phantom()
    dataset = make_slice(array[0], Modality="US", NumberOfFrames=6)
    dataset.PixelData = array.astype("<u2").tobytes()
    dataset.save_as(tmp_path / "cine.dcm", enforce_file_format=True)
    run(
        "segment",
        library,
        tmp_path / "cine.dcm",
        "--output",
        tmp_path,
        "--k",
        1,
        "--engine",
        "fake",
    )
    assert nibabel.load(tmp_path / "cine.mask.nii.gz").shape == SHAPE
    assert json.loads((tmp_path / "cine.json").read_text())["millilitres"] is None


def test_patients_are_not_named_by_errors(tmp_path: Path, library: Path) -> None:
    paths = write_series(tmp_path / "series", phantom()[0])
    dataset = pydicom.dcmread(paths[0])
    del dataset.ImagePositionPatient
    dataset.save_as(paths[0])
    message = run(
        *("segment", library, tmp_path / "series", "--output", tmp_path / "out", "--k", 1),
        *("--engine", "fake"),
        status=1,
    )
    assert "ImagePositionPatient" in message
    assert "Doe" not in message
    assert "secret" not in message


def test_nothing_is_sent_anywhere(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "in" / "series", phantom()[0])
    program = (
        "import sys\n"
        "def refuse(event, _):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        raise SystemExit('something reached for the network')\n"
        "sys.addaudithook(refuse)\n"
        "from recallseg.cli import main\n"
        "sys.exit(main())\n"
    )
    options = ["--output", tmp_path / "out", "--k", 1, "--engine", "fake", "--preview"]
    for arguments in (
        ["segment", library, tmp_path / "in" / "series", *options],
        ["watch", tmp_path / "in", "--library", library, *options, "--once", "--settle", 0],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
