"""``scripts/jetson`` on boards that are folders, and the guide that goes with it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from recallseg.engines.budget import PRESETS

ROOT = Path(__file__).parents[2]


def run(*arguments: str, root: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JETSON_ROOT": str(root)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        [str(ROOT / "scripts" / "jetson"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def board(path: Path, release: str) -> Path:
    (path / "etc").mkdir(parents=True)
    (path / "proc" / "device-tree").mkdir(parents=True)
    (path / "etc" / "nv_tegra_release").write_text(
        f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed\n"
    )
    (path / "proc" / "device-tree" / "model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    (path / "proc" / "meminfo").write_text(
        "MemTotal:        7802472 kB\nMemAvailable:    5000000 kB\nSwapTotal:       3901232 kB\n"
    )
    return path


def tools(path: Path) -> str:
    """A python that has TensorRT and RecallSeg, and a power tool."""
    path.mkdir()
    for name, text in (
        ("python3", 'case "$*" in *--version*) echo Python 3.10.12;; *) echo 10.3.0;; esac'),
        ("nvpmodel", "echo NV Power Mode: 15W"),
    ):
        (path / name).write_text(f"#!/bin/sh\n{text}\n")
        (path / name).chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("release", "words"),
    [
        ("R36 (release), REVISION: 4.3", "6 (Jetson Linux 36.4.3)"),
        ("R38 (release), REVISION: 2.1", "7 (Jetson Linux 38.2.1)"),
    ],
)
def test_check_says_what_is_there(tmp_path: Path, release: str, words: str) -> None:
    done = run("check", root=board(tmp_path / "b", release), path=tools(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout
    assert "NVIDIA Jetson Orin Nano" in done.stdout
    assert "10.3.0" in done.stdout
    assert "15W" in done.stdout
    assert re.search(r"MemTotal\s+7\.4 GiB", done.stdout)


def test_check_names_what_is_missing(tmp_path: Path) -> None:
    folder = board(tmp_path / "b", "R35 (release), REVISION: 4.1")
    path = tools(tmp_path / "bin")
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    done = run("check", root=folder, path=path)
    assert done.returncode == 1
    assert "MISSING: 6 or 7; this is Jetson Linux 35.4.1" in done.stdout
    assert "python3-libnvinfer" in done.stdout


@pytest.mark.parametrize("command", [("check",), ("setup", "x"), ("fast",), ("swap", "4")])
def test_elsewhere_nothing_is_done(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(*command, root=tmp_path)
    assert done.returncode == 1
    assert "this is no Jetson" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [(), ("help",), ("setup",), ("swap",)])
def test_wrong_calls(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert run(*command, root=board(tmp_path / "b", "R36 (release), REVISION: 4.3")).returncode == 2


def test_the_guide_and_the_presets_agree() -> None:
    guide = (ROOT / "docs" / "device" / "jetson.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"\| `(jetson-\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\w+) \| (\d+) GiB \|", guide
    )
    assert {
        name: (int(side), int(k), int(n), precision, int(memory) << 30)
        for name, side, k, n, precision, memory in rows
    } == {p.name: (p.image_size, p.k, p.n, p.precision, p.memory) for p in PRESETS.values()}
