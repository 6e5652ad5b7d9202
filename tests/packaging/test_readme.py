"""The README's commands are run as they stand."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.pictures import write_pairs

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
    command = tmp_path / "bin" / "recallseg"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m recallseg "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "RECALLSEG_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README.read_text()) if kind == language]


def test_the_python_example_runs(folder: Path) -> None:
    (program,) = blocks("python")
    program += '\nassert result.masks["lesion"].shape == image.shape\nprint(result)'
    assert "demo model, not for clinical use" in run([sys.executable, "-c", program], folder)


def test_the_shell_example_runs(folder: Path) -> None:
    (script,) = blocks("sh")
    run(["bash", "-euo", "pipefail", "-c", script], folder)
    assert (folder / "out" / "disc-0.50.mask.png").is_file()
    assert (folder / "out" / "disc-0.50.json").is_file()
    assert (folder / "report" / "report.html").is_file()


def test_every_command_that_is_named_exists(folder: Path) -> None:
    named = set(re.findall(r"recallseg ((?:library |bench )?[a-z]+)", README.read_text()))
    named = {name for name in named if not name.startswith(("is ", "bundle"))}
    for name in sorted(named & {"export", "verify", "doctor", "demo"}):
        assert "Usage" in run([str(folder / "bin" / "recallseg"), *name.split(), "--help"], folder)
    assert {"library create", "segment", "evaluate", "export", "verify", "doctor"} <= named
