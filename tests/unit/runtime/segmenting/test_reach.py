"""Which of the recalled exemplars are within reach."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.reach import SAME, within_reach

RECALLED = st.lists(
    st.builds(
        Match,
        key=st.text(max_size=3),
        distance=st.floats(-1e-7, 2.0),
        absent=st.booleans(),
    ),
    max_size=20,
)
REACHES = st.floats(1.0, 1e6)


@given(RECALLED, REACHES)
def test_the_nearest_stays_and_nobody_beyond_the_reach(recalled: list[Match], reach: float) -> None:
    found = within_reach(recalled, reach)
    shown = [r.distance for r in recalled if not r.absent]
    if not shown:
        assert found == tuple(recalled)
        return
    assert min(r.distance for r in found if not r.absent) == min(shown)
    limit = reach * max(min(shown), SAME)
    assert found == tuple(r for r in recalled if not r.distance > limit)


@given(RECALLED)
def test_an_infinite_reach_keeps_all(recalled: list[Match]) -> None:
    assert within_reach(recalled, math.inf) == tuple(recalled)


@given(RECALLED, REACHES, REACHES)
def test_a_longer_reach_keeps_at_least_as_many(
    recalled: list[Match], one: float, other: float
) -> None:
    near, far = sorted((one, other))
    assert set(within_reach(recalled, near)) <= set(within_reach(recalled, far))
