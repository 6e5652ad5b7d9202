"""Leases end when nobody is there, and only then."""

from __future__ import annotations

import threading

import pytest

from recallseg.runtime.services.http.leases import MOST_AT_ONCE, Leases
from recallseg.runtime.services.http.limits import Limits, RefusedError


class Held:
    def __init__(self) -> None:
        self.closed = self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases[Held]:
    return Leases(Limits(sessions=2, idle_s=100, liveness_s=10), Held, clock)


def test_a_client_that_is_silent_loses_its_session(leases: Leases[Held], clock: Clock) -> None:
    lease = leases.claim("ada")
    clock.now = 9.0
    leases.get(lease.token, "ada", active=False)
    clock.now = 18.0
    assert leases.peek(lease.token, "ada") is lease
    clock.now = 19.5
    with pytest.raises(RefusedError) as gone:
        leases.peek(lease.token, "ada")
    assert gone.value.status == 410
    assert lease.held.closed


def test_a_heart_beat_does_not_stand_for_a_person(leases: Leases[Held], clock: Clock) -> None:
    lease = leases.claim("ada")
    for now in range(0, 105, 5):
        clock.now = float(now)
        if now <= 100:
            assert leases.remaining_s(leases.get(lease.token, "ada", active=False)) == 100 - now
    clock.now = 100.5
    with pytest.raises(RefusedError):
        leases.get(lease.token, "ada")


def test_a_session_at_work_is_not_taken(leases: Leases[Held], clock: Clock) -> None:
    lease = leases.claim("ada")
    with lease.turn():
        clock.now = 1000.0
        assert leases.sweep() == 0
    assert leases.sweep() == 1


def test_places_of_those_that_are_gone_are_given_again(leases: Leases[Held], clock: Clock) -> None:
    for _ in range(2):
        leases.claim("ada")
    with pytest.raises(RefusedError) as full:
        leases.claim("grace")
    assert (full.value.status, full.value.retry_s) == (503, 10)
    clock.now = 11.0
    leases.claim("grace")
    assert len(leases) == 1


def test_requests_of_one_session_wait_for_each_other_and_do_not_pile_up(
    leases: Leases[Held],
) -> None:
    lease = leases.claim("ada")
    refused: list[int] = []

    def ask() -> None:
        try:
            with lease.turn():
                pass
        except RefusedError as error:
            refused.append(error.status)

    with lease.turn():
        threads = [threading.Thread(target=ask) for _ in range(MOST_AT_ONCE + 3)]
        for thread in threads:
            thread.start()
        while len(refused) < 4:
            pass
    for thread in threads:
        thread.join()
    assert refused == [429] * 4


def test_what_is_released_is_cancelled_and_then_closed(leases: Leases[Held]) -> None:
    lease = leases.claim("ada")
    leases.release(lease.token, "grace")
    assert not lease.held.closed
    leases.release(lease.token, "ada")
    leases.release(lease.token, "ada")
    assert lease.held.cancelled
    assert lease.held.closed


def test_a_session_that_cannot_be_closed_keeps_no_other_open(clock: Clock) -> None:
    class Broken(Held):
        def close(self) -> None:
            super().close()
            raise RuntimeError("the device is lost")

    leases = Leases(Limits(sessions=3, idle_s=100, liveness_s=10), Broken, clock)
    held = [leases.claim("ada").held for _ in range(3)]
    clock.now = 11.0
    assert leases.sweep() == 3
    assert all(one.closed for one in held)
    last = leases.claim("ada").held
    leases.close()
    assert last.closed
