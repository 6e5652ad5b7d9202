"""The native kernels, built from this source and loaded from where they were built."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from support.native import SOURCE, passed

__all__ = ["NVCC", "build_fatbin", "build_kernels", "build_operators"]

NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"))
)
"""CUDA's compiler: the machine's, or PyPI's."""


def build_kernels(folder: Path) -> Any:
    """Build into ``folder`` and return the extension module; skip where that cannot be done."""
    _build(folder, "recallseg_pixels", "-DRECALLSEG_BUILD_PIXELS=ON", "-DRECALLSEG_BUILD_CUDA=OFF")
    (file,) = folder.glob("engines/native/pixels/_native.*")
    spec = importlib.util.spec_from_file_location("_native", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_fatbin(folder: Path) -> bytes:
    """Compile the CUDA kernels into ``folder`` and return them; skip without nvcc."""
    if NVCC is None:
        pytest.skip("the CUDA kernels cannot be compiled: no nvcc; pip install nvidia-cuda-nvcc")
    flags = ("-DRECALLSEG_BUILD_CUDA=ON", f"-DRECALLSEG_NVCC={NVCC}")
    _build(folder, "recallseg_fatbin", "-DRECALLSEG_BUILD_PIXELS=ON", *flags)
    (file,) = folder.rglob("pixels.fatbin")
    return file.read_bytes()


def build_operators(folder: Path) -> Path:
    """Build the operators for ONNX Runtime into ``folder``, return the library; skip likewise."""
    _build(folder, "recallseg_operators", "-DRECALLSEG_BUILD_OPERATORS=ON")
    (file,) = folder.rglob("_operators.so")
    return file


def _build(folder: Path, target: str, *flags: str) -> None:
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if "-DRECALLSEG_BUILD_PIXELS=ON" in flags:
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            missing.append("Python's headers")
        if importlib.util.find_spec("nanobind") is None:
            missing.append("nanobind")
    if missing:
        pytest.skip(f"{target} cannot be built here: no {', '.join(missing)}")
    passed(
        *("cmake", "-S", SOURCE, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DRECALLSEG_BUILD_CAPI=OFF", *flags),
    )
    passed("cmake", "--build", folder, "--parallel", "2", "--target", target)
