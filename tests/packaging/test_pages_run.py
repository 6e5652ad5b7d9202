"""Blocks of pages that are marked to be run, as they stand."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_series
from support.pages import ROOT, blocks, pages
from support.pictures import disc, write_pairs

from recallseg import Library
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg import Algorithm, write_dicom_seg

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "use" / "tutorial.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the commands speak of, and a ``recallseg`` of this interpreter."""
    write_pairs(tmp_path / "annotated", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    write_pairs(tmp_path / "held-out", [0.3, 0.7])
    write_pairs(tmp_path / "pairs", [0.5])
    (tmp_path / "new").mkdir()
    (tmp_path / "pairs" / "disc-0.50.png").rename(tmp_path / "new" / "disc-0.50.png")
    write_annotated_series(tmp_path / "annotated-series")
    write_series(tmp_path / "series", disc_volume(0.4)[0])
    write_series(tmp_path / "inbox" / "room 2", disc_volume(0.6)[0])
    install(tmp_path, "recallseg", f'"{sys.executable}" -m recallseg')
    install(tmp_path, "python", f'"{sys.executable}"')
    return tmp_path


def install(folder: Path, name: str, call: str) -> None:
    command = folder / "bin" / name
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


def disc_volume(start: float) -> tuple[np.ndarray, np.ndarray]:
    """Slices with a disc that moves, the last one without, and their label map."""
    discs = [disc(start + 0.02 * i) for i in range(4)]
    image = np.stack([each.image for each in discs]).astype(np.uint16) * 8
    labels = np.stack([each.masks["disc"] + 2 * each.masks["core"] for each in discs])
    image[3], labels[3] = image[3].min(), 0
    return image, labels.astype(np.uint8)


def write_annotated_series(folder: Path) -> None:
    """A series with its SEG beside, as another workstation would leave it."""
    image, labels = disc_volume(0.2)
    write_series(folder, image)
    volume = read_dicom(folder)
    masks = {"disc": labels == 1, "core": labels == 2}
    write_dicom_seg(folder / "seg.dcm", masks, volume, Algorithm("another's", {}))


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "RECALLSEG_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(page: Path, folder: Path) -> list[str]:
    """Run a page's blocks from its top in one folder; return what each printed."""
    told = []
    for block in blocks(page):
        if block.run:
            shell = ["bash", "-euo", "pipefail", "-c"]
            call = [sys.executable, "-c"] if block.language == "python" else shell
            told.append(run([*call, block.text], folder))
    return told


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in pages()
        if page not in (README, TUTORIAL) and any(block.run for block in blocks(page))
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_run(page: Path, folder: Path) -> None:
    told = run_page(page, folder)
    if page.name == "libraries.md":
        assert "rename_structure from: core; to: centre; 6 exemplars" in told[0]
    if page.name == "archive.md":
        assert "2 done, 0 set aside" in told[0]
        assert '"before": 2' in told[0]
        assert (folder / "archived" / "summary.parquet").is_file()
    if page.name == "security.md":
        assert "our-bundle" in {path.name for path in folder.iterdir()}


def test_the_readme_runs(folder: Path) -> None:
    asked, told = run_page(README, folder)
    assert int(asked.split()[0]) > 0
    assert (folder / "out" / "disc-0.50.mask.png").is_file()
    assert (folder / "out" / "disc-0.50.json").is_file()
    assert (folder / "report" / "report.html").is_file()
    assert "1 entry" in told
    assert (folder / "seg" / "series.seg.dcm").is_file()
    assert (folder / "seg" / "series.preview.html").is_file()
    assert len(list((folder / "outbox" / "room 2").glob("MR-3-*.seg.dcm"))) == 1


def test_the_tutorial_runs(folder: Path) -> None:
    shutil.rmtree(folder / "annotated")
    shutil.rmtree(folder / "held-out")
    shutil.rmtree(folder / "new")
    run_page(TUTORIAL, folder)
    with Library.open(folder / "brain") as library:
        assert len(library) == 12
        assert library.structures == ("grey matter", "white matter")
    for name in ("axial-017", "axial-064", "axial-111"):
        record = json.loads((folder / "out" / f"{name}.json").read_text())
        assert record["quality"]["flag"] in ("ok", "suspect")  # and no more "uncalibrated"
    with (folder / "report" / "cases.csv").open() as rows:
        dice = [
            float(row["dice"]) for row in csv.DictReader(rows) if row["structure"] == "grey matter"
        ]
    assert len(dice) == 6
    assert np.median(dice) > 0.8
    text = TUTORIAL.read_text()
    for named in re.findall(r"new/(axial-\d+)\.png", text):
        assert (folder / "new" / f"{named}.png").is_file()
