"""Contexts with PyCUDA: given back by each thread, as PyCUDA wants. Its own tests need it built."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from recallseg.engines.device import pycuda


class Context:
    """PyCUDA's: a stack for each thread, which has to be empty when the thread ends."""

    stacks: ClassVar[dict[int, list[Context]]] = {}

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def stack(cls) -> list[Context]:
        return cls.stacks.setdefault(threading.get_ident(), [])

    @classmethod
    def get_current(cls) -> Context | None:
        return cls.stack()[-1] if cls.stack() else None

    def push(self) -> None:
        self.stack().append(self)

    @classmethod
    def pop(cls) -> None:
        cls.stack().pop()


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Any:
    api: Any = ModuleType("pycuda.driver")
    api.Context, api.Error, api.init = Context, RuntimeError, lambda: None
    api.Device = lambda ordinal: SimpleNamespace(retain_primary_context=lambda: Context(7))
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", api)
    monkeypatch.setattr(pycuda, "_statuses_by_words", dict)
    registered: list[Any] = []
    monkeypatch.setattr(pycuda.atexit, "register", registered.append)
    made = pycuda.PyCuda()
    yield made, registered
    for end in registered:
        end()
    assert Context.stack() == []


def test_each_thread_gives_back_what_it_pushed(provider: Any) -> None:
    driver, registered = provider
    context = driver.retain_primary_context(0)
    driver.set_context(context)
    driver.set_context(context)
    assert len(Context.stack()) == 1
    left: list[list[Context]] = []

    def work() -> None:
        driver.set_context(context)
        left.append(Context.stack())
        assert len(left[-1]) == 1

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert left == [[], [], []], "PyCUDA would abort the process"
    assert len(Context.stack()) == 1, "this thread's context is not theirs to take"
    assert len(registered) == 1


def test_what_is_freed_after_the_end_pushes_nothing(provider: Any) -> None:
    driver, registered = provider
    context = driver.retain_primary_context(0)
    mine = Context(1)
    mine.push()
    driver.set_context(context)
    registered[0]()
    assert Context.stack() == [mine], "a host's context is left as it was found"
    driver.set_context(context)
    assert Context.stack() == [mine]
    Context.pop()
