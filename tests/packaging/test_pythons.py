"""Every Python that is supported, and the wheels of an aarch64 machine. Slow: run with -m slow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SMOKE = """
import sys
import numpy as np
from recallseg import Bundle, Library, Segmenter
rng = np.random.default_rng(0)
mask = np.zeros((90, 120), bool)
mask[30:60, 40:90] = True
image = rng.normal(100, 5, mask.shape) + 60 * mask
with Library.create("library", Bundle.open("demo")) as library:
    for shift in (0, 5, 10, 15):
        library.add(np.roll(image, shift, 1), {"a": np.roll(mask, shift, 1)})
    result = Segmenter(library, k=4).segment(np.roll(image, 7, 1))
found, expected = result.masks["a"], np.roll(mask, 7, 1)
dice = 2 * (found & expected).sum() / (found.sum() + expected.sum())
assert dice > 0.8, dice
import onnxruntime
print(sys.version_info[:2], np.__version__, onnxruntime.__version__, round(dice, 3))
"""

pytestmark = pytest.mark.slow


def interpreter(version: str) -> str | None:
    """Return a Python that truly starts (a version manager's shim may not)."""
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(homes.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        done = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
        )
        if done.stdout.strip() == version:
            return str(candidate)
    return None


def installed(version: str, extras: str, folder: Path) -> Path:
    """Install into a new environment; return its interpreter, or skip without that Python."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    own = folder / "venv" / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "-q", f"{SOURCE}[{extras}]"], check=True)
    return own


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", PYTHONS)
def test_the_runtime_works_from_a_fresh_install(version: str, tmp_path: Path) -> None:
    own = installed(version, "cpu", tmp_path)
    done = subprocess.run([own, "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", PYTHONS)
def test_the_unit_tests_of_what_a_device_runs_pass(version: str, tmp_path: Path) -> None:
    """All that need no PyTorch: graphs are exported elsewhere."""
    own = installed(version, "test", tmp_path)
    rooms = [SOURCE / "tests" / "unit" / room for room in ("commands", "engines", "runtime")]
    torch = re.compile(r"^(import torch|from recallseg\.(export|benchmarks))", re.MULTILINE)
    left = [f for room in rooms for f in room.rglob("test_*.py") if torch.search(f.read_text())]
    assert 0 < len(left) < 10
    done = subprocess.run(
        [
            *(own, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *rooms),
            *("-m", "not gpu and not slow", f"--basetemp={tmp_path / 'tests'}"),
            *(f"--ignore={file}" for file in left),
        ],
        cwd=SOURCE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    print(done.stdout)


@pytest.mark.parametrize("version", PYTHONS)
def test_every_need_has_a_wheel_for_aarch64(version: str, tmp_path: Path) -> None:
    glibc = ("2_28", "2_27", "2_17", "2014")
    platforms = [
        f"--platform=manylinux{'' if tag == '2014' else '_'}{tag}_aarch64" for tag in glibc
    ]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"),
            *("--only-binary=:all:", "--target", tmp_path, "--implementation", "cp"),
            *("--python-version", version, *platforms),
            *("numpy>=1.26", "opencv-python-headless>=4.8", "platformdirs", "rich", "typer>=0.12"),
            *(
                "usearch>=2.16,<2.25",
                "onnxruntime>=1.20" if version == "3.10" else "onnxruntime>=1.24",
            ),
        ],
        check=True,
    )
