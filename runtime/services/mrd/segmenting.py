"""The process that segments, beside the one that passes on: neither waits for the other.

What is asked of it comes back in time or is given up. If it dies or hangs it is started anew, and
images are passed on alone meanwhile. It reads the next image and writes the last answer while an
image is segmented.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recallseg.engines.child import bound_process, python_command, python_environment
from recallseg.engines.errors import RecallSegError
from recallseg.runtime.services.logs import ServiceLog, configure_logs, silence_libraries
from recallseg.runtime.services.mrd.answering import Answer, Answerer, Question
from recallseg.runtime.services.mrd.parameters import Said
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.rules import Rule
from recallseg.runtime.services.settings import AuditSettings, LogSettings
from recallseg.runtime.volumes.slices import VolumeResult

__all__ = ["SegmentingProcess", "Setup"]

HUNG_S = 30.0
"""After a deadline, before a process that does not answer is ended."""
WORKERS = 2
"""Connections whose images are segmented by turns; those of others wait."""
_FIRST_S, _MOST_S = 0.5, 30.0
_LOOK_S = 0.5
_ROOM = 4 * 2**20
_Found = tuple[VolumeResult, ...] | Answer
_GONE = Answer(state="failed", notes=("the segmentation ended: an image is passed on alone.",))


@dataclass(frozen=True)
class Setup:
    """What the process is told when it starts."""

    rules: Sequence[Rule]
    settings: MrdSettings
    audit: AuditSettings | None
    log: LogSettings


@dataclass(frozen=True)
class _Job:
    number: int
    sender: int
    said: Said
    nul: bool
    until: float


class SegmentingProcess:
    """Segments images in a process of its own, one after the other."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._log = ServiceLog("mrd.segment")
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[_Job, bytes | bytearray] | None] = queue.SimpleQueue()
        self._futures: dict[int, tuple[Future[Answer], float]] = {}
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=each, name=each.__name__.strip("_"), daemon=True)
            for each in (self._keep, self._send, self._watch)
        ]

    @property
    def ready(self) -> bool:
        """Whether it has opened what rules ask."""
        return self._ready.is_set()

    @property
    def process(self) -> int | None:
        """Its number for the system; None while there is none."""
        return None if self._process is None else self._process.pid

    def __len__(self) -> int:
        return len(self._futures)

    def start(self) -> None:
        """Start it; return at once."""
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        """Whether it is kept running."""
        return all(thread.is_alive() for thread in self._threads)

    def ask(
        self, raw: bytes | bytearray, said: Said, *, sender: int, nul: bool, until: float
    ) -> Future[Answer]:
        """Ask for one image; what comes of it is an :class:`Answer`, never an error.

        Parameters
        ----------
        sender : number of the connection. Of one no two images are segmented at a time.
        nul, until : see :class:`recallseg.runtime.services.mrd.answering.Answerer`.
        """
        future: Future[Answer] = Future()
        with self._lock:
            self._number += 1
            job = _Job(self._number, sender, said, nul, until)
            self._futures[job.number] = future, until
        self._asked.put((job, raw))
        return future

    def stop(self) -> None:
        """End it."""
        self._stop.set()
        self._asked.put(None)
        self._kill()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(5)
        self._give_up()

    def _keep(self) -> None:
        """Start it, take its answers, and start it anew when it ends."""
        wait = _FIRST_S
        while not self._stop.is_set():
            begin = time.monotonic()
            try:
                self._open()
                self._take()
            except Exception as error:
                # It ended, or what it says cannot be taken: it is started anew.
                if not self._stop.is_set():
                    status = None if self._process is None else self._process.poll()
                    self._log.error("the segmentation ended", error=error, status=status)
            self._end()
            self._give_up()
            wait = _FIRST_S if time.monotonic() - begin > _MOST_S else min(_MOST_S, wait * 2)
            self._stop.wait(wait)

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        for link in (ours, theirs):  # a whole image at once, as far as the system allows
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  # this Python, this module
                    python_command(__name__, str(theirs.fileno()), str(os.getpid())),
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=python_environment(),
                )
            _put(ours, self._setup)
        except BaseException:
            ours.close()
            raise
        self._link = ours

    def _take(self) -> None:
        link = self._link
        assert link is not None
        if _get(link)[0] == "ready":
            self._ready.set()
            self._log.info("the segmentation is ready")
        while True:
            (number, state, notes, kinds), messages = _get(link)
            images = tuple(zip(kinds, messages, strict=True))
            self._answer(number, Answer(images, state, notes))

    def _send(self) -> None:
        while (asked := self._asked.get()) is not None:
            job, raw = asked
            link = self._link
            try:
                if link is None:
                    raise BrokenPipeError
                _put(link, job, raw)
            except (OSError, MemoryError):  # ended meanwhile, or no room to tell it
                self._answer(job.number, _GONE)

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            with self._lock:
                oldest = min((until for _, until in self._futures.values()), default=None)
            late = oldest is not None and time.monotonic() > oldest + HUNG_S
            if late and self.ready:
                self._log.error("the segmentation hangs and is ended")
                self._kill()

    def _answer(self, number: int, answer: Answer) -> None:
        with self._lock:
            future, _ = self._futures.pop(number, (None, 0.0))
        if future is not None:
            future.set_result(answer)

    def _give_up(self) -> None:
        for number in list(self._futures):
            self._answer(number, _GONE)

    def _kill(self) -> None:
        self._ready.clear()
        process = self._process
        if process is not None:
            process.kill()

    def _end(self) -> None:
        self._kill()
        if self._process is not None:
            self._process.wait()
        link, self._link = self._link, None
        if link is not None:
            link.close()


class _Asked:
    """Questions that wait. Of each connection one is in work at a time.

    So a thread goes on with the next image by itself, where two that share a model would have to
    wake each other; and a connection that asks for much leaves a thread to the others.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[_Job, Question]] = []
        self._in_work: set[int] = set()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, job: _Job, question: Question) -> None:
        with self._changed:
            self._waiting.append((job, question))
            if job.sender not in self._in_work:
                self._changed.notify()

    def get(self, done: int | None) -> tuple[_Job, Question] | None:
        """Return the next one; None at the end.

        Parameters
        ----------
        done : the connection whose question is no longer in work; None if none was.
        """
        with self._changed:
            if done is not None:
                self._in_work.remove(done)
            self._changed.wait_for(lambda: self._next() is not None or self._over)
            index = self._next()
            found = None if index is None else self._waiting.pop(index)
            if found is not None:
                self._in_work.add(found[0].sender)
            if self._over or self._next() is not None:
                self._changed.notify_all()
            return found

    def close(self) -> None:
        """Let what waits be the last."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self) -> int | None:
        """Return which is the oldest of a connection that has none in work."""
        return next(
            (i for i, (job, _) in enumerate(self._waiting) if job.sender not in self._in_work), None
        )

    @property
    def _over(self) -> bool:
        return self._closed and not self._waiting


def _put(link: socket.socket, told: object, *blobs: bytes | bytearray) -> None:
    """Send a value, and bytes that belong to it."""
    head = pickle.dumps((told, [len(blob) for blob in blobs]))
    link.sendall(struct.pack("<I", len(head)) + head)
    for blob in blobs:
        link.sendall(blob)


def _get(link: socket.socket) -> tuple[Any, list[bytearray]]:
    """Receive what :func:`_put` sent; EOFError if nothing comes any more."""
    (count,) = struct.unpack("<I", _bytes(link, 4))
    told, sizes = pickle.loads(_bytes(link, count))  # noqa: S301  # of the other process of ours
    return told, [_bytes(link, size) for size in sizes]


def _bytes(link: socket.socket, count: int) -> bytearray:
    whole = bytearray(count)
    view = memoryview(whole)
    while view:
        got = link.recv_into(view, 0, socket.MSG_WAITALL)
        if not got:
            raise EOFError
        view = view[got:]
    return whole


def _serve(link: socket.socket) -> None:
    setup: Setup = _get(link)[0]
    configure_logs(setup.log.format, setup.log.level)
    silence_libraries()
    audit = None if setup.audit is None else setup.audit.open()
    answerer = Answerer(setup.rules, setup.settings, audit)
    asked = _Asked()
    found: queue.SimpleQueue[tuple[_Job, Question | None, _Found] | None] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                job, (raw,) = _get(link)
                prepared = answerer.prepare(raw, job.said)
                if isinstance(prepared, Answer):
                    found.put((job, None, prepared))
                else:
                    asked.put(job, prepared)
        except (EOFError, OSError):  # nobody asks any more
            pass
        finally:
            asked.close()

    def segment() -> None:
        sender = None
        while (taken := asked.get(sender)) is not None:
            job, question = taken
            sender = job.sender
            found.put((job, question, answerer.segment(question, job.until)))

    def send() -> None:
        while (made := found.get()) is not None:
            job, question, answer = made
            if question is not None and not isinstance(answer, Answer):
                answer = answerer.answer(question, answer, nul=job.nul)
            assert isinstance(answer, Answer)
            kinds = [kind for kind, _ in answer.images]
            told = (job.number, answer.state, answer.notes, kinds)
            with suppress(OSError):  # then nobody waits any more: see receive
                _put(link, told, *(message for _, message in answer.images))

    def ended(done: Future[None]) -> None:
        if done.exception() is not None or all(each.done() for each in threads):
            found.put(None)

    answerer.warm_up()
    _put(link, "ready")
    try:
        with ThreadPoolExecutor(1 + WORKERS, "work") as pool:
            threads = [pool.submit(each) for each in (receive, *[segment] * WORKERS)]
            for thread in threads:
                thread.add_done_callback(ended)
            try:
                send()
            finally:
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)  # none goes on without the others
        for thread in threads:
            thread.result()
    finally:
        answerer.close()


def main() -> None:
    """Segment what is asked for, until nobody asks any more; see :class:`SegmentingProcess`."""
    descriptor, parent = map(int, sys.argv[1:3])
    if bound_process(parent, None):
        try:
            with socket.socket(fileno=descriptor) as link:
                _serve(link)
        except RecallSegError as error:
            ServiceLog("mrd.segment").error("the segmentation cannot start", error=error)
            raise SystemExit(1) from None
        except Exception as error:  # a traceback on stderr would hold what a scanner sent
            ServiceLog("mrd.segment").error("defect", error=error)
            raise SystemExit(1) from None
