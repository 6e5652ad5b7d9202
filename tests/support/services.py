"""What tests of services have in common."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from recallseg import Bundle, Library


def wait_until(true: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until something is true; AssertionError if it does not get so.

    A machine that others use too may take long; one that has nothing else to do is not held up.
    """
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)


def what_comes_to_the_end(link: socket.socket) -> bytes:
    """Say that nothing more is sent, and return what comes until the other end closes or resets.

    It may have done so already: a service that gave a stream up need not wait for a slow sender.
    """
    with suppress(OSError):
        link.shutdown(socket.SHUT_WR)
    came = bytearray()
    with suppress(ConnectionError):
        while part := link.recv(65536):
            came += part
    return bytes(came)


def half_volume(slices: int = 3, side: int = 64, seed: int = 0) -> np.ndarray:
    """Slices whose upper half is bright, which the fake engine finds after ``half_library``."""
    noise = np.random.default_rng(seed).integers(0, 20, (slices, side, side))
    volume = (noise + 30).astype(np.uint16)
    volume[:, : side // 2] += 170
    return volume


def half_library(folder: Path, bundle: Bundle, structure: str = "half") -> Path:
    """A library with one exemplar, for the engine ``fake``."""
    image = half_volume(1)[0]
    with Library.create(folder, bundle, engine="fake") as library:
        library.add(image, {structure: image > 100})
    return folder
