"""How long each stage of a query took, and whether it may go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import TIMEOUT_MAX
from time import perf_counter

from recallseg.engines.errors import CancelledError, DeadlineError
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.model.turns import Turns

__all__ = ["Timings"]


class Timings:
    """Milliseconds by stage, in the order of the first use; stages may repeat and add up.

    Begins no stage, and ends none, past the deadline (milliseconds from now; None: no limit) or
    once ``cancelled`` says so.
    """

    def __init__(
        self, deadline_ms: float | None = None, cancelled: Callable[[], bool] | None = None
    ) -> None:
        self._start = perf_counter()
        self._deadline_ms = deadline_ms
        self._cancelled = cancelled
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._check(stage)
        start = perf_counter()
        try:
            yield
        finally:
            spent = (perf_counter() - start) * 1e3
            self._stages[stage] = self._stages.get(stage, 0.0) + spent
        self._check(stage)

    @contextmanager
    def locked(self, turns: Turns) -> Iterator[None]:
        """Take a turn; waiting for it ends at the deadline."""
        left = -1.0 if self._deadline_ms is None else max(0.0, self._deadline_ms / 1e3)
        if not turns.acquire(timeout=min(left, TIMEOUT_MAX)):
            self._check("waiting for another call", always=True)
        try:
            yield
        finally:
            turns.release()

    def _check(self, stage: str, *, always: bool = False) -> None:
        if self._cancelled is not None and self._cancelled():
            raise CancelledError(f"cancelled at '{stage}'.")
        spent = (perf_counter() - self._start) * 1e3
        if self._deadline_ms is not None and (always or spent > self._deadline_ms):
            raise DeadlineError(
                f"not done in {self._deadline_ms:g} ms: {spent:.1f} ms had passed at '{stage}'. "
                "Allow more time, or use a smaller k or bundle."
            )

    def finished(self) -> Mapping[str, float]:
        """Return all stages and the total."""
        total = (perf_counter() - self._start) * 1e3
        return FrozenMap({**self._stages, "total": total})
