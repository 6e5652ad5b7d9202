"""Both implementations of the pixels' door, the native one at every level this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from recallseg.engines.pixels.native import NativePixels


@pytest.fixture(params=["best", "baseline"])
def native(kernels: Any, request: pytest.FixtureRequest) -> Iterator[NativePixels]:
    best = kernels.level()
    kernels.choose(best if request.param == "best" else "baseline")
    yield NativePixels(kernels)
    kernels.choose(best)
