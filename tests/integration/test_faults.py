"""A part of the campaign of injected faults; ``python -m faults`` is the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux")
TESTS = Path(__file__).parents[1]


def campaign(output: Path, *options: str, report: str, module: str = "faults") -> dict[str, Any]:
    python_path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", module, "--output", output, *options],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((output / report if report else output).read_text())
    return found


@pytest.mark.parametrize(
    ("only", "every", "outcome", "least"),
    [("library.", 61, "LibraryWriteError", 35), ("archive", 40, "exit", 5)],
)
def test_no_single_fault_of_the_system_harms_what_is_stored(
    tmp_path: Path, only: str, every: int, outcome: str, least: int
) -> None:
    options = ("--every", str(every), "--only", only)
    found = campaign(tmp_path, *options, report="faults.json")
    assert found["counts"]["cases"] == found["counts"]["fired"] >= found["points"] / every > 20
    assert found["counts"][outcome] > least  # they do reach what is done
    before = (tmp_path / "points.jsonl").read_text().count('"fired"')
    campaign(tmp_path, *options, report="faults.json")
    assert (tmp_path / "points.jsonl").read_text().count('"fired"') == before  # it went on


def test_no_power_cut_takes_what_was_acknowledged(tmp_path: Path) -> None:
    found = campaign(tmp_path, "--cuts", "160", "--seed", "3", report="power.json")
    assert sum(found["counts"].values()) >= 160


@pytest.mark.parametrize(
    ("options", "counted", "least"),
    [
        (("kills", "--count", "6", "--only", "library.add"), "hit", 6),
        (("threads", "--seconds", "2", "--threads", "4", "--processes", "3"), "searched", 10),
    ],
)
def test_nothing_from_outside_harms_a_library(
    tmp_path: Path, options: tuple[str, ...], counted: str, least: int
) -> None:
    found = campaign(tmp_path / "found.json", *options, report="", module="campaigns.harm")
    assert found["violations"] == []
    assert found["counts"][counted] >= least
