"""Who has which session: leases by token, taken back when nobody is there any more."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Generic, Protocol, TypeVar

from recallseg.runtime.services.http.limits import Limits, RefusedError
from recallseg.runtime.services.logs import ServiceLog

__all__ = ["Lease", "Leases"]


class Closable(Protocol):
    """What a lease gives, until it ends."""

    def cancel(self) -> None:
        """End what is being done in it as soon as possible; called by any thread."""

    def close(self) -> None:
        """Give back what it holds."""


Held = TypeVar("Held", bound=Closable)
_log = ServiceLog("serve")
MOST_AT_ONCE = 8
"""Requests of one session that are answered or wait; more would take the threads of others."""


class Lease(Generic[Held]):
    """One client's right to a session.

    Attributes
    ----------
    token : secret that names it.
    user : who claimed it.
    held : what it gives.
    """

    def __init__(self, user: str, held: Held, now: float) -> None:
        self.token = secrets.token_urlsafe(24)
        self.user, self.held = user, held
        self.active, self.seen = now, now
        self.ended = False
        self._lock, self._waiting = Lock(), 0
        self._counting = Lock()

    @contextmanager
    def turn(self) -> Iterator[Held]:
        """Have it to oneself: a session's requests are answered one after the other.

        Raises
        ------
        RefusedError
            429 if too many wait already; 410 if it ended meanwhile.
        """
        with self._counting:
            if self._waiting >= MOST_AT_ONCE:
                raise RefusedError(
                    429,
                    f"{self._waiting} requests of this session are waiting already. Send the next "
                    "when one was answered.",
                    retry_s=1,
                )
            self._waiting += 1
        try:
            with self._lock:
                if self.ended:
                    raise _gone()
                yield self.held
        finally:
            with self._counting:
                self._waiting -= 1

    @property
    def busy(self) -> bool:
        """Whether a request of it is answered now."""
        return self._waiting > 0

    def end(self) -> None:
        """Close what it gave; a request in work is ended first."""
        self.held.cancel()
        with self._lock:
            if not self.ended:
                self.ended = True
                self.held.close()


class Leases(Generic[Held]):
    """All leases of a server.

    Parameters
    ----------
    make : makes what a new lease gives.
    clock : seconds that only grow.
    """

    def __init__(
        self, limits: Limits, make: Callable[[], Held], clock: Callable[[], float] = monotonic
    ) -> None:
        self.limits = limits
        self._make, self._clock = make, clock
        self._leases: dict[str, Lease[Held]] = {}
        self._lock = Lock()

    def claim(self, user: str) -> Lease[Held]:
        """Return a new lease; raises RefusedError (503) if all are taken."""
        self.sweep()
        with self._lock:
            if len(self._leases) >= self.limits.sessions:
                raise RefusedError(
                    503,
                    f"all {self.limits.sessions} sessions of this server are in use. Try again "
                    "when somebody has closed one.",
                    retry_s=10,
                )
            lease = Lease(user, self._make(), self._clock())
            self._leases[lease.token] = lease
            return lease

    def get(self, token: str | None, user: str, *, active: bool = True) -> Lease[Held]:
        """Return a lease by its token, and note that its client is there.

        Parameters
        ----------
        user : who asks; another's lease counts as none.
        active : whether a person did something, and not only the client's heart beat.

        Raises
        ------
        RefusedError
            410 if there is none (any more).
        """
        lease = self.peek(token, user)
        lease.seen = self._clock()
        if active:
            lease.active = lease.seen
        return lease

    def peek(self, token: str | None, user: str) -> Lease[Held]:
        """Return a lease without counting it as used; raises RefusedError (410)."""
        self.sweep()
        with self._lock:
            lease = self._leases.get(token or "")
        if lease is None or lease.user != user:
            raise _gone()
        return lease

    def remaining_s(self, lease: Lease[Held]) -> float:
        """Return the seconds until it ends if nobody does anything."""
        return max(0.0, lease.active + self.limits.idle_s - self._clock())

    def release(self, token: str | None, user: str) -> None:
        """End a lease; harmless if there is none."""
        with self._lock:
            lease = self._leases.get(token or "")
            if lease is None or lease.user != user:
                return
            del self._leases[lease.token]
        lease.end()

    def sweep(self) -> int:
        """End the leases of clients that are gone; return how many."""
        now = self._clock()
        with self._lock:
            over = [
                lease
                for lease in self._leases.values()
                if not lease.busy
                and (
                    now - lease.seen > self.limits.liveness_s
                    or now - lease.active > self.limits.idle_s
                )
            ]
            for lease in over:
                del self._leases[lease.token]
        self._end(over)
        return len(over)

    def close(self) -> None:
        """End all."""
        with self._lock:
            leases = list(self._leases.values())
            self._leases.clear()
        self._end(leases)

    @staticmethod
    def _end(leases: Iterable[Lease[Held]]) -> None:
        """End leases that nobody can reach any more: one that cannot be ended stops no other."""
        for lease in leases:
            try:
                lease.end()
            except Exception as error:
                _log.error("a session was not closed well", error=error)

    def __len__(self) -> int:
        return len(self._leases)


def _gone() -> RefusedError:
    return RefusedError(410, "this session has ended, or never was. Open a new one.")
