"""Short ones of the long runs in ``campaigns.inline``: the commands, each as a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaigns.inline import igtl_hostile, mrd_hostile


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECALLSEG_STATE", "RECALLSEG_CACHE"):
        monkeypatch.setenv(name, "")  # the campaign sets both; they come back after it


def test_damaged_mrd_streams_end_and_others_are_answered(tmp_path: Path) -> None:
    assert mrd_hostile(tmp_path, 60)["broken"] == 0


def test_openigtlink_headers_that_lie(tmp_path: Path) -> None:
    found = igtl_hostile(tmp_path, 120)
    assert found["broken"] == 0
    assert found["memory grew, MB"] < 100
