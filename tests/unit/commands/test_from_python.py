"""What a command does, the public functions do: the same files, exemplars and figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import torch
from support.dicom_series import write_series
from support.pictures import LABELS, disc, write_pairs
from typer.testing import CliRunner

import recallseg
from recallseg import Bundle, Library, Segmenter, cli
from recallseg.errors import InputError
from recallseg.runtime.formats.kinds import FORMATS, Format
from recallseg.runtime.formats.volume import Slicing

NAMES = {1: "disc", 2: "core"}
AFFINE = np.array([[-0.9, 0, 0, 40], [0, -0.8, 0, 50], [0, 0, 3.0, -20], [0, 0, 0, 1]])
NEW = ("SOPInstanceUID", "SeriesInstanceUID", "TrackingUID", "DimensionOrganizationUID")
"""Attributes that every SEG has its own of; dates and times beside."""


def call(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Path:
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as made:
        for position in (0.0, 0.4, 0.8):
            one = disc(position)
            made.add(one.image, one.masks, key=one.name)
    return tmp_path / "lib"


def stack() -> np.ndarray:
    """Slices of discs, and a bright spot that is a part of its own."""
    planes = np.stack([disc(position).image for position in (0.1, 0.3, 0.5)]).astype(np.uint16)
    planes[0, 2:4, 2:4] = 180
    return planes


def write_source(folder: Path, kind: str) -> Path:
    """Write the stack as a file or series of a kind, and return its path."""
    if kind == "dicom":
        write_series(folder / "s", stack())
        return folder / "s"
    if kind == "nifti":
        image = nibabel.Nifti1Image(stack().transpose(2, 1, 0), AFFINE)
        nibabel.save(image, folder / "s.nii.gz")
        return folder / "s.nii.gz"
    nrrd.write(
        str(folder / "s.nrrd"),
        stack().transpose(2, 1, 0),
        {
            "space": "left-posterior-superior",
            "space directions": np.diag([0.9, 0.8, 3.0]),
            "space origin": [-40.0, -50.0, -20.0],
        },
    )
    return folder / "s.nrrd"


def told(path: Path) -> Any:
    """What a segmentation's file says, but for what is new in every one of it."""
    if path.suffix != ".dcm":  # in comments, pynrrd notes the time
        return [line for line in path.read_bytes().splitlines() if not line.startswith(b"#")]
    dataset = pydicom.dcmread(path)
    assert len(dataset.SegmentSequence)

    def forget(parent: pydicom.Dataset, element: pydicom.DataElement) -> None:
        new = element.keyword in NEW or element.VR in ("DA", "TM", "DT")
        if new and element.VM == 1:
            element.value = ""

    dataset.walk(forget)
    return dataset.to_json_dict()


@pytest.mark.parametrize("clean_up", ["", "largest,holes"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("dicom", "s.seg.dcm"), ("nifti", "s.mask.nii.gz"), ("nrrd", "s.seg.nrrd")],
)
def test_a_volume_is_written_as_the_command_writes_it(
    tmp_path: Path, library: Path, kind: str, name: str, clean_up: str
) -> None:
    source = write_source(tmp_path, kind)
    options = ("--clean-up", clean_up) if clean_up else ()
    out = tmp_path / "out"
    call("segment", library, source, "--output", out, "--k", 2, "--engine", "fake", *options)
    with Segmenter(library, k=2, engine="fake") as segmenter:
        volume = recallseg.read_volume(source)
        result = recallseg.segment_volume(
            segmenter, volume, largest="largest" in clean_up, fill_holes="holes" in clean_up
        )
    assert bool(result.cleaned) is bool(clean_up)
    assert sum(int(mask.sum()) for mask in result.masks.values()) > 100
    recallseg.write_segmentation(tmp_path / name, result, volume)
    assert told(tmp_path / name) == told(out / name)
    record = json.loads((out / "s.json").read_text())
    mine = result.to_json(volume)
    for of in (record, mine):
        del of["timings_ms"]
        for one in of["slices"]:
            del one["milliseconds"]
    assert json.loads(json.dumps(mine)).items() <= record.items()


def test_an_image_is_segmented_as_the_command_does_it(tmp_path: Path, library: Path) -> None:
    cv2.imwrite(str(tmp_path / "q.png"), disc(0.5).image)
    out = tmp_path / "out"
    call("segment", library, tmp_path / "q.png", "--output", out, "--k", 2, "--engine", "fake")
    with Segmenter(library, k=2, engine="fake") as segmenter:
        result = segmenter.segment(tmp_path / "q.png")
    assert np.array_equal(cv2.imread(str(out / "q.mask.png"), -1), result.label_map)
    record, mine = json.loads((out / "q.json").read_text()), result.to_json()
    assert (
        json.loads(json.dumps({**mine, "timings_ms": 0})).items()
        <= {
            **record,
            "timings_ms": 0,
        }.items()
    )


def test_exemplars_are_imported_as_the_command_imports_them(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    write_pairs(tmp_path / "pairs", [0.0, 0.2, 0.4])
    by_command, by_python = tmp_path / "command", tmp_path / "python"
    how = ("--labels", LABELS, "--key", "{name}", "--tag", "site=a", "--engine", "fake")
    call("library", "create", by_command, "--bundle", fake_bundle.path)
    call("library", "import", by_command, tmp_path / "pairs", *how)
    with (
        Library.create(by_python, fake_bundle, engine="fake") as made,
        Library.open(by_command, engine="fake") as other,
    ):
        report = recallseg.import_exemplars(
            made, tmp_path / "pairs", labels=NAMES, key="{name}", tags={"site": "a"}
        )
        assert isinstance(report, recallseg.ImportReport)
        assert len(report.added) == 3
        assert made.digest == other.digest
        assert [one.key for one in made] == [one.key for one in other]


def test_images_are_evaluated_as_the_command_evaluates_them(tmp_path: Path, library: Path) -> None:
    write_pairs(tmp_path / "held", [0.1, 0.5])
    out, own = tmp_path / "command", tmp_path / "python"
    how = ("--labels", LABELS, "--k", "1,2", "--engine", "fake", "--spacing", "0.5,0.5")
    call("evaluate", library, tmp_path / "held", "--output", out, *how)
    with Library.open(library, engine="fake") as opened:
        found = recallseg.evaluate(
            opened, tmp_path / "held", labels=NAMES, ks=(1, 2), spacing=(0.5, 0.5)
        )
        written = found.write(own, opened, title="Evaluation of held")
    tables = []
    for folder in (own, out):
        with (folder / "cases.csv").open(newline="") as file:
            tables.append([{**row, "latency_ms": "", "group": ""} for row in csv.DictReader(file)])
    assert len(tables[0]) == 8
    assert tables[0] == tables[1]
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in out.iterdir())
    texts = [json.loads((folder / "summary.json").read_text()) for folder in (own, out)]
    assert texts[0] == json.loads(json.dumps(written))
    for text in texts:
        del text["latency_ms"], text["settings"]["finished"]
    assert texts[0] == texts[1]
    assert "disc recalled k=1: median Dice" in repr(found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.dcm", "no DICOM source|this volume has none"),
        ("x.png", "shares 4 voxels"),
        ("x.mnc", "names no format"),
        ("x.mha", "shares 4 voxels"),
        ("x.nii.gz", "shares 4 voxels"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, name: str, message: str) -> None:
    volume = recallseg.Volume(stack(), np.diag([3.0, 0.8, 0.9, 1.0]), "LPS")
    one, two = np.zeros((2, *volume.shape), bool)
    one[0, :4, :4] = two[0, 2:6, 2:6] = True
    with pytest.raises(InputError, match=message):
        recallseg.write_segmentation(tmp_path / name, {"a": one, "b": two}, volume)
    with pytest.raises(InputError, match="one slice, and the volume has 3"):
        recallseg.write_segmentation(tmp_path / "x.png", {"a": one}, volume)
    assert not [*tmp_path.iterdir()]


def test_a_format_that_is_only_read_gets_its_segmentation_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "gipl", Format((".gipl",), ".mask.nii.gz"))
    volume = recallseg.Volume(np.zeros((1, 9, 8), np.int16), np.eye(4), "LPS")
    found = {"a": np.ones(volume.shape, bool)}
    with pytest.raises(InputError, match=r"names no format.*\.mask\.nii\.gz"):
        recallseg.write_segmentation(tmp_path / "x.gipl", found, volume)
    assert not [*tmp_path.iterdir()]
    recallseg.write_segmentation(tmp_path / "x.mask.nii.gz", found, volume)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_is_a_picture_along_whichever_axis(tmp_path: Path, axis: int) -> None:
    mask = np.zeros((30, 20), bool)
    mask[3:9, 5:18] = True
    volume = recallseg.Volume(
        np.expand_dims(np.zeros(mask.shape, np.int16), axis), np.eye(4), "LPS"
    )
    given = np.expand_dims(mask, axis)
    recallseg.write_segmentation(tmp_path / "x.png", {"a": given}, volume)
    found = cv2.imread(str(tmp_path / "x.png"), -1) > 0
    upright = Slicing.of(volume).view(given, 0)
    assert np.array_equal(found, mask if axis == 0 else upright)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((3, 64, 60), bool), "is of another"),
        (np.full((3, 64, 64), 2), "values 0 and 1"),
        (np.full((3, 64, 64), 0.5), "boolean"),
        ([[1]], "a list of 1"),
    ],
)
def test_a_mask_that_is_none_of_the_volume_is_refused(
    tmp_path: Path, mask: Any, message: str
) -> None:
    volume = recallseg.Volume(stack(), np.diag([3.0, 0.8, 0.9, 1.0]), "LPS")
    with pytest.raises(InputError, match=message):
        recallseg.write_segmentation(tmp_path / "x.nii.gz", {"a": mask}, volume)


def test_a_volume_is_a_path_or_made_of_any_array(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "s", stack())
    volume = recallseg.read_volume(tmp_path / "s")
    tensor = torch.from_numpy(volume.array.astype(np.int16))
    same = recallseg.Volume(tensor, torch.from_numpy(volume.affine), volume.frame)
    assert isinstance(same.array, np.ndarray)
    with Segmenter(library, k=1, engine="fake") as segmenter:
        found = recallseg.segment_volume(segmenter, volume)
        assert recallseg.segment_volume(segmenter, str(tmp_path / "s")) == found
        assert np.array_equal(recallseg.segment_volume(segmenter, same).label_map, found.label_map)
        assert recallseg.VolumeCorrections(segmenter.library, tmp_path / "s").count == 3
        for wrong in (volume.array, None):
            with pytest.raises(InputError, match=r"Volume\(array, affine, 'RAS'\)"):
                recallseg.segment_volume(segmenter, wrong)  # type: ignore[arg-type]
    recallseg.write_segmentation(tmp_path / "x.seg.dcm", found, tmp_path / "s")
    assert pydicom.dcmread(tmp_path / "x.seg.dcm").Modality == "SEG"


def test_a_table_of_codes_is_taken_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "codes.toml").write_text(
        '["GTV"]\ntype = ["108369006", "SCT", "Neoplasm"]\n', encoding="utf-8"
    )
    write_series(tmp_path / "s", stack())
    volume = recallseg.read_volume(tmp_path / "s")
    recallseg.write_segmentation(
        tmp_path / "x.dcm", {"GTV": stack() > 100}, volume, concepts=tmp_path / "codes.toml"
    )
    (segment,) = pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
