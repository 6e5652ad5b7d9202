"""What the machine kept from being done is tried again: after a while, each time twice as long."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from time import monotonic

__all__ = ["AGAIN_S", "MOST_TIMES", "Patience", "PutOff"]

AGAIN_S, MOST_AGAIN_S = 5.0, 300.0
"""After which it is tried again first, and at most."""
MOST_TIMES = 5
"""Tries after which it is taken for the input's fault that memory is short."""


@dataclass(frozen=True)
class PutOff:
    """Something that is tried again: until when it waits, how often it was tried, and why.

    ``fault`` is as :func:`recallseg.engines.machine_fault.machine_fault` says.
    """

    version: object
    until: float
    wait: float
    times: int
    why: str
    fault: int

    @property
    def waits(self) -> bool:
        """Whether it is not yet to be tried again."""
        return self.until > monotonic()


class Patience:
    """What is put off, by name; of another version of it nothing is known."""

    def __init__(self) -> None:
        self._known: dict[Hashable, PutOff] = {}

    def of(self, name: Hashable, version: object) -> PutOff | None:
        """Return what is known of something; None if it was not put off as it is now."""
        found = self._known.get(name)
        return found if found is not None and found.version == version else None

    def put_off(self, name: Hashable, version: object, why: str, fault: int) -> PutOff:
        """Put something off, once more."""
        before = self.of(name, version)
        wait = AGAIN_S if before is None else min(MOST_AGAIN_S, 2 * before.wait)
        times = 1 if before is None else before.times + 1
        self._known[name] = PutOff(version, monotonic() + wait, wait, times, why, fault)
        return self._known[name]

    def forget(self, name: Hashable) -> None:
        """Forget something: it was done, or is not tried any more."""
        self._known.pop(name, None)
