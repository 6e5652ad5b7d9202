from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recallseg import Bundle
from recallseg.benchmarks.commands import bench
from recallseg.benchmarks.streams import replay
from recallseg.engines.errors import InputError


def test_every_frame_is_accounted_for(tmp_path: Path, fake_bundle: Bundle) -> None:
    done = CliRunner().invoke(
        bench,
        [
            "stream",
            str(fake_bundle.path),
            "--output",
            str(tmp_path),
            "--engine",
            "fake",
            "--rate",
            "40,80",
            "--seconds",
            "0.5",
            "--memories",
            "0,1",
            "--query-size",
            "64",
        ],
    )
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "stream.json").read_text())
    assert stored["schema"] == "recallseg-bench-stream/1"  # and is held to it
    runs = stored["runs"]
    assert [(run["rate"], run["memories"]) for run in runs] == [(40, 0), (80, 0), (40, 1), (80, 1)]
    for run in runs:
        assert run["pushed"] == run["rate"] * 0.5
        assert run["pushed"] == run["segmented"] + run["dropped"] + run["late"] + run["failed"]
        assert run["failed"] == 0
        assert len(run["latency"]["samples"]) == run["segmented"] > 0


def test_late_frames_have_no_latency(tmp_path: Path, fake_bundle: Bundle) -> None:
    done = CliRunner().invoke(
        bench,
        [
            "stream",
            str(fake_bundle.path),
            "--output",
            str(tmp_path),
            "--engine",
            "fake",
            "--rate",
            "40",
            "--seconds",
            "0.2",
            "--memories",
            "0",
            "--deadline",
            "0.001",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "none segmented" in done.output
    (run,) = json.loads((tmp_path / "stream.json").read_text())["runs"]
    assert run["latency"] is None
    assert run["late"] == run["pushed"] - run["dropped"]


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(InputError, match="positive"):
        replay(None, rate=0, seconds=1)  # type: ignore[arg-type]
