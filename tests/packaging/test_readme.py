"""The README's commands are run as they stand."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_series
from support.pictures import disc, write_pairs

from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg import Algorithm, write_segmentation

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"<!-- run -->\n```(\w+)\n(.*?)```", re.DOTALL)


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
    command = tmp_path / "bin" / "recallseg"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m recallseg "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return tmp_path


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
    write_segmentation(folder / "seg.dcm", masks, volume, Algorithm("another's", {}))


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "RECALLSEG_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(language: str, page: Path = README) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def test_the_commands_of_the_security_page_run(folder: Path) -> None:
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    for text in blocks("sh", README.parent / "docs" / "device" / "security.md"):
        run(["bash", "-euc", text], folder)
    assert "our-bundle" in {path.name for path in folder.iterdir()}


def test_the_commands_of_the_integration_page_run(folder: Path) -> None:
    for text in blocks("sh", README.parent / "docs" / "device" / "integration.md"):
        run(["bash", "-euc", text], folder)


def test_the_commands_of_the_libraries_page_run(folder: Path) -> None:
    (text,) = blocks("sh", README.parent / "docs" / "use" / "libraries.md")
    told = run(["bash", "-euc", text], folder)
    assert "rename_structure from: core; to: centre; 6 exemplars" in told


def test_the_commands_of_the_archive_page_run(folder: Path) -> None:
    (text,) = blocks("sh", README.parent / "docs" / "device" / "archive.md")
    told = run(["bash", "-euc", text], folder)
    assert "2 done, 0 set aside" in told
    assert '"before": 2' in told
    assert (folder / "archived" / "summary.parquet").is_file()


def test_the_python_example_runs(folder: Path) -> None:
    (program,) = blocks("python")
    program += '\nassert result.masks["lesion"].shape == image.shape\nprint(result)'
    assert "demo model, not for clinical use" in run([sys.executable, "-c", program], folder)


def test_the_shell_example_runs(folder: Path) -> None:
    images, volumes = blocks("sh")
    run(["bash", "-euo", "pipefail", "-c", images], folder)
    assert (folder / "out" / "disc-0.50.mask.png").is_file()
    assert (folder / "out" / "disc-0.50.json").is_file()
    assert (folder / "report" / "report.html").is_file()
    told = run(["bash", "-euo", "pipefail", "-c", volumes], folder)
    assert "1 entry" in told
    assert (folder / "seg" / "series.seg.dcm").is_file()
    assert (folder / "seg" / "series.preview.html").is_file()
    assert len(list((folder / "outbox" / "room 2").glob("MR-3-*.seg.dcm"))) == 1


def test_every_command_that_is_named_exists(folder: Path) -> None:
    named = set(re.findall(r"recallseg ((?:library |bench )?[a-z]+)", README.read_text()))
    named = {name for name in named if not name.startswith(("is ", "bundle"))}
    for name in sorted(named & {"export", "verify", "doctor", "demo"}):
        assert "Usage" in run([str(folder / "bin" / "recallseg"), *name.split(), "--help"], folder)
    assert {"library create", "segment", "evaluate", "export", "verify", "doctor"} <= named
