"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from recallseg.commands import common


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(common, "monotonic", lambda: now)
    with common.progress_bar("Segmenting", 100) as step:
        for second in range(25):
            now = float(second)
            step(f"case {second}", 0.5)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "Segmenting: 6 of 100, 0.55/s, 2:52 min left, case 10",
        "Segmenting: 10 of 100, 0.53/s, 2:50 min left, case 20",
    ]
