"""The native kernels, built from this source, each content once, and loaded from there."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from support.making import build_folder, once
from support.native import SOURCE, passed

__all__ = ["NATIVE", "NVCC", "build_fatbin", "build_kernels", "build_operators"]

NATIVE = ("CMakeLists.txt", "pyproject.toml", "engines/native")
"""What every native build is made from."""

NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"))
)
"""CUDA's compiler: the machine's, or PyPI's."""


def build_kernels(config: pytest.Config) -> Any:
    """Build and return the extension module; skip where that cannot be done."""
    flags = ("-DRECALLSEG_BUILD_PIXELS=ON", "-DRECALLSEG_BUILD_CUDA=OFF")
    folder = _build(config, "recallseg_pixels", *flags)
    (file,) = folder.glob("engines/native/pixels/_native.*")
    spec = importlib.util.spec_from_file_location("_native", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_fatbin(config: pytest.Config) -> bytes:
    """Compile the CUDA kernels and return them; skip without nvcc."""
    if NVCC is None:
        pytest.skip("the CUDA kernels cannot be compiled: no nvcc; pip install nvidia-cuda-nvcc")
    flags = ("-DRECALLSEG_BUILD_CUDA=ON", f"-DRECALLSEG_NVCC={NVCC}")
    folder = _build(config, "recallseg_fatbin", "-DRECALLSEG_BUILD_PIXELS=ON", *flags)
    (file,) = folder.rglob("pixels.fatbin")
    return file.read_bytes()


def build_operators(config: pytest.Config) -> Path:
    """Build the operators for ONNX Runtime and return the library; skip likewise."""
    folder = _build(config, "recallseg_operators", "-DRECALLSEG_BUILD_OPERATORS=ON")
    (file,) = folder.rglob("_operators.so")
    return file


def _build(config: pytest.Config, target: str, *flags: str) -> Path:
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if "-DRECALLSEG_BUILD_PIXELS=ON" in flags:
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            missing.append("Python's headers")
        if importlib.util.find_spec("nanobind") is None:
            missing.append("nanobind")
    if missing:
        pytest.skip(f"{target} cannot be built here: no {', '.join(missing)}")

    def make(folder: Path) -> None:
        passed(
            *("cmake", "-S", SOURCE, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
            *("-DRECALLSEG_BUILD_CAPI=OFF", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *flags),
        )
        passed("cmake", "--build", folder, "--parallel", "2", "--target", target)

    return once(build_folder(config, target, NATIVE), make)
