"""A small part of the fuzzing (all of it: ``python -m fuzz``), and a test of its own."""

from __future__ import annotations

import pytest
from fuzz.campaign import Findings, run_campaign
from fuzz.mutations import FORMATS

EACH = 120


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    found = Findings()
    run_campaign(kind, EACH, 1, found)
    assert not found.findings
    assert sum(found.counts[kind].values()) == EACH
    assert found.counts[kind]["refused"] > EACH // 5
    assert found.counts[kind]["read"] > 0


@pytest.mark.parametrize(
    ("reader", "outcome"),
    [
        ("wrong_exception", "exception"),
        ("crash", "crash"),
        ("hang", "hang"),
        ("swallow", "memory"),
    ],
)
def test_a_broken_reader_is_found(reader: str, outcome: str) -> None:
    found = Findings()
    run_campaign("picture", 2, 1, found, reader=f"fuzz.broken_readers:{reader}", seconds=0.5)
    assert found.counts["picture"] == {outcome: 2}
    assert len(found.findings) == 2
