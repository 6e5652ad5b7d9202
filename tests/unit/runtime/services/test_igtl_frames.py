"""Frames of a device when something fails under one of them: the next one is answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import igtl as igtl_peers
from support.services import half_library, half_volume, wait_until

from recallseg import Bundle
from recallseg.runtime.services.igtl import frames, wire
from recallseg.runtime.services.igtl.frames import Frames, Segmented
from recallseg.runtime.services.igtl.wire import Image, Message
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import RecipeSettings, Rule


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_library(tmp_path_factory.mktemp("frames") / "lib", fake_bundle)


class Done(list[Segmented]):
    """What was answered; the first answer fails as it is told to."""

    fails: Exception | None = None

    def __call__(self, found: Segmented) -> None:
        error, self.fails = self.fails, None
        if error is not None:
            raise error
        self.append(found)


@pytest.fixture
def done() -> Done:
    return Done()


@pytest.fixture
def device(library: Path, done: Done) -> Iterator[Frames]:
    rule = Rule(name="half", library=library, recipe=RecipeSettings(k=1, engine="fake"))
    questions = Questions()
    made = Frames(rule, questions, 1e6, done)
    yield made
    made.close()
    questions.close()


def pushed(device: Frames, slices: int) -> None:
    image = Image(half_volume(slices), bytes(72), None, "RAS")
    device.push(image, Message("IMAGE", "probe", 0, b""), 1e12)  # never too late


@pytest.mark.parametrize("error", [MemoryError(), KeyError("defect")])
def test_a_stream_that_has_ended_is_begun_anew(
    device: Frames, done: Done, error: Exception
) -> None:
    done.fails = error
    pushed(device, 1)
    assert device._stream is not None
    device._stream._thread.join(60)
    with pytest.raises(type(error)):
        pushed(device, 1)
    pushed(device, 1)
    wait_until(lambda: done)
    assert done[0].label_map is not None
    device.close()


def test_a_volume_with_a_defect_is_answered_and_so_is_the_next(
    device: Frames, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise KeyError("voxel")

    with monkeypatch.context() as patched:
        patched.setattr(frames, "segment_volume", broken)
        pushed(device, 3)
        wait_until(lambda: done, 10)
    assert "defect: KeyError" in str(done[0].error)
    pushed(device, 3)
    wait_until(lambda: len(done) == 2, 60)
    assert done[1].label_map is not None
    assert done[1].label_map.shape == (3, 64, 64)


def test_a_source_whose_message_finds_no_memory_is_followed_on(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [MemoryError()]

    def read(*arguments: Any, **settings: Any) -> Message:
        if left:
            raise left.pop()
        return real(*arguments, **settings)

    real = wire.read
    monkeypatch.setattr(wire, "read", read)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        source = {"port": server.getsockname()[1], "retry_s": 0.01}
        with igtl_peers.running(library, source=source) as service:
            for _ in range(2):
                link, _ = server.accept()
                link.close()
            assert service.alive()
