"""Threads run where and as urgently as was asked for, and the caller's stay as they are."""

from __future__ import annotations

import os
from threading import Thread, get_native_id

import pytest

from recallseg.engines.errors import InputError
from recallseg.runtime.services.scheduling import Scheduling


def facts() -> tuple[set[int], int]:
    return os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, get_native_id())


def test_threads_that_a_function_makes_are_scheduled_and_the_callers_are_not() -> None:
    before = facts()
    core = min(before[0])
    seen: list[tuple[set[int], int]] = []

    def work() -> str:
        thread = Thread(target=lambda: seen.append(facts()))
        thread.start()
        thread.join()
        return "done"

    nice = 19 if before[1] < 19 else 18  # another than that of these tests
    assert Scheduling((core,), nice=nice).run(work) == "done"
    assert seen == [({core}, nice)]
    assert facts() == before
    assert Scheduling().run(get_native_id) == get_native_id()  # nothing was asked for


def test_what_cannot_be_is_told_before_anything_is_done() -> None:
    for wrong, word in (
        ({"cores": (99999,)}, "core 99999"),
        ({"nice": -21}, "nice must be"),
        ({"realtime": 100}, "1 to 99"),
        ({"realtime": -1}, "1 to 99"),
    ):
        with pytest.raises(InputError, match=word):
            Scheduling(**wrong)  # type: ignore[arg-type]


def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    called: list[int] = []
    with pytest.raises(InputError, match="CAP_SYS_NICE"):
        Scheduling(realtime=10).run(lambda: called.append(1))
    assert called == []


def test_what_a_function_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        Scheduling(nice=19).run(lambda: 1 // 0)
