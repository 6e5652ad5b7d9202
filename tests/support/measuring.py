"""Tests that measure time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

__all__ = ["measures"]

T = TypeVar("T", bound=Callable[..., None])
TIMES = 5


def measures(test: T) -> T:
    """Repeat a test until it passes once.

    A machine that others use too holds up some runs; a fault of ours shows in all of them. What is
    measured is the same in each, so nothing may be left from one that failed.
    """

    @functools.wraps(test)
    def repeated(*args: object, **named: object) -> None:
        for left in reversed(range(TIMES)):
            try:
                return test(*args, **named)
            except AssertionError:
                if not left:
                    raise

    return repeated  # type: ignore[return-value]
