"""What a forked process is told: its parent's library and model are not its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle
from support.fake_library import HashEncoder, add, create, embedding

from recallseg import Bundle, Library, Model, Segmenter
from recallseg.errors import ForkedError, LibraryLockedError
from recallseg.runtime.services.c_errors import status_of


def in_a_fork(act: Callable[[], object]) -> str:
    """Return what a call raises, or nothing, in a forked process; it may not hang."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        said = "nothing"
        try:
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return text


CALLS: dict[str, Callable[[Library], object]] = {
    "search": lambda library: library.search(embedding(0), "nucleus", k=1),
    "iterate": list,
    "count": len,
    "add": lambda library: add(library, 9),
    "remove": lambda library: library.remove(next(iter(library)).key),
    "verify": lambda library: library.verify(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_library_is_refused_to_a_forked_process_and_stays_its_parents(
    tmp_path: Path, name: str
) -> None:
    with create(tmp_path / "library") as library:
        for number in range(2):
            add(library, number)

        def work_and_close() -> None:
            try:
                CALLS[name](library)
            finally:
                library.close()

        told = in_a_fork(work_and_close)
        assert told.startswith("ForkedError: the library")
        assert f"process {os.getpid()}" in told
        with pytest.raises(LibraryLockedError):  # closing it there let nobody else write
            Library.open(library.path, mode="write", encoder=HashEncoder())
        add(library, 3)
        assert library.verify().ok


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(tmp_path: Path) -> None:
    with create(tmp_path / "library") as library:
        add(library, 0)
        go_on = False

        def hold() -> None:
            with (
                library._store.changing,
                library._store.lock,
                library._store.catalog.database._lock,
            ):
                held.append(True)
                while not go_on:
                    pass

        held: list[bool] = []
        thread = Thread(target=hold)
        thread.start()
        while not held:
            pass
        try:
            for act in (CALLS["add"], CALLS["search"], Library.close):
                assert "Forked" in in_a_fork(lambda: act(library)) or act is Library.close  # noqa: B023
        finally:
            go_on = True
            thread.join()


def test_a_model_is_refused_to_a_forked_process(tmp_path: Path) -> None:
    bundle: Bundle = make_fake_bundle(tmp_path / "bundle")
    image = np.zeros((64, 64), np.uint8)
    image[16:48] = 200
    with Model.open(bundle, engine="fake") as model:
        with Library.create(tmp_path / "library", bundle, engine="fake") as library:
            library.add(image, {"bar": image > 100})
            segmenter = Segmenter(library, k=1)
            segmenter.segment(image)
            assert in_a_fork(lambda: segmenter.segment(image)).startswith("ForkedError")
            assert segmenter.segment(image).masks["bar"].any()
        assert in_a_fork(model.turns.acquire).startswith("ForkedError: the model")
        assert in_a_fork(model.close) == "nothing"


def test_c_tells_it_by_its_own_status() -> None:
    assert status_of(ForkedError("the library was opened elsewhere"))[0] == 5
