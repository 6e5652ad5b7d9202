"""A wheel and an editable install, each used from a folder unrelated to the source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
MOST_INSTALLED = 46e6
"""Bytes of recallseg[cpu] beside its dependencies, compiled files included."""
SITE = [path for path in sys.path if path.endswith("site-packages")]
PROBE = f"""
import importlib, sys
sys.path += {SITE!r}  # numpy and the like; its .pth files, and so recallseg, are not read
import recallseg
for room in ("engines", "runtime", "export", "benchmarks"):
    importlib.import_module("recallseg." + room)
import recallseg.engines.specs, recallseg.runtime.segmenting.result
print(recallseg.__version__, recallseg.engines.specs.__file__)
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"),
        *("--wheel-dir", folder, SOURCE),
        cwd=folder,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_room_and_no_test(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "recallseg/__init__.py",
        "recallseg/py.typed",
        "recallseg/engines/specs.py",
        "recallseg/commands/segment.py",
        "recallseg/runtime/segmenting/segmenter.py",
        "recallseg/export/graphs.py",
        "recallseg/benchmarks/__init__.py",
    ):
        assert expected in names
    assert not [name for name in names if "test" in name.split("/")[0] or "__pycache__" in name]
    makers = ("recallseg/benchmarks/makers/", "recallseg/export/demo_model/")
    assert not [
        name for name in names if name.startswith(makers) or name.endswith("device/fake.py")
    ]
    assert wheel.name.endswith("py3-none-any.whl")


def test_an_installed_wheel_works_from_an_unrelated_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        sys.executable,
        *("-m", "pip", "install", "--no-deps", "--quiet", "--target", target, wheel),
        cwd=elsewhere,
    )
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert size < MOST_INSTALLED, f"{size / 1e6:.1f} MB"
    env = {**os.environ, "PYTHONPATH": str(target)}
    printed = run(sys.executable, "-S", "-c", PROBE, cwd=elsewhere, env=env)
    assert str(target) in printed


def test_an_editable_install_works_from_an_unrelated_folder(tmp_path: Path) -> None:
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(
        sys.executable,
        *("-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"),
        *("--quiet", "--editable", SOURCE),
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(SITE)},  # the build backend is there
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    printed = run(python, "-c", PROBE, cwd=elsewhere, env=env)
    assert str(SOURCE / "engines") in printed
