"""One connection: what comes is passed on at once, and images are answered when they can be."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError  # a class of its own before Python 3.11
from contextlib import suppress

from recallseg.engines.errors import InputError
from recallseg.runtime.services.listening import ClosedError, send_all
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.mrd.answering import Answer
from recallseg.runtime.services.mrd.parameters import Said, Wish
from recallseg.runtime.services.mrd.recording import Recording
from recallseg.runtime.services.mrd.segmenting import SegmentingProcess
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.mrd.wire import (
    CLOSE,
    CLOSING,
    CONFIG_FILE,
    CONFIG_TEXT,
    HEADER,
    IMAGE,
    SERIES_AT,
    TEXT,
    Link,
    Message,
    text_message,
)

__all__ = ["Conversation"]

AT_ONCE = 2
"""Images of one connection that are with the segmentation: one in work, and the next one."""
FIRST_SERIES = 1000
"""Of results; further ones are counted from there, those that the scanner has used left out."""
_GOODBYE_S = 2.0
_Begun = tuple[Message, bool, "Future[Answer]"]
"""An image, whether it was returned already, and what comes of it."""
_LATE = Answer(state="late", notes=("an image took too long: it is passed on alone.",))


class Conversation:
    """What is said on one connection.

    Parameters
    ----------
    rules : names of all.
    """

    def __init__(
        self,
        link: socket.socket,
        settings: MrdSettings,
        rules: tuple[str, ...],
        segmenting: SegmentingProcess,
        metrics: Metrics,
        recording: Recording | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._link, self._settings, self._rules = link, settings, rules
        self._segmenting, self._metrics, self._recording = segmenting, metrics, recording
        self._stopping = stopping
        self._log = ServiceLog("mrd")
        self._said, self._nul = Said(), False
        self._told: set[str] = set()
        self._outgoing: queue.SimpleQueue[bytes | bytearray | None] = queue.SimpleQueue()
        self._images: queue.SimpleQueue[tuple[Message, Said, bool] | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(AT_ONCE)
        self._asked = self._answered = 0  # images
        self._room = _Room(settings.most_bytes)
        self._series: dict[tuple[int, str], int] = {}
        self._taken: set[int] = set()
        self._finish = float("inf")
        self._gone = threading.Event()

    def hold(self) -> None:
        """Read until the end, answer what is left, and close."""
        threads = [
            threading.Thread(target=each, name=each.__name__, daemon=True)
            for each in (self._write, self._ask, self._answer)
        ]
        for thread in threads:
            thread.start()
        try:
            self._read()
        finally:
            self._finish = time.monotonic() + self._settings.finish_s
            self._images.put(None)
            threads[2].join()
            self._send(CLOSING)
            self._outgoing.put(None)
            threads[0].join(self._settings.message_s)
            self._part()
            if self._recording is not None:
                self._recording.close()

    def _read(self) -> None:
        settings = self._settings
        reader = Link(
            self._link,
            idle_s=settings.idle_s,
            message_s=settings.message_s,
            most_bytes=settings.most_bytes,
        )
        try:
            while not self._gone.is_set():
                message = reader.read()
                if message.id == CLOSE:
                    return
                self._take(message)
                if self._recording is not None and not self._recording.add(message):
                    self._recording = None
        except ClosedError as error:
            if str(error):
                self._metrics.refused("stream")
                self._log.warning("a stream cannot be followed", reason=str(error))
                self._note(f"the stream cannot be followed: {error}.")

    def _take(self, message: Message) -> None:
        self._nul = self._nul or message.ends_with_nul
        if message.id == IMAGE:
            self._take_image(message)
        elif message.id == CONFIG_FILE:
            self._said = self._said.with_config(message.text)
        elif message.id == HEADER:
            try:
                self._said = self._said.with_header(message.text)
            except InputError as error:
                self._note(f"the header cannot be read: {error}")
        elif message.id in (CONFIG_TEXT, TEXT):
            said = self._said.with_json(message.text)
            if said is not None:
                self._said = said
            elif message.id == TEXT:
                self._send(message.raw)
        else:
            self._send(message.raw)

    def _take_image(self, message: Message) -> None:
        (series,) = struct.unpack_from("<H", message.raw, SERIES_AT)
        if series not in self._taken and series in self._series.values():
            self._metrics.refused("series")
            self._note(
                f"images came in series {series}, in which results were sent already: both are in "
                "it. Further results are sent in another."
            )
        self._taken.add(series)
        returns, fault = self._wish()
        if returns:
            self._send(message.raw)
        if fault:
            self._note(fault)
            return
        size = len(message.raw)
        if not self._room.take(size, self._settings.message_s + self._settings.deadline_s):
            self._metrics.refused("room")
            self._note("images come faster than they are segmented: one is passed on alone.")
            if not returns:
                self._send(message.raw)
            return
        self._images.put((message, self._said, returns))

    def _wish(self) -> tuple[bool, str]:
        """Whether images are returned as they came, and what keeps them from being segmented."""
        try:
            return Wish.of(self._said, self._rules, self._settings.returned).returned.original, ""
        except InputError as error:
            return True, str(error)

    def _ask(self) -> None:
        """Ask for images as they come: the next one while one is in work."""
        while (taken := self._images.get()) is not None:
            message, said, returned = taken
            self._places.acquire()
            now = time.monotonic()
            ahead, self._asked = self._asked - self._answered, self._asked + 1
            # What nobody waits for any more is not begun.
            end = now if self._gone.is_set() else self._finish
            until = max(now, min(now + self._settings.deadline_s * (1 + ahead), end))
            future = self._segmenting.ask(
                message.raw, said, sender=id(self), nul=self._nul, until=until
            )
            self._begun.put((message, returned, future))
        self._begun.put(None)

    def _answer(self) -> None:
        """Answer in the order in which images came."""
        while (begun := self._begun.get()) is not None:
            self._finish_one(*begun)

    def _finish_one(self, message: Message, returned: bool, future: Future[Answer]) -> None:
        begin = time.monotonic()
        until = min(begin + self._settings.deadline_s, self._finish)
        answer = _LATE
        while not self._gone.is_set():
            try:
                answer = future.result(max(0.0, min(until - time.monotonic(), 0.5)))
                break
            except LateError:
                until = min(until, self._finish)
                if time.monotonic() >= until:
                    break
        self._answered += 1
        self._places.release()
        self._room.give(len(message.raw))
        self._metrics.took("segment", time.monotonic() - begin)
        self._metrics.done(f"images {answer.state}")
        for note in answer.notes:
            self._note(note)
        if not returned and not answer.images:
            self._send(message.raw)
        (series,) = struct.unpack_from("<H", message.raw, SERIES_AT)
        for kind, image in answer.images:
            struct.pack_into("<H", image, SERIES_AT, self._series_of(series, kind))
            self._send(image)

    def _series_of(self, source: int, kind: str) -> int:
        """Return the series of results of a kind: one that the scanner has not used so far."""
        found = self._series.get((source, kind), 0)
        if not found or found in self._taken:
            used = self._taken | set(self._series.values())
            found = next(n for n in range(FIRST_SERIES, 2**17) if n not in used) & 0xFFFF
            self._series[source, kind] = found
        return found

    def _note(self, text: str) -> None:
        """Tell the scanner's log, once."""
        if text not in self._told and len(self._told) < 100:
            self._told.add(text)
            self._send(text_message(f"RecallSeg: {text}", nul=self._nul))

    def _send(self, raw: bytes | bytearray) -> None:
        if self._room.take(len(raw), self._settings.message_s):
            self._outgoing.put(raw)
        else:  # the other side does not read
            self._metrics.refused("silent")
            self._gone.set()

    def _write(self) -> None:
        while (raw := self._outgoing.get()) is not None:
            if not self._gone.is_set():
                try:
                    send_all(self._link, raw, self._settings.message_s)
                except OSError:
                    self._gone.set()
                    with suppress(OSError):
                        self._link.shutdown(socket.SHUT_RD)  # wakes who reads
            self._room.give(len(raw))

    def _part(self) -> None:
        """Close so that the other side gets all that was sent."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
            end = time.monotonic() + _GOODBYE_S
            while (left := end - time.monotonic()) > 0 and not self._stopping():
                self._link.settimeout(left)
                if not self._link.recv(65536):
                    return


class _Room:
    """Bytes that a connection may hold; one thing always fits when nothing else is held."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._changed = threading.Condition()

    def take(self, count: int, seconds: float) -> bool:
        with self._changed:
            fits = self._changed.wait_for(
                lambda: self._held == 0 or self._held + count <= self._most, seconds
            )
            if fits:
                self._held += count
            return fits

    def give(self, count: int) -> None:
        with self._changed:
            self._held -= count
            self._changed.notify_all()
