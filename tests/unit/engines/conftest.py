"""Fixtures for engines."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(params=[0, 1, 2])
def level(operators_file: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The library at each of its levels of vector units."""
    loaded = ctypes.CDLL(str(operators_file))
    if request.param >= loaded.recallseg_operators_levels():
        pytest.skip("this processor has fewer levels of vector units")
    loaded.recallseg_operators_choose(request.param)
    yield operators_file
    loaded.recallseg_operators_choose(0)
