"""Folders as people have them, through the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import generate_uid
from support.dicom_series import write_object, write_picture, write_series
from support.inside import HereDecoder
from support.pictures import LABELS, disc, write_pairs
from typer.testing import CliRunner

from recallseg import cli
from recallseg.engines.bundle import Bundle
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.library import Library
from recallseg.runtime.services import watching

SR = "1.2.840.10008.5.1.4.1.1.88.33"


def call(*arguments: object, status: int = 0, cwd: Path | None = None) -> Any:
    here = Path.cwd()
    os.chdir(cwd or here)
    try:
        result = CliRunner().invoke(cli.app, [*map(str, arguments), "--engine", "fake"])
    finally:
        os.chdir(here)
    if result.exit_code != status:
        raise AssertionError(f"status {result.exit_code}: {result.output}") from result.exception
    return result


@pytest.fixture(autouse=True)
def decoder_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads takes longer to start than a watch here."""
    monkeypatch.setattr(watching, "IsolatedDecoder", HereDecoder)


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs", [0.0, 0.5, 1.0])
    folder = tmp_path / "lib"
    arguments = ["library", "create", str(folder), "--bundle", str(fake_bundle.path)]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    call("library", "import", folder, tmp_path / "pairs", "--labels", LABELS)
    return folder


def library_bundle(library: Path) -> Path:
    with Library.open(library) as opened:
        return opened.bundle.path


def planes(count: int = 3) -> np.ndarray:
    shown = [disc(0.3 + 0.1 * i).image.astype(np.uint16) for i in range(count)]
    return np.stack(shown)


def records(out: Path) -> dict[str, Any]:
    found = (path for path in out.rglob("*.json") if not path.name.endswith(".error.json"))
    return {str(p.relative_to(out).with_suffix("")): json.loads(p.read_bytes()) for p in found}


def test_a_dot_is_the_folder(library: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", planes())
    call("segment", library, ".", "--output", "../out", "--k", 1, cwd=tmp_path / "ct")
    (record,) = records(tmp_path / "out").values()
    assert list(records(tmp_path / "out")) == ["ct"]
    assert record["image"] == "ct"
    assert record["shape"] == [3, 64, 64]
    named = tmp_path / "ct" / ".." / "ct"
    call("segment", library, named, "--output", tmp_path / "again", "--k", 1)
    assert list(records(tmp_path / "again")) == ["ct"]


def test_a_report_and_a_thumbnail_beside_a_series(library: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "scan", planes())
    write_object(tmp_path / "scan" / "SR.dcm", SR)
    cv2.imwrite(str(tmp_path / "scan" / "thumbnail.jpg"), disc(0.4).image)
    told = call("segment", library, tmp_path / "scan", "--output", tmp_path / "out", "--k", 1)
    assert sorted(records(tmp_path / "out")) == ["scan", "thumbnail"]
    assert "passed over, Comprehensive SR, not an image" in told.output
    found = call(
        "segment", library, tmp_path / "scan", "--output", tmp_path / "strict", "--k", 1,
        "--strict", "--json", status=1,
    )  # fmt: skip
    answer = json.loads(found.stdout)
    assert len(answer["results"]) == 2
    assert list(answer["passed_over"]) == [str(tmp_path / "scan" / "SR.dcm")]


def test_nothing_but_a_report_is_an_error_that_says_so(library: Path, tmp_path: Path) -> None:
    report = write_object(tmp_path / "scan" / "SR.dcm", SR)
    for path in (report, report.parent):
        told = call("segment", library, path, "--output", tmp_path / "out", status=1)
        assert "no image in" in told.output
        assert "Comprehensive SR" in told.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["segment", "watch"])
def test_views_of_one_series(library: Path, tmp_path: Path, command: str) -> None:
    series = generate_uid()
    for i in range(2):
        write_picture(tmp_path / "in" / f"v{i}.dcm", series, planes(2)[i], Modality="DX")
    out = tmp_path / "out"
    if command == "segment":
        call("segment", library, tmp_path / "in", "--output", out, "--k", 1)
        assert sorted(records(out)) == ["v0", "v1"]
    else:
        call("watch", library, tmp_path / "in", "--output", out, "--k", 1,
             "--once", "--settle", 0)  # fmt: skip
    assert [record["shape"] for record in records(out).values()] == [[1, 64, 64]] * 2
    masks = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted(out.rglob("*.mask.png"))]
    assert len(masks) == 2
    assert all(mask.shape == (64, 64) for mask in masks)


def exemplars(library: Path) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Return sources by name, all but those that the library began with."""
    with Library.open(library) as opened:
        named = {opened.whois(exemplar.key).name: exemplar.key for exemplar in opened}
        return {name: opened.source(key) for name, key in named.items() if name[:5] != "disc-"}


def test_a_photograph_that_was_turned(library: Path, tmp_path: Path) -> None:
    """EXIF orientation 3 in the image, none in the mask, which was drawn as viewers show it."""
    shown = disc(0.0).image
    exif = Image.Exif()
    exif[274] = 3
    (tmp_path / "in").mkdir()
    Image.fromarray(shown[::-1, ::-1]).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    Image.fromarray((shown > 170).astype(np.uint8)).save(tmp_path / "in" / "a.mask.png")
    call("library", "import", library, tmp_path / "in", "--labels", "1=disc")
    ((image, masks),) = exemplars(library).values()
    assert image[masks["disc"]].mean() > 170
    assert image[~masks["disc"]].mean() < 120
    told = call("segment", library, tmp_path / "in" / "a.jpg", "--output", tmp_path / "out")
    assert told.exit_code == 0
    arguments = ["library", "create", str(tmp_path / "l2"), "--bundle"]
    CliRunner().invoke(cli.app, [*arguments, str(library_bundle(library))])
    call("library", "import", tmp_path / "l2", tmp_path / "in", "--labels", "1=disc", "--as-stored")
    ((image, masks),) = exemplars(tmp_path / "l2").values()
    assert image[masks["disc"]].mean() < 170  # as asked for


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_films_whose_zero_is_white(library: Path, tmp_path: Path, dtype: type) -> None:
    shown = disc(0.0).image.astype(dtype) * (1 if dtype is np.uint8 else 200)
    highest = np.iinfo(dtype).max
    (tmp_path / "in").mkdir()
    stored = shown if dtype is np.uint8 else highest - shown  # Pillow inverts 8 bits, not 16
    Image.fromarray(stored).save(tmp_path / "in" / "w.tif", tiffinfo={262: 0})
    Image.fromarray((disc(0.0).image > 170).astype(np.uint8)).save(tmp_path / "in" / "w.mask.png")
    call("library", "import", library, tmp_path / "in", "--labels", "1=disc")
    ((image, masks),) = exemplars(library).values()
    np.testing.assert_array_equal(image, shown)
    assert image[masks["disc"]].min() > image[~masks["disc"]].max()


def test_what_an_import_leaves_out_is_named(library: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        volume = nibabel.Nifti1Image(planes().astype(np.int16), np.eye(4))
        nibabel.save(volume, tmp_path / f"{name}.nii.gz")
    drawn = nibabel.Nifti1Image((planes() > 170).astype(np.uint8), np.eye(4))
    (tmp_path / "in").mkdir()
    for file in ("a", "b"):
        shutil.move(tmp_path / f"{file}.nii.gz", tmp_path / "in")
    nibabel.save(drawn, tmp_path / "in" / "a.mask.nii.gz")
    nibabel.save(drawn, tmp_path / "in" / "b_mask.nii.gz")  # misnamed
    write_pairs(tmp_path / "in" / "pictures", [0.2])
    told = call("library", "import", library, tmp_path / "in", "--labels", LABELS)
    assert "2 images have no label map or segmentation and were left out" in told.output
    assert "in/b.nii.gz" in told.output
    assert "in/b_mask.nii.gz" in told.output
    keys = set(exemplars(library)) | {"pictures"}
    assert any(key.startswith("a-") for key in keys)
    found = call(
        "library", "import", library, tmp_path / "in", "--labels", LABELS, "--strict", "--json",
        status=1,
    )  # fmt: skip
    assert len(json.loads(found.stdout)["unlabelled"]) == 2


def test_evaluate_takes_what_import_takes(library: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "in.png"), disc(0.3).image)
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "in.png", tmp_path / "in" / "a.png")
    for name, mask in disc(0.3).masks.items():
        cv2.imwrite(str(tmp_path / "in" / f"a.mask.{name}.png"), mask.astype(np.uint8) * 255)
    cv2.imwrite(str(tmp_path / "in" / "alone.png"), disc(0.4).image)
    told = call("evaluate", library, tmp_path / "in", "--output", tmp_path / "out", "--k", 1)
    assert "1 images have no label map or segmentation and were left out" in told.output
    assert "alone.png" in told.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["structures"]


def dynamic(path: Path, times: int = 3) -> Path:
    """Write a NIfTI of several volumes, whose disc lies elsewhere in each."""
    volumes = [np.stack([disc(0.2 + 0.3 * t).image.T] * 2, axis=-1) for t in range(times)]
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.stack(volumes, axis=-1), np.diag([1, 1, 3, 1])), path)
    return path


def test_a_watcher_is_told_which_of_several_volumes(library: Path, tmp_path: Path) -> None:
    scan = dynamic(tmp_path / "in" / "dyn.nii.gz")

    def watch(out: str, *more: object, status: int = 0) -> str:
        told = call("watch", library, scan.parent, "--output", tmp_path / out,
                    "--k", 1, "--once", "--settle", 0, *more, status=status)  # fmt: skip
        return str(told.output)

    assert "--time 1 to 3" in watch("out", status=1)
    assert "failed" not in watch("out")  # set aside, and not met again
    assert "set aside before: dyn.nii.gz" in watch("out", "--strict", status=1)
    watch("out", "--time", 2)  # another question than the one that failed
    assert list(records(tmp_path / "out")) == ["dyn"]
    assert not list((tmp_path / "out").glob("*.error.json"))
    watch("out", "--time", 3)
    assert records(tmp_path / "out")["dyn"]["notes"][0] == "volume 3 of 3"
    assert "dyn.nii.gz  " not in watch("out", "--time", 3)
    watch("out", "--time", 2)
    watch("all", "--time", 1)  # is not all of them
    assert list(records(tmp_path / "all")) == ["dyn"]
    watch("all", "--time", "all")
    (tmp_path / "all" / "dyn.json").unlink()
    names = [f"dyn.time{time}" for time in (1, 2, 3)]
    assert sorted(records(tmp_path / "all")) == names
    call("segment", library, scan, "--output", tmp_path / "by hand", "--k", 1, "--time", "all")

    def mask(folder: str, name: str) -> np.ndarray:
        return np.asarray(nibabel.load(tmp_path / folder / f"{name}.mask.nii.gz").dataobj)

    for name in names:
        np.testing.assert_array_equal(mask("all", name), mask("by hand", name))
    np.testing.assert_array_equal(mask("out", "dyn"), mask("by hand", "dyn.time2"))
    assert not np.array_equal(mask("all", "dyn.time1"), mask("all", "dyn.time3"))
    assert "dyn.nii.gz  " not in watch("all", "--time", "all")  # all of them are there
    (tmp_path / "all" / "dyn.time2.json").unlink()
    assert watch("all", "--time", "all").count("dyn.nii.gz  ") == 3


def test_a_watcher_is_told_which_stack_and_format(library: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in", planes())
    cv2.imwrite(str(tmp_path / "in" / "a.png"), disc(0.4).image)
    arguments = ("watch", tmp_path / "in", "--library", library, "--k", 1, "--once", "--settle", 0)
    told = call(*arguments, "--output", tmp_path / "out", "--format", "image", "--strict", "--json",
                status=1)  # fmt: skip
    assert list(records(tmp_path / "out")) == ["a"]
    *_, last = told.stdout.splitlines()
    assert "dicom, not image" in json.loads(last)["passed_over"].values()
    call(*arguments, "--output", tmp_path / "none", "--format", "dicom", "--stack", 5, status=1)
    call(*arguments, "--output", tmp_path / "one", "--format", "dicom", "--stack", 1)
    assert [record["shape"] for record in records(tmp_path / "one").values()] == [[3, 64, 64]]
    call(*arguments, "--output", tmp_path / "x", "--format", "jpeg", status=2)
    call(*arguments, "--output", tmp_path / "x", "--time", "0", status=2)


def annotated_series(folder: Path, positions: tuple[float, ...]) -> None:
    """Write a series, and the label map of its disc beside it, with axes of its own."""
    shown = [disc(position) for position in positions]
    write_series(folder, np.stack([each.image.astype(np.uint16) for each in shown]))
    label = np.stack([each.masks["disc"].T for each in shown], axis=-1)
    affine = read_volume(folder).affine[:, [2, 1, 0, 3]]
    affine[:2] *= -1  # NIfTI is RAS
    nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), affine), f"{folder}.mask.nii.gz")


def test_volumes_are_evaluated_slice_by_slice_and_whole(library: Path, tmp_path: Path) -> None:
    annotated_series(tmp_path / "in" / "p1", (0.1, 0.3, 0.6))
    annotated_series(tmp_path / "in" / "p2", (0.2, 0.55))
    write_series(tmp_path / "in" / "alone", planes())
    write_object(tmp_path / "in" / "SR.dcm", SR)
    cv2.imwrite(str(tmp_path / "in" / "bare.png"), disc(0.4).image)
    arguments = ("evaluate", library, tmp_path / "in", "--labels", "1=disc", "--output",
                 tmp_path / "out", "--k", 1, "--json")  # fmt: skip
    found = json.loads(call(*arguments).stdout)
    with open(tmp_path / "out" / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["volume"]) for row in rows] == [
        *((f"p1-axial-000{i}", "p1") for i in range(3)),
        *((f"p2-axial-000{i}", "p2") for i in range(2)),
    ]
    assert found["unit"] == "mm"
    assert {v["volume"]: v["slices"] for v in found["volumes"]} == {"p1": 3, "p2": 2}
    call("segment", library, tmp_path / "in" / "p1", "--output", tmp_path / "seg", "--k", 1,
         "--structures", "disc")  # fmt: skip
    volume, masks = read_annotated_volume(
        tmp_path / "in" / "p1", tmp_path / "seg" / "p1.seg.dcm", None
    )
    predicted = masks["disc"]
    _, truth = read_annotated_volume(
        tmp_path / "in" / "p1", tmp_path / "in" / "p1.mask.nii.gz", {1: "disc"}
    )
    dice = 2 * (predicted & truth["disc"]).sum() / (predicted.sum() + truth["disc"].sum())
    (whole,) = [v["dice"] for v in found["volumes"] if v["volume"] == "p1"]
    assert whole == pytest.approx(dice)
    assert 0 < whole < 1
    pixel = volume.spacing[1] * volume.spacing[2]
    sizes = [float(row["reference_volume"]) for row in rows[:3]]
    assert sizes == pytest.approx([n * pixel for n in truth["disc"].sum(axis=(1, 2))])
    assert sorted(found["unlabelled"]) == [str(tmp_path / "in" / n) for n in ("alone", "bare.png")]
    assert list(found["passed_over"]) == [str(tmp_path / "in" / "SR.dcm")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Volumes as a whole" in page
    call(*arguments, "--strict", status=1)


def test_evaluate_leaves_nothing_out_in_silence(library: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_pairs(tmp_path / "in", [0.3])
    cv2.imwrite(str(tmp_path / "in" / "other.png"), disc(0.6).image)
    other = disc(0.6).masks["disc"].astype(np.uint8) * 255
    cv2.imwrite(str(tmp_path / "in" / "other.mask.spleen.png"), other)
    arguments = ("evaluate", library, tmp_path / "in", "--labels", LABELS, "--missing", "unknown",
                 "--output", tmp_path / "out", "--k", 1, "--structures", "disc")  # fmt: skip
    told = call(*arguments)
    assert "1 say nothing of disc and were left out: other" in told.output
    found = json.loads(call(*arguments, "--json", "--strict", status=1).stdout)
    assert found["unmentioned"] == ["other"]
    assert found["passed_over"] == {}
    assert "other" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "in" / "disc-0.30.png").unlink()
    (tmp_path / "in" / "disc-0.30.mask.png").unlink()
    assert "no image says anything of disc: other" in call(*arguments, status=1).output
    write_pairs(tmp_path / "in", [0.3])
    (tmp_path / "in" / "other.png").unlink()
    (tmp_path / "in" / "other.mask.spleen.png").unlink()
    call(*arguments, "--strict")


def test_distances_of_volumes_without_a_size_are_asked_for(library: Path, tmp_path: Path) -> None:
    annotated_series(tmp_path / "in" / "p1", (0.1, 0.3))
    write_pairs(tmp_path / "in" / "pictures", [0.3])
    arguments = ("evaluate", library, tmp_path / "in", "--labels", LABELS, "--output",
                 tmp_path / "out", "--k", 1, "--json")  # fmt: skip
    assert json.loads(call(*arguments).stdout)["unit"] == "pixels"
    assert json.loads(call(*arguments, "--spacing", "0.5,0.5").stdout)["unit"] == "mm"


NAMES = [b"r\xf6ntgen", b"\xff", "日本".encode(), b"line\nbreak", b"a'b\"c;d", b"x" * 240]


def test_file_names_of_any_bytes(library: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate([*NAMES, b"z"]):
        cv2.imwrite(str(tmp_path / "one.png"), disc(0.1 * i).image)
        shutil.move(tmp_path / "one.png", tmp_path / "in" / os.fsdecode(name + b".png"))
    for output, command in (("out", "segment"), ("out2", "watch")):
        arguments = {
            "segment": ["segment", library, tmp_path / "in"],
            "watch": ["watch", library, tmp_path / "in", "--once", "--settle", 0],
        }[command]
        environment = {**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [sys.executable, "-m", "recallseg", *map(str, arguments), "--output",
             str(tmp_path / output), "--k", "1", "--engine", "fake"],
            capture_output=True, env=environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        done.stdout.decode(), done.stderr.decode()  # both are UTF-8
        found = {os.fsencode(record["image"]) for record in records(tmp_path / output).values()}
        assert found == {name + b".png" for name in [*NAMES, b"z"]}
    assert (tmp_path / "out" / os.fsdecode(b"r\xf6ntgen.mask.png")).is_file()


def test_names_that_are_cleaned_alike_keep_apart(library: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate(["a;b", "a_b", "a:b", "a|b", " a_b"]):
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), disc(0.1 * i).image)
    call("segment", library, tmp_path / "in", "--output", tmp_path / "out", "--k", 1)
    found = records(tmp_path / "out")
    assert sorted(r["image"] for r in found.values()) == sorted(
        ["a;b.png", "a_b.png", "a:b.png", "a|b.png", " a_b.png"]
    )
    assert found["a_b"]["image"] == "a_b.png"


def test_the_former_way_to_call_watch_still_works(tmp_path: Path, library: Path) -> None:
    pairs = tmp_path / "new"
    pairs.mkdir()
    cv2.imwrite(str(pairs / "a.png"), disc(0.3).image)
    options = ("--output", tmp_path / "out", "--k", 1, "--once", "--settle", 0)
    told = call("watch", pairs, "--library", library, *options)
    assert "is written 'watch LIB IN' now" in " ".join(told.stderr.split())
    assert any((tmp_path / "out").iterdir())
    for words in ([pairs], [library, pairs, "--library", library]):
        assert "watch LIB IN" in call("watch", *words, *options, status=2).output
