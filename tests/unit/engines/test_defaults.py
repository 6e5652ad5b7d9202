"""Defaults are said once in Python; the C interface, the command line and the docs say the same."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import recallseg.engines
from recallseg import Segmenter
from recallseg.engines import defaults
from recallseg.engines.tensorrt.profile import Profile
from recallseg.runtime.model.model import Model

NATIVE = Path(recallseg.engines.__file__).parent / "native" / "capi"


def test_python_uses_them() -> None:
    asked: dict[str, Any] = dict(inspect.signature(Segmenter).parameters)
    assert asked["k"].default == defaults.K == Profile().k.usual
    opened: dict[str, Any] = dict(inspect.signature(Model.open).parameters)
    assert opened["engine"].default == defaults.ENGINE
    assert opened["precision"].default == defaults.PRECISION


@pytest.mark.skipif(not NATIVE.is_dir(), reason="the sources of the C interface are not here")
def test_c_uses_the_same() -> None:
    header = (NATIVE / "include" / "recallseg.h").read_text()
    assert re.findall(r'/\* .*null: "(\w+-\w+)" \*/', header) == [defaults.ENGINE] * 2
    assert f"at most; 0: {defaults.K} */" in header
    source = (NATIVE / "src" / "library.cpp").read_text()
    assert set(re.findall(r'text_or\(\w+\.engine, "([^"]+)"\)', source)) == {defaults.ENGINE}
    assert set(re.findall(r'text_or\(\w+\.precision, "([^"]+)"\)', source)) == {defaults.PRECISION}
    assert re.findall(r"k == 0 \? (\d+)", source) == [str(defaults.K)]
