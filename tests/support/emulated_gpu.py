"""A stand-in for a device's kernels: it records launches, and runs the CUDA source on the CPU."""

from __future__ import annotations

import ctypes as c
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.making import build_folder, once
from support.native import SOURCE, passed

__all__ = ["KERNELS", "EmulatedKernels", "OnDevice", "build_emulator", "emulated_kernels"]

KERNELS = (
    "recallseg_clear",
    "recallseg_histogram",
    "recallseg_refine",
    "recallseg_coarse",
    "recallseg_rank",
    "recallseg_rank_low",
    "recallseg_spans",
    "recallseg_prepare",
    "recallseg_finish",
    "recallseg_gather_half",
    "recallseg_gather_int8",
    "recallseg_gather_float",
)


def emulated_kernels(emulator: c.CDLL) -> dict[str, Any]:
    """Return what a FakeDriver runs in the place of the pixel kernels."""

    def kernel(name: str) -> Any:
        def run(grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> None:
            places = (c.c_void_p * len(arguments))(*map(c.addressof, arguments))
            three = c.c_uint32 * 3
            assert emulator.emulate(
                name.encode(), three(*grid), three(*block), len(arguments), places
            )

        return run

    return {name: kernel(name) for name in KERNELS}


def build_emulator(config: pytest.Config) -> c.CDLL:
    """Compile the kernels for the CPU with undefined behaviour trapped; skip without a compiler."""
    if shutil.which("c++") is None:
        pytest.skip("the CUDA kernels cannot be emulated here: no C++ compiler")
    source, pixels = Path(__file__).with_suffix(".cpp"), SOURCE / "engines/native/pixels"

    def make(folder: Path) -> None:
        passed(
            *("c++", "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall"),
            *("-Wextra", "-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
            *("-I", pixels, "-o", folder / "emulated_gpu.so", source),
        )

    folder = once(build_folder(config, "emulated-gpu", (__file__, source, pixels)), make)
    library = c.CDLL(str(folder / "emulated_gpu.so"))
    library.emulate.restype = c.c_bool
    return library


@dataclass
class OnDevice:
    """A numpy array that passes for one on the device."""

    array: NDArray[Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.array.__array_interface__)


@dataclass
class EmulatedKernels:
    """Runs what is launched, and keeps name, grid, block and stream of every launch."""

    library: c.CDLL
    launches: list[tuple[str, tuple[int, int, int], tuple[int, int, int], Any]] = field(
        default_factory=list
    )

    def put(self, array: NDArray[Any]) -> OnDevice:
        return OnDevice(array)

    def fetch(self) -> None:
        """Results are where they should be."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        stream: Any,
        shared_bytes: int = 0,
    ) -> None:
        assert shared_bytes == 0
        assert np.prod(block) <= 1024
        assert all(size >= 1 for size in grid)
        assert grid[1] <= 65535
        self.launches.append((name, grid, block, stream))
        places = (c.c_void_p * len(arguments))(*(c.addressof(value) for value in arguments))
        three = c.c_uint32 * 3
        assert self.library.emulate(
            name.encode(), three(*grid), three(*block), len(arguments), places
        )
