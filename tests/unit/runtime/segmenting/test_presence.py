from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.presence import LEAST_SHARE, presence_share


def recalled(*votes: tuple[float, bool]) -> list[Match]:
    """Exemplars at a distance, and whether each shows the structure."""
    return [Match(f"e{i}", distance, not shown) for i, (distance, shown) in enumerate(votes)]


def test_the_nearest_decide_and_not_the_most() -> None:
    assert presence_share(recalled((0.1, True), (0.5, False), (0.5, False))) > 0.9
    assert presence_share(recalled((0.05, False), (0.4, True), (0.4, True), (0.4, True))) < 0.05


def test_missing_something_is_worse_than_finding_too_much() -> None:
    assert presence_share(recalled((0.1, False), (0.1, True))) > LEAST_SHARE


def test_an_annotated_image_knows_itself() -> None:
    assert presence_share(recalled((0.0, True), (1e-3, False))) > 0.99
    assert presence_share(recalled((-1e-8, False), (1e-3, True))) < 0.01


def test_nobody_votes() -> None:
    assert presence_share([]) == 0.0


@given(
    st.lists(st.tuples(st.floats(0, 2), st.booleans()), min_size=1, max_size=20),
    st.floats(1.1, 5),
)
def test_a_share_that_grows_with_what_is_shown_and_not_with_the_scale(
    votes: list[tuple[float, bool]], factor: float
) -> None:
    share = presence_share(recalled(*votes))
    assert 0 <= share <= 1
    assert presence_share(recalled(*votes, (0.1, True))) >= share - 1e-9
    if min(distance for distance, _ in votes) > 1e-3:
        scaled = [(distance * factor, shown) for distance, shown in votes]
        assert presence_share(recalled(*scaled)) == pytest.approx(share)
