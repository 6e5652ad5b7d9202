"""An OpenIGTLink service with the fake engine, and clients of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyigtl

from recallseg.runtime.services.igtl import wire
from recallseg.runtime.services.igtl.service import Igtl
from recallseg.runtime.services.settings import Configuration

PLACE = np.array([[0.0, 0.5, 0, 10], [-0.5, 0, 0, 20], [0, 0, 2, -30], [0, 0, 0, 1]])


@contextmanager
def running(library: Path, **changes: Any) -> Iterator[Igtl]:
    rule = {"name": "half", "library": library, "recipe": {"k": 1, "engine": "fake"}}
    rules = changes.pop("rules", [rule])
    service = Igtl(
        Configuration(rules=rules, igtl={"port": 0, "message_s": 60, "deadline_ms": 6e4, **changes})
    )
    try:
        service.start()
        yield service
    finally:
        service.stop(5)


@contextmanager
def raw_client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), 300) as link:
        yield link


def read(link: socket.socket) -> wire.Message:
    return wire.read(link, idle_s=120, message_s=120, most_bytes=2**28)


def next_of(link: socket.socket, kind: str, device: str | None = None) -> wire.Message:
    while (message := read(link)).type != kind or device not in (None, message.device):
        pass
    return message


def sent(pixels: np.ndarray, device: str = "Image", place: np.ndarray = PLACE, **more: Any) -> Any:
    return pyigtl.ImageMessage(pixels, ijk_to_world_matrix=place, device_name=device, **more)
