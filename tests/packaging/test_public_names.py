"""What a user may import from ``recallseg``, and that examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest

import recallseg
from recallseg import errors

MODULES_WITH_EXAMPLES = (
    "recallseg",
    "recallseg.errors",
    "recallseg.runtime.arrays",
    "recallseg.runtime.formats.images",
    "recallseg.runtime.library.library",
    "recallseg.runtime.library.upkeep",
)


def test_every_public_name_is_there() -> None:
    wanted = {
        *("Bundle", "Model", "Library", "Segmenter", "Recipe", "Provenance", "Result", "Score"),
        *("Stream", "Frame", "Volume", "Intensity", "GpuOptions", "open_device", "read_image"),
        *("read_volume", "segment_volume", "write_segmentation", "import_exemplars"),
        *("evaluate", "errors"),
    }
    for name in wanted:
        assert getattr(recallseg, name) is not None
        assert name in dir(recallseg)
    assert sorted(recallseg.__all__) == sorted(dir(recallseg))
    for name in recallseg.__all__:
        assert hasattr(recallseg, name)


def test_errors_are_found_where_tracebacks_say() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert (kind.__module__, kind.__qualname__) == ("recallseg.errors", name)
    error = pickle.loads(pickle.dumps(errors.InputError("no such image")))
    assert isinstance(error, errors.InputError)
    assert recallseg.RecallSegError is errors.RecallSegError


def test_a_repr_says_where_its_class_is_found() -> None:
    volume = recallseg.Volume(np.zeros((2, 3, 4), np.int16), np.eye(4), "RAS")
    assert repr(volume).startswith("recallseg.Volume(")


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"np": np, **{public: getattr(recallseg, public) for public in recallseg.__all__}}
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs=known, optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed
