"""A result's files are all there or none of them is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recallseg.engines.durable import replace_file
from recallseg.runtime.services.outputs import mask_file, no_halves, record_file


def write(base: Path) -> None:
    replace_file(mask_file(base), b"mask")
    replace_file(record_file(base), b"{}")


def fail_after(act: Callable[[Path], None], base: Path) -> None:
    act(base)
    raise OSError(errno.EIO, "the folder could not be synced")


def test_a_record_whose_name_may_not_survive_goes_with_its_mask(tmp_path: Path) -> None:
    base = tmp_path / "case"
    with pytest.raises(OSError, match="synced"), no_halves(base, mask_file(base)):
        fail_after(write, base)
    assert os.listdir(tmp_path) == []


def test_what_was_there_before_a_failure_stays(tmp_path: Path) -> None:
    base = tmp_path / "case"
    write(base)
    with pytest.raises(OSError, match="synced"), no_halves(base, mask_file(base)):
        fail_after(lambda _: None, base)
    assert sorted(os.listdir(tmp_path)) == ["case.json", "case.mask.png"]
