"""OpenIGTLink as a service: what comes is passed to all others, and frames are answered."""

from __future__ import annotations

import socket
import threading
import time
from collections import OrderedDict
from contextlib import suppress

from recallseg.engines.errors import AuditError, DeadlineError, InputError
from recallseg.runtime.reports.pictures import colour
from recallseg.runtime.services.igtl import wire
from recallseg.runtime.services.igtl.frames import Frames, Segmented
from recallseg.runtime.services.igtl.settings import IgtlSettings, Source
from recallseg.runtime.services.igtl.wire import Image, Message
from recallseg.runtime.services.inline import InlineService
from recallseg.runtime.services.listening import ClosedError, connect, keep_alive, send_all
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Arriving, fitting
from recallseg.runtime.services.settings import Configuration

__all__ = ["Igtl"]

LATEST = ("IMAGE", "TRANSFORM", "TDATA", "QTDATA", "POSITION", "STATUS", "LBMETA", "IMGMETA")
"""Of which only the newest of a device is worth sending to who is slow."""
MOST_DEVICES = 8
"""That one connection may send frames of."""
WAITING_BYTES = 64 * 2**20
"""Of other messages, before who does not read them is disconnected."""
_NAME_BYTES = 20
_STATUS_DEVICE = "RecallSeg"


class Igtl(InlineService[IgtlSettings]):
    """An OpenIGTLink service; see :func:`recallseg.runtime.services.running.run_service`.

    Parameters
    ----------
    configuration : with a section ``igtl``.

    Attributes
    ----------
    port : where it listens.

    Raises
    ------
    InputError
        If the configuration lacks something.
    OutputError
        If it cannot listen, on its port or that of its metrics.
    AuditError
    """

    def __init__(self, configuration: Configuration) -> None:
        super().__init__("igtl", configuration, configuration.igtl)
        self._rules = configuration.rules
        self._questions = Questions()
        self._peers: list[_Peer] = []
        self._lock = threading.Lock()
        self._described: dict[str, tuple[object, Message]] = {}
        self._told: dict[str, int] = {}
        self._results = _Latest()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._publish, name="publish", daemon=True)]
        source = self._settings.source
        if source is not None:
            self._threads.append(
                threading.Thread(target=self._follow, args=(source,), name="follow", daemon=True)
            )
        for thread in self._threads:
            self.metrics.alive_while(thread.name, thread.is_alive)

    def start(self) -> None:
        """Open what rules ask, and begin to serve."""
        for rule, error in self._questions.warm_up(self._rules).items():
            self._log.error("a rule cannot be asked", rule=rule, error=error)
        self._acceptor.start()
        for thread in self._threads:
            thread.start()
        self._log.info("listening", port=self.port)

    def stop(self, seconds: float) -> None:
        """Disconnect everybody, within about so many seconds."""
        self._stop.set()
        self._acceptor.close()
        with self._lock:
            peers = list(self._peers)
        for peer in peers:
            peer.end()
        self._acceptor.join(seconds / 2)
        self._results.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(seconds / 4)
        self._questions.close()
        self._close()

    def _follow(self, source: Source) -> None:
        """Be the client of a server that frames come from, again whenever it is there."""
        while not self._stop.is_set():
            try:
                link = connect(source.host, source.port, 5.0)
            except OSError as error:
                self._log.debug("the source is not there", error=error)
            else:
                try:
                    with link:
                        self._serve(link, source)
                except (OSError, MemoryError, RuntimeError) as error:
                    self._log.error("the source cannot be followed", error=error)
            self._stop.wait(source.retry_s)

    def _serve(self, link: socket.socket, source: Source | None = None) -> None:
        keep_alive(link)
        peer = _Peer(link, self._settings.message_s, source is None or source.answered)
        with self._lock:
            self._peers.append(peer)
            self.metrics.clients(len(self._peers))
            if peer.answered:
                for _, message in self._described.values():
                    peer.send(message)
        self._log.info("connected", source=source is not None)
        devices: dict[str, Frames] = {}
        try:
            while not self._stop.is_set():
                message = wire.read(
                    link,
                    idle_s=self._settings.idle_s,
                    message_s=self._settings.message_s,
                    most_bytes=self._settings.most_bytes,
                )
                self._take(message, peer, devices)
        except ClosedError as error:
            if str(error) and not self._stop.is_set():
                self.metrics.refused("stream")
                self._log.warning("a connection cannot be followed", reason=str(error))
                peer.send(wire.status(_STATUS_DEVICE, wire.ILLEGAL, "STREAM", str(error)))
        finally:
            with self._lock:
                self._peers.remove(peer)
                self.metrics.clients(len(self._peers))
            peer.end()
            for frames in devices.values():
                frames.close()
            self._log.info("disconnected")

    def _take(self, message: Message, peer: _Peer, devices: dict[str, Frames]) -> None:
        since = time.monotonic()
        if not message.is_whole:
            self.metrics.refused("checksum")
            peer.send(wire.status(_STATUS_DEVICE, wire.CHECKSUM, "CHECKSUM", message.type))
            return
        if message.type.startswith(("GET_", "STT_", "STP_")):
            self._answer_question(message, peer)
            return
        if message.type != "IMAGE":
            self._pass_on(message, peer)
            self.metrics.done("passed on")
            return
        if self._settings.images:
            self._pass_on(message, peer)
        try:
            image = Image.of(message.content)
            frames = devices.get(message.device)
            if frames is None:
                frames = self._frames(message.device, len(devices))
                devices[message.device] = frames
            frames.push(image, message, since)
        except InputError as error:
            self.metrics.refused("image")
            peer.send(wire.status(_STATUS_DEVICE, wire.ILLEGAL, "IMAGE", str(error)))
        except Exception as error:  # of the library, of memory, or a defect: the next one may go
            self._log.error("a frame cannot be segmented", error=error)
            why = str(error) or "it needs more memory than there is"
            peer.send(wire.status(_STATUS_DEVICE, wire.UNKNOWN, "SEGMENT", why))

    def _frames(self, device: str, count: int) -> Frames:
        if count >= MOST_DEVICES:
            raise InputError(f"one connection sends frames of at most {MOST_DEVICES} devices.")
        rules = fitting(self._rules, Arriving(senders=(device,)))
        if not rules:
            raise InputError(f"no rule fits device '{device}': its frames are passed on alone.")
        return Frames(rules[0], self._questions, self._settings.deadline_ms, self._results.put)

    def _answer_question(self, message: Message, peer: _Peer) -> None:
        if message.type == "GET_STATUS":
            peer.send(wire.status(_STATUS_DEVICE, wire.OK))
        elif message.type == "GET_LBMETA":
            for _, told in self._described.values():
                peer.send(told)
        else:
            code = wire.NOT_FOUND
            peer.send(wire.status(_STATUS_DEVICE, code, "QUESTION", f"no {message.type} here"))

    def _pass_on(self, message: Message, sender: _Peer | None) -> None:
        with self._lock:
            for peer in self._peers:
                if peer is not sender and peer.answered:
                    peer.send(message)

    def _publish(self) -> None:
        while (found := self._results.get()) is not None:
            device = found.message.device
            if found.label_map is None:
                late = isinstance(found.error, DeadlineError)
                self.metrics.done("late" if late else "failed")
                code = wire.TIME_OUT if late else wire.UNKNOWN
                self._tell(device, code, "LATE" if late else "SEGMENT", str(found.error))
                continue
            if self._audit is not None:
                try:
                    self._audit.record(found.image.array, found.label_map, found.record)
                except AuditError as error:
                    self._log.error("a result is not sent: it cannot be recorded", error=error)
                    self._tell(device, wire.UNKNOWN, "AUDIT", "a result could not be recorded")
                    continue
            name = self._mask_device(device)
            try:
                self._describe(name, found)
                content = found.image.labels(found.label_map)
                self._pass_on(wire.make("IMAGE", name, content, found.message.timestamp), None)
            except MemoryError as error:  # the next result may find more
                self._log.error("a result cannot be sent", error=error)
                self._tell(device, wire.UNKNOWN, "SEGMENT", "too little memory to send a result")
                continue
            self._tell(device, wire.OK, "", "")
            self.metrics.done("segmented")
            self.metrics.took("age", time.monotonic() - found.since)

    def _mask_device(self, device: str) -> str:
        """Return the name of a device's label maps; what is cut off leaves the suffix whole."""
        suffix = self._settings.suffix
        return device.encode()[: _NAME_BYTES - len(suffix)].decode("utf-8", "ignore") + suffix

    def _describe(self, name: str, found: Segmented) -> None:
        """Tell what labels mean, when that changes."""
        assert found.label_map is not None
        k, j, i = found.label_map.shape
        what = tuple(found.labels.items()), (i, j, k), found.message.device
        known = self._described.get(name)
        if known is None or known[0] != what:
            colours = [colour(value - 1) for value in found.labels.values()]
            message = wire.label_descriptions(
                name, found.labels, colours, (i, j, k), found.message.device
            )
            with self._lock:
                self._described[name] = what, message
                while len(self._described) > 100:
                    del self._described[next(iter(self._described))]
            self._pass_on(message, None)

    def _tell(self, device: str, code: int, name: str, text: str) -> None:
        """Send a device's STATUS when it changes."""
        if self._told.get(device) != code:
            self._told[device] = code
            while len(self._told) > 100:
                del self._told[next(iter(self._told))]
            self._pass_on(wire.status(self._mask_device(device), code, name, text), None)


class _Peer:
    """One connection's messages out: the newest, as fast as they are taken."""

    def __init__(self, link: socket.socket, seconds: float, answered: bool) -> None:
        self.answered = answered
        self._link, self._seconds = link, seconds
        self._waiting: OrderedDict[object, Message] = OrderedDict()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="write", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Send soon; a newer one of the same kind and device takes its place."""
        latest = message.type in LATEST
        key: object = (message.type, message.device) if latest else object()
        with self._changed:
            former = self._waiting.pop(key, None)
            self._bytes += len(message.raw) - (0 if former is None else len(former.raw))
            self._waiting[key] = message
            # Of the newest ones there is one of each device; one too large always fits alone.
            if self._bytes > WAITING_BYTES and not latest and len(self._waiting) > 1:
                self._cut()
            self._changed.notify()

    def end(self) -> None:
        """Send what waits, as far as it is taken at once, and close."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        self._closed = True
        self._waiting.clear()
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                _, message = self._waiting.popitem(last=False)
                self._bytes -= len(message.raw)
            try:
                send_all(self._link, message.raw, self._seconds)
            except OSError:
                with self._changed:
                    self._cut()
                return


class _Latest:
    """Results that wait to be sent: the newest of each device."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, Segmented] = OrderedDict()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, found: Segmented) -> None:
        with self._changed:
            self._waiting[found.message.device] = found
            self._changed.notify()

    def get(self) -> Segmented | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popitem(last=False)[1]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
