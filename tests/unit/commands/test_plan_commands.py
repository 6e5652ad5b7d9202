"""``recallseg build`` and ``cache`` as a person and a program meet them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fake_tensorrt import HostGpu, make_tensorrt
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.registry import load_engines
from recallseg.engines.tensorrt import building, loading
from recallseg.engines.verification import verify_engines


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = make_tensorrt("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(building, "open_device", HostGpu.open)
    monkeypatch.setattr(loading, "open_device", HostGpu.open)
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path / "cache"))
    return module


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_build_verify_list_clear(api: Any) -> None:
    done = run("build", "demo", "--engine", "tensorrt", "--max-k", "8", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["verified"]
    assert answer["profile"] == {"n": [1, 1, 4], "k": [1, 4, 8]}
    assert [plan["graph"] for plan in answer["plans"]] == [
        "embed",
        "encode",
        "memorize",
        "attend",
        "decode",
        "correct",
    ]
    listed = json.loads(run("cache", "list", "--json").stdout)["plans"]
    assert len(listed) == 6
    assert {tuple(plan["states"].values()) for plan in listed} == {("verified",)}
    text = run("cache", "list").stdout
    assert "verified on sm87 Stand-in, driver 12.6" in text
    bundle = Bundle.open("demo")  # in this process, where the stand-in is
    assert verify_engines(bundle, load_engines(bundle, "tensorrt"), "fp32").passed
    assert "was in the cache" in run("build", "demo", "--engine", "tensorrt", "--max-k", "8").stdout
    cleared = json.loads(run("cache", "clear", "--engine", "tensorrt", "--stale", "--json").stdout)
    assert cleared["plans"] == 0
    assert json.loads(run("cache", "clear", "--json").stdout)["plans"] == 6
    assert "0 plans" in run("cache", "list").stdout


def test_a_refused_build_is_a_failure(api: Any) -> None:
    api.spoil = lambda name, array, inputs: array * 2 if name == "skip0" else array
    done = run("build", "demo", "--engine", "tensorrt")
    assert done.exit_code == 1
    assert "'skip0' of graph 'encode' is off by" in done.stderr
    assert "refused" in run("cache", "list").stdout


def test_without_a_gpu_that_is_said(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("recallseg.engines.device.device.PROVIDERS", ())
    monkeypatch.setitem(sys.modules, "tensorrt", api)
    done = run("build", "demo", "--engine", "tensorrt")
    assert done.exit_code == 1
    assert "cuda-bindings nor PyCUDA" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("build", "demo", "--engine", "fake"), 2, "not for 'fake'"),
        (("build", "demo", "--engine", "tensorrt", "--target", "sm86"), 2, "no target sm86"),
        (("build", "demo", "--engine", "tensorrt", "--target", "a,a"), 2, "twice"),
        (("build", "demo", "--engine", "tensorrt", "--max-k", "64"), 1, "k up to 64"),
        (("build", "demo", "--engine", "tensorrt", "--max-n", "1"), 1, "golden case"),
        (("build", "demo", "--engine", "tensorrt", "--precision", "fp16"), 1, "fp16"),
        (("build", "nowhere", "--engine", "tensorrt"), 1, "no bundle"),
        (("cache", "clear", "--stale"), 2, "--engine"),
    ],
)
def test_wrong_calls(api: Any, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == status
    assert words in " ".join(done.stderr.replace("│", " ").split())
