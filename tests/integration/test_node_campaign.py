"""Short ones of the long runs in ``campaigns.node``."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaigns.node import hostile, kills, latency, load
from support.dicom_peers import DCMTK, ORTHANC

pytestmark = [DCMTK, ORTHANC, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECALLSEG_STATE", "")  # the campaign sets both; they come back after it
    monkeypatch.setenv("RECALLSEG_CACHE", "")


def test_every_acknowledged_series_is_answered_whatever_is_killed(tmp_path: Path) -> None:
    found = kills(tmp_path, 8)
    assert not found["broken"], found
    assert found["exit"] == 0


def test_many_associations_lose_nothing(tmp_path: Path) -> None:
    found = load(tmp_path, 400, 20)
    assert not found["broken"], found


def test_hostile_peers_cost_little_and_stop_nobody(tmp_path: Path) -> None:
    found = hostile(tmp_path, 500)
    assert not found["broken"], found


def test_answers_are_quick(tmp_path: Path) -> None:
    found = latency(tmp_path, 4)
    assert not found["broken"], found
