"""What is left on the line between two processes is never taken for the next answer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from recallseg.engines.child import ending
from recallseg.runtime.formats.finding import Item, find_in_folder
from recallseg.runtime.services import decoding
from recallseg.runtime.services.decoding import IsolatedDecoder


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    for value in (50, 200):
        cv2.imwrite(str(tmp_path / f"{value}.png"), np.full((64, 64), value, np.uint8))
    return sorted(find_in_folder(tmp_path).items, key=lambda item: item.name)


def test_pixels_for_which_there_was_no_memory_are_no_answer_to_the_next_question(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be unpickled: whoever made the file would have a program run here."""

    def short(size: int) -> Any:
        raise MemoryError

    with IsolatedDecoder() as decoder:
        with monkeypatch.context() as patched:
            patched.setattr(decoding, "bytearray", short, raising=False)
            with pytest.raises(MemoryError):
                decoder.read(items[1])
        for item in items:
            found = decoder.read(item)
            assert isinstance(found, np.ndarray)
            assert np.unique(found).tolist() == [int(item.path.stem)]


def test_a_process_that_cannot_be_started_is_no_fault_of_the_file(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    with IsolatedDecoder() as decoder:
        with monkeypatch.context() as patched:
            patched.setattr(decoding, "python_command", lambda *_: ["false"])
            with pytest.raises(OSError, match="could not start"):
                decoder.read(items[0])
        assert decoder._process is None  # nor is anything left of it


def test_whatever_ends_a_process_is_named() -> None:
    assert ending(-signal.SIGSEGV) == "SIGSEGV"
    assert ending(-40) == "signal 40"  # a real-time signal has no name
