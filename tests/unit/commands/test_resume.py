"""``segment --resume``: what is done stays, what is not is made, anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from jsonschema_rs import ValidationError
from support.pictures import LABELS, disc, write_pairs
from support.records import check_record
from typer.testing import CliRunner

from recallseg import cli
from recallseg.engines.bundle import Bundle


def call(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--engine", "fake"])
    if result.exit_code != status:
        raise AssertionError(f"status {result.exit_code}: {result.output}") from result.exception
    return result


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs", [0.0, 0.5, 1.0])
    folder = tmp_path / "lib"
    create = ["library", "create", str(folder), "--bundle", str(fake_bundle.path)]
    assert CliRunner().invoke(cli.app, create).exit_code == 0
    call("library", "import", folder, tmp_path / "pairs", "--labels", LABELS)
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir()
    for n in range(3):
        cv2.imwrite(str(folder / f"{n}.png"), disc(0.2 + 0.1 * n).image)
    image = np.stack([disc(0.3 + 0.1 * i).image for i in range(3)], axis=-1).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "scan.nii.gz")
    return folder


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_it_goes_on_where_it_was(library: Path, new: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (library, new, "--output", out, "--k", 1)
    assert "0 of 4 are done already" in call("segment", *options, "--resume").stderr
    for file in out.glob("*.json"):
        check_record(json.loads(file.read_text()))
    first = _times(out)
    (out / "1.json").unlink()  # killed between the mask and its record
    (out / "2.mask.png").unlink()
    told = call("segment", *options, "--resume")
    assert "2 of 4 are done already and passed over" in told.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()] == [
        str(out / "1.mask.png"),
        str(out / "2.mask.png"),
    ]
    second = _times(out)
    same = ("0.mask.png", "0.json", "scan.mask.nii.gz", "scan.json")
    assert all(first[name] == second[name] for name in same)
    assert {*first} == {*second}
    assert "exists already" in call("segment", *options, status=1).stderr
    assert "exclude each other" in call(
        "segment", *options, "--resume", "--overwrite", status=2
    ).output.replace("\n", " ")


@pytest.mark.parametrize("changed", ["settings", "handling", "image", "library", "record"])
def test_what_is_of_something_else_is_not_taken_for_done(
    library: Path, new: Path, tmp_path: Path, changed: str
) -> None:
    out = tmp_path / "out"
    options = ["segment", library, new, "--output", out, "--resume"]
    call(*options, "--k", 1)
    before = _times(out)
    more: tuple[object, ...] = ("--k", 1)
    if changed == "settings":
        more = ("--k", 2)
    elif changed == "handling":
        more = ("--k", 1, "--as-stored")
    elif changed == "image":
        cv2.imwrite(str(new / "0.png"), disc(0.9).image)
    elif changed == "library":
        key = json.loads((out / "0.json").read_text())["recalled"]["disc"][0]["key"]
        call_plain = CliRunner().invoke(cli.app, ["library", "retire", str(library), key])
        assert call_plain.exit_code == 0
    else:
        (out / "0.json").write_text("{}")
        before = _times(out)
    told = " ".join(call(*options, *more, status=1).stderr.split())
    assert "is of another image, other settings or another state of the library" in told
    assert _times(out) == before


def test_the_schema_refuses_what_is_no_record(library: Path, new: Path, tmp_path: Path) -> None:
    call("segment", library, new, "--output", tmp_path / "out", "--k", 2, "--propagate", 1)
    for name in ("0.json", "scan.json"):
        record = json.loads((tmp_path / "out" / name).read_text())
        check_record(record)
        for field in ("format_version", "provenance", "quality", "pixels", "voxels"):
            if field in record:
                with pytest.raises(ValidationError):
                    check_record({key: value for key, value in record.items() if key != field})
        for wrong in ({"pixels": {}, "voxels": {}}, {"format_version": 1}, {"mask": 3}):
            with pytest.raises(ValidationError):
                check_record({**record, **wrong})
