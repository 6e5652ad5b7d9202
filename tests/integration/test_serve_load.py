"""Many clients, sessions that nobody closes, and requests that lie: nobody else suffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.annotating import serving
from support.serve_load import abandoning, lying

from recallseg.runtime.services.http.limits import Limits

SMALL = Limits(liveness_s=0.5, image_bytes=1 << 26)


@pytest.mark.parametrize(
    "count", [150, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_requests_that_lie_kill_nothing_and_others_are_served(tmp_path: Path, count: int) -> None:
    with serving(tmp_path, limits=Limits(image_bytes=1 << 26)) as served:
        told = lying(served, count)
        assert told["alive"]
        assert not told["others_failed"]
        assert told["others_served"]
        assert not {status for status in told["statuses"] if status >= 500} - {503}
        changes = [json.loads(line) for line in served.audit.read_text().splitlines()]
        grown = sum(
            len(one["exemplars"]) - len(one.get("instead_of", ()))
            for one in changes
            if one["event"] == "accept"
        )
        assert len(served.desk.library) == 4 + grown, "what was well-formed, and recorded"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sessions_that_are_left_take_no_memory(tmp_path: Path) -> None:
    with serving(tmp_path, limits=SMALL) as served:
        memory = abandoning(served, 1000)
    assert max(memory[2:]) - memory[1] < 10
