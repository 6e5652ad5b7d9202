"""What inline services have in common, and libraries that change under them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import pytest
from support import igtl as igtl_peers
from support import mrd as mrd_peers
from support.services import half_library, half_volume, wait_until

from recallseg import Bundle
from recallseg.engines.errors import AuditError, InputError, OutputError
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.igtl.service import Igtl
from recallseg.runtime.services.inline import InlineService
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.mrd.answering import Answer, Answerer, Question
from recallseg.runtime.services.mrd.connection import Conversation
from recallseg.runtime.services.mrd.parameters import Said
from recallseg.runtime.services.mrd.segmenting import _Asked, _Job
from recallseg.runtime.services.mrd.service import Mrd
from recallseg.runtime.services.mrd.wire import CLOSE, IMAGE, Image, Link
from recallseg.runtime.services.settings import Configuration


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_library(tmp_path_factory.mktemp("inline") / "lib", fake_bundle)


@pytest.mark.parametrize(("make", "name"), [(Mrd, "mrd"), (Igtl, "igtl")])
def test_what_keeps_it_from_listening_is_told_and_nothing_stays_open(
    make: Callable[[Configuration], InlineService], name: str, library: Path
) -> None:
    rules = [{"name": "half", "library": library, "recipe": {"k": 1, "engine": "fake"}}]
    with pytest.raises(InputError, match=rf"needs a section \[{name}\].*config example {name}"):
        make(Configuration(rules=rules))
    with socket.socket() as taken, socket.socket() as free:
        for each in (taken, free):
            each.bind(("127.0.0.1", 0))
        taken.listen()
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        with pytest.raises(OutputError, match=rf"127.0.0.1:{port}.*another {name}.port"):
            make(Configuration(rules=rules, **{name: {"port": port}}))
        for _ in range(2):  # the second time it could not listen if it still did
            with pytest.raises(OutputError, match=rf"metrics cannot be served.*:{port}"):
                make(Configuration(rules=rules, metrics={"port": port}, **{name: {"port": other}}))


def test_more_connections_than_may_be_are_counted(library: Path) -> None:
    with igtl_peers.running(library, most_clients=1) as service:
        with igtl_peers.raw_client(service.port):
            wait_until(lambda: len(service._acceptor) == 1)
            with igtl_peers.raw_client(service.port) as one_more:
                assert one_more.recv(1) == b""
        assert 'reason="clients"' in service.metrics.text().decode()


def test_mrd_passes_on_alone_while_the_library_is_away(tmp_path: Path, fake_bundle: Bundle) -> None:
    path = half_library(tmp_path / "lib", fake_bundle)
    sent = mrd_peers.image_of(half_volume(1)[0])
    with mrd_peers.running(mrd_peers.configured(path)) as service:
        assert len(mrd_peers.asked(service.port, [sent])) == 2
        path.rename(tmp_path / "away")
        found = mrd_peers.asked(service.port, [sent])
        assert [each.to_bytes() for each in found if not isinstance(each, str)] == [sent.to_bytes()]
        assert any("no library" in each for each in found if isinstance(each, str)), found
        (tmp_path / "away").rename(path)
        assert len(mrd_peers.asked(service.port, [sent])) == 2


def test_mrd_answers_in_the_order_of_images_while_two_are_in_work(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    """Large and small ones in turn: the small one of two that are in work is done first."""
    path = half_library(tmp_path / "lib", fake_bundle)
    images = [
        mrd_peers.image_of(half_volume(1, 512 if n % 2 == 0 else 64)[0], index=n) for n in range(12)
    ]
    with mrd_peers.running(mrd_peers.configured(path)) as service:
        found = mrd_peers.asked(service.port, images)
        masks = [each for each in found if each.getHead().image_series_index >= 1000]
        assert [each.getHead().image_index for each in masks] == list(range(12))
        assert [each.data.shape for each in masks] == [each.data.shape for each in images]
        process = service.segmenting.process
        assert process is not None
        os.kill(process, signal.SIGKILL)  # and both are given up when it dies
        begin = time.monotonic()
        assert len(mrd_peers.asked(service.port, images)) >= 12
        assert time.monotonic() - begin < 100  # an answer is waited for 120 s


def test_mrd_asks_for_the_next_image_while_one_is_in_work(library: Path) -> None:
    """Also for one that comes only then; no more than two, and answered in their order."""
    asked: list[Future[Answer]] = []

    class Segmenting:
        def ask(self, raw: bytearray, *_: object, **__: object) -> Future[Answer]:
            asked.append(Future())
            return asked[-1]

    def done(number: int) -> None:
        image = bytearray(images[number])
        asked[number].set_result(Answer((("mask", image),)))

    images = [
        struct.pack("<H", IMAGE) + mrd_peers.image_of(half_volume(1)[0], index=n).to_bytes()
        for n in range(4)
    ]
    settings = mrd_peers.configured(library).mrd
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said = Link(ours, idle_s=300, message_s=300, most_bytes=2**26)

        def heard() -> tuple[int, int]:
            header = Image.of(said.read().raw).header
            return int(header["image_index"]), int(header["image_series_index"])

        talk = Conversation(
            theirs, settings, ("half",), Segmenting(), Metrics("mrd"), None, lambda: True
        )
        thread = threading.Thread(target=talk.hold)
        thread.start()
        for number, image in enumerate(images):
            ours.sendall(image)
            assert heard() == (number, 1)  # passed on at once
            wait_until(lambda n=number: len(asked) == min(n + 1, 2))
        done(1)
        ours.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        done(0)
        assert [heard(), heard()] == [(0, 1000), (1, 1000)]
        wait_until(lambda: len(asked) == 4)
        ours.shutdown(socket.SHUT_WR)
        done(2), done(3)
        assert [heard(), heard()] == [(2, 1000), (3, 1000)]
        assert said.read().id == CLOSE
        thread.join(300)
        assert not thread.is_alive()


def test_mrd_segments_one_image_of_each_connection_at_a_time() -> None:
    """One that asks for much keeps one thread, and its images in their order."""
    asked, question = _Asked(), cast(Question, None)

    def job(number: int, sender: int) -> _Job:
        return _Job(number, sender, Said(), False, 0.0)

    def next_of(done: int | None) -> int:
        found = asked.get(done)
        assert found is not None
        return found[0].number

    for number, sender in enumerate((7, 7, 7, 8, 8, 9)):
        asked.put(job(number, sender), question)
    assert next_of(None) == 0
    assert next_of(None) == 3  # of another connection, though it came later
    assert next_of(7) == 1
    assert next_of(8) == 4
    assert next_of(7) == 2
    waits = threading.Thread(target=lambda: came.append(next_of(None)))
    came: list[int] = []
    assert next_of(8) == 5
    waits.start()  # nothing waits any more
    asked.put(job(6, 7), question)  # of one that has an image in work
    asked.put(job(7, 8), question)
    waits.join(20)
    assert came == [7]
    asked.close()
    assert next_of(7) == 6
    assert asked.get(9) is None
    assert asked.get(8) is None


def test_mrd_segments_without_waiting_for_the_log_and_answers_only_what_is_in_it(
    library: Path,
) -> None:
    recorded: list[object] = []

    class Log:
        full = False

        def record(self, _: object, label_map: object, __: object) -> None:
            if self.full:
                raise AuditError("there is no room.")
            recorded.append(label_map)

    settings = mrd_peers.configured(library)
    assert settings.mrd is not None
    log = Log()
    answerer = Answerer(settings.rules, settings.mrd, cast(AuditLog, log))
    raw = struct.pack("<H", IMAGE) + mrd_peers.image_of(half_volume(1)[0]).to_bytes()
    try:
        question = answerer.prepare(raw, Said())
        assert isinstance(question, Question)
        results = answerer.segment(question, time.monotonic() + 60)
        assert not isinstance(results, Answer)
        assert not recorded
        assert len(answerer.answer(question, results, nul=False).images) == 1
        assert [each is results[0].label_map for each in recorded] == [True]
        log.full = True
        assert answerer.answer(question, results, nul=False).state == "failed"
    finally:
        answerer.close()
