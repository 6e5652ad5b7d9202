"""What is freed goes back to the system, whatever still lies above it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from recallseg import Bundle, Library, Segmenter
from recallseg.benchmarks.resident import resident_bytes
from recallseg.runtime.services import memory, running
from recallseg.runtime.services.archive.sources import Source
from recallseg.runtime.services.archive.worker import Setup, Worker
from recallseg.runtime.services.memory import FreeMemory
from recallseg.runtime.services.running import run_service
from recallseg.runtime.services.watching import Watcher
from recallseg.runtime.volumes.outputs import VolumeSettings

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)

BLOCK, COUNT = 2**15, 2**11  # 64 MiB of blocks that are too small for pages of their own


def resident() -> int:
    found = resident_bytes()
    assert found is not None
    return found


@contextmanager
def freed_below_a_block_in_use() -> Iterator[None]:
    blocks = [np.ones(BLOCK, np.uint8) for _ in range(COUNT)]
    top = blocks[-1]
    del blocks
    yield
    assert top.all()


def test_what_lies_below_a_block_in_use_is_given_back() -> None:
    free = FreeMemory(every_s=0)
    with freed_below_a_block_in_use():
        before = resident()
        free.give_back()
        assert before - resident() > BLOCK * COUNT // 2


def test_asked_too_early_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(memory, "monotonic", lambda: now)
    free = FreeMemory(every_s=60)
    with freed_below_a_block_in_use():
        before, now = resident(), 59.9
        free.give_back()
        assert before - resident() < BLOCK * COUNT // 8
        now = 60.0
        free.give_back()
        assert before - resident() > BLOCK * COUNT // 2


class Ends:
    """A service that dies on its third look."""

    def __init__(self) -> None:
        self.looks = 0

    def start(self) -> None: ...

    def alive(self) -> bool:
        self.looks += 1
        return self.looks < 3

    def stop(self, seconds: float) -> None: ...


def test_whatever_runs_for_long_gives_back(
    fake_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[str]()
    who = ""
    monkeypatch.setattr(FreeMemory, "give_back", lambda self: given.append(who))
    monkeypatch.setattr(running, "_LOOK_S", 0.001)

    who = "service"
    assert not run_service(Ends(), "node")

    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        library.add(np.eye(64, dtype=np.uint8), {"line": np.eye(64, dtype=bool)})
        who = "watch"
        (tmp_path / "in").mkdir()
        segmenter = Segmenter(library, k=1, engine="fake")
        with Watcher(segmenter, tmp_path / "in", tmp_path / "out", settle_s=0) as watcher:
            assert not [*watcher.run(Event(), once=True)]

    who = "archive"
    setup = Setup(
        tmp_path / "library", tmp_path / "done", {"k": 1, "engine": "fake"}, VolumeSettings()
    )
    worker = Worker(setup)
    worker.do(Source("in", (str(tmp_path / "in"),)))
    assert given == ["service", "service", "watch", "archive"]
