"""A wheel with the native pixel kernels; the CUDA kernels for every architecture."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.kernels import NVCC, build_fatbin
from support.native import SOURCE, passed

PROBE = """
import sys
sys.path += {site!r}
from recallseg.engines.pixels import open_pixels
print(open_pixels())
"""


@pytest.mark.slow
def test_a_wheel_with_kernels(tmp_path: Path) -> None:
    if importlib.util.find_spec("nanobind") is None or shutil.which("c++") is None:
        pytest.skip("native pixel kernels cannot be built here: no nanobind or C++ compiler")
    passed(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"),
        *("--wheel-dir", tmp_path, "-C", "wheel.cmake=true", SOURCE),
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{tag}-{tag}-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", "librecallseg.so"))]
    assert bool(NVCC) == ("recallseg/engines/pixels/pixels.fatbin" in names)
    assert "recallseg/engines/_operators.so" in names
    passed(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"),
        *("--target", tmp_path / "site", wheel),
    )
    site = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROBE.format(site=site)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("NativePixels(vector units: ")


def test_cuda_for_every_architecture(pytestconfig: pytest.Config) -> None:
    found = parts(build_fatbin(pytestconfig))
    wanted = {("elf", arch) for arch in (75, 80, 86, 87, 89, 90, 100, 110, 120)} | {("ptx", 120)}
    assert set(found) == wanted


def test_cuda_for_what_an_older_compiler_knows(tmp_path: Path) -> None:
    if importlib.util.find_spec("nanobind") is None or shutil.which("c++") is None:
        pytest.skip("native pixel kernels cannot be built here: no nanobind or C++ compiler")
    nvcc = tmp_path / "nvcc"  # as that of CUDA 12.6, on a Jetson
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 50 75 80 86 87 89 90\n")
    nvcc.chmod(0o755)
    command = [
        *("cmake", "-S", SOURCE, "-DRECALLSEG_BUILD_PIXELS=ON", f"-DRECALLSEG_NVCC={nvcc}"),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    done = passed(*command, "-B", tmp_path / "default", cwd=tmp_path)
    assert "CUDA kernels for 7.5;8.0;8.6;8.7;8.9;9.0\n" in done
    named = "-DRECALLSEG_CUDA_ARCHITECTURES=8.7"
    done = passed(*command, named, "-B", tmp_path / "named", cwd=tmp_path)
    assert "CUDA kernels for 8.7\n" in done


def parts(fatbin: bytes) -> list[tuple[str, int]]:
    """Kinds and compute capabilities of a fatbin's parts."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50
    assert header + size == len(fatbin)
    found, at = [], header
    while at < len(fatbin):
        kind, _, length, payload = struct.unpack_from("<HHIQ", fatbin, at)
        (arch,) = struct.unpack_from("<I", fatbin, at + 28)
        found.append(({1: "ptx", 2: "elf"}[kind], arch))
        at += length + payload
    return found
