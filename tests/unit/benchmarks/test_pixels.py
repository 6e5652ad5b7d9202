"""``bench pixels``: its figures, and that ways which disagree are not compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from recallseg.benchmarks import pixels as bench
from recallseg.benchmarks.commands import bench as commands
from recallseg.engines.errors import EngineUnavailableError, RecallSegError


def test_every_way_is_measured(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "recallseg.engines.pixels._native", kernels)
    done = CliRunner().invoke(commands, ["pixels", "--output", str(tmp_path), "--rounds", "20"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "pixels.json").read_text())
    assert record["schema"] == "recallseg-bench-pixels/1"  # and is held to it
    ways = {(row["work"], row["way"]) for row in record["measured"]}
    assert len({work for work, _ in ways}) == 7
    for work in {work for work, _ in ways}:
        assert {(work, "native"), (work, "opencv"), (work, "copy")} <= ways
    for row in record["measured"]:
        assert len(row["time"]["samples"]) == 20
        assert row["low"] <= row["speedup"] <= row["high"]
        assert row["way"] != "native" or row["speedup"] == 1
    assert "native is" in done.output


def test_different_results_are_an_error() -> None:
    def zeros() -> list[Any]:
        return [np.zeros(4, np.float32)]

    case = bench._Case("nothing", 64, {"native": zeros, "opencv": lambda: [np.ones(4, np.float32)]})
    with pytest.raises(RecallSegError, match="native and opencv"):
        list(bench._measure(case, 20))


def test_without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "native_kernels", lambda: None)
    with pytest.raises(EngineUnavailableError, match="not built"):
        bench.pixels(tmp_path)
