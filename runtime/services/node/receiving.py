"""C-ECHO and C-STORE in: an object is on the disk before it is acknowledged.

Status codes (PS3.4 B.2.3): 0000 when the file is on the disk; A700 while there is no room for it;
A900 where data set and message disagree about the class; C000, with a comment, for what cannot be
understood; 0110 (PS3.7 C.5) for a defect of ours.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

from recallseg.engines.errors import OutputError
from recallseg.runtime.formats.dicom_files import OTHERS
from recallseg.runtime.formats.dicom_headers import DicomHeader, Header, NotGiven
from recallseg.runtime.services.decoding import DecodingLimits, IsolatedDecoder
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node.guarding import Bounds, GuardedServer
from recallseg.runtime.services.node.objects import Spool
from recallseg.runtime.services.node.settings import NodeSettings
from recallseg.runtime.services.node.store import NodeStore, object_file

__all__ = ["STORAGE_CLASSES", "TRANSFER_SYNTAXES", "Arrivals", "HeaderReaders", "Receiver"]

TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.2",  # explicit VR big endian
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG, 8 bits
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS
    "1.2.840.10008.1.2.4.81",  # JPEG-LS, near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000, lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
)
"""What the readers take; the first that a sender offers is agreed on, in this order."""
_RETIRED = (
    "1.2.840.10008.5.1.4.1.1.3",  # ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.5",  # nuclear medicine
    "1.2.840.10008.5.1.4.1.1.6",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.12.3",  # X-ray angiographic bi-plane
)
_TILED = ("1.2.840.10008.5.1.4.1.1.77.1.6",)  # slides, which the readers do not take


def _storage_classes() -> tuple[str, ...]:
    from pydicom.uid import UID

    known = [UID(str(context.abstract_syntax)) for context in AllStoragePresentationContexts]
    images = [
        uid for uid in known if "Image" in uid.keyword or uid.keyword == "EnhancedUSVolumeStorage"
    ]
    return tuple(uid for uid in images if uid not in OTHERS and uid not in _TILED) + _RETIRED


STORAGE_CLASSES = _storage_classes()
"""Classes of images; reports, segmentations and plans are not offered to a sender."""
SUCCESS, OUT_OF_ROOM, WRONG_CLASS, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA900, 0xC000
DEFECT = 0x0110
_COMMENT = 64  # characters of a comment (LO)
_READERS = 2
_GREETING_S = 10.0  # a peer that connects asks for an association at once
_REMEMBERED = 20_000  # headers, of about a kilobyte
_BETWEEN_SWEEPS_S = 1.0


class Arrivals:
    """Which series are still arriving: while an association that sent of one lives, and then for
    ``quiet_s`` after its last object.
    """

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._lock = threading.Lock()
        self._open: dict[str, tuple[float, set[threading.Thread]]] = {}
        self.changed = threading.Event()
        """Set whenever a series is touched."""

    def touch(self, series: str, association: threading.Thread | None = None) -> None:
        """Note that something of a series has come."""
        with self._lock:
            senders = self._open.get(series, (0.0, set()))[1]
            senders |= set() if association is None else {association}
            self._open[series] = (time.monotonic(), senders)
        self.changed.set()

    def complete(self) -> list[str]:
        """Return, and forget, the series that are complete."""
        now = time.monotonic()
        with self._lock:
            done = [
                series
                for series, (last, senders) in self._open.items()
                if now - last >= self._quiet_s and not any(map(_lives, senders))
            ]
            for series in done:
                del self._open[series]
        return done

    def wait_s(self) -> float:
        """Return the seconds until a series may be complete."""
        now = time.monotonic()
        with self._lock:
            lasts = [last for last, _ in self._open.values()]
        return max(0.02, min((last + self._quiet_s - now for last in lasts), default=1.0))

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)


def _lives(association: threading.Thread) -> bool:
    return association.is_alive() and not getattr(association, "_ended", False)


class HeaderReaders:
    """A few processes that read headers, for many threads that ask.

    Each is started and asked by a thread that lives as long: Linux ends a process of ours with the
    thread that started it. Headers of objects that were just received are remembered by the name
    of their file, which holds the digest of its contents, so that a job need not read them again,
    until they are forgotten, or too many.
    """

    def __init__(self, limits: DecodingLimits | None = None) -> None:
        self._limits = limits
        self._own = threading.local()
        self._all: list[IsolatedDecoder] = []
        self._threads = ThreadPoolExecutor(_READERS, "header")
        self._known: OrderedDict[str, DicomHeader] = OrderedDict()

    def remember(self, name: str, header: DicomHeader) -> None:
        """Remember the header of a file whose name holds the digest of its contents."""
        self._known[name] = header
        while len(self._known) > _REMEMBERED:
            with suppress(KeyError):  # another thread was quicker
                self._known.popitem(last=False)

    def forget(self, files: Iterable[Path]) -> None:
        """Forget the headers of files that nothing waits to read; they can be read again."""
        for file in files:
            self._known.pop(file.name, None)

    def __call__(self, path: Path) -> Header:
        """Do as :func:`recallseg.runtime.formats.dicom_headers.read_header`, within limits."""
        known = self._known.get(path.name)
        return self._threads.submit(self._read, path).result() if known is None else known

    def warm_up(self, path: Path) -> None:
        """Start the processes, so that the first object need not wait for one."""
        for each in [self._threads.submit(self._read, path) for _ in range(_READERS)]:
            each.result()

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(cancel_futures=True)
        for each in self._all:
            each.close()

    def _read(self, path: Path) -> Header:
        decoder = getattr(self._own, "decoder", None)
        if decoder is None:
            decoder = self._own.decoder = IsolatedDecoder(self._limits)
            self._all.append(decoder)
        return decoder.read_header(path)


class Receiver:
    """Listens, and takes objects in.

    Parameters
    ----------
    handlers : more handlers of pynetdicom's events (storage commitment).

    Raises
    ------
    OutputError
        If the port is taken or may not be used.
    InputError
        If there is no such address, or a certificate cannot be used.
    """

    def __init__(
        self,
        settings: NodeSettings,
        store: NodeStore,
        arrivals: Arrivals,
        readers: HeaderReaders,
        metrics: Metrics,
        handlers: list[tuple[Any, Callable[[Any], Any]]],
    ) -> None:
        self._settings, self._store = settings, store
        self._arrivals, self._readers, self._metrics = arrivals, readers, metrics
        self._log = ServiceLog("node.receive")
        self.full = False
        self._swept = -_BETWEEN_SWEEPS_S
        _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
        _config.STORE_SEND_CHUNKED_DATASET = True  # answers go as they lie on the disk
        where = f"{settings.host}:{settings.port}"
        context = None if settings.tls is None else settings.tls.server()
        try:
            self._server = self._ae().make_server(
                (settings.host, settings.port),
                ssl_context=context,
                evt_handlers=[
                    (evt.EVT_C_STORE, self._store_object),
                    (evt.EVT_REJECTED, self._rejected),
                    (evt.EVT_RELEASED, self._ended),
                    (evt.EVT_ABORTED, self._ended),
                    (evt.EVT_CONN_CLOSE, self._ended),
                    (evt.EVT_ESTABLISHED, self._established),
                    *handlers,
                ],
                server_class=GuardedServer,
                bounds=Bounds(
                    settings.most_pdu_bytes,
                    settings.idle_s,
                    settings.most_clients,
                    metrics.refused,
                    self._spool,
                ),
            )
        except OSError as error:
            raise OutputError(
                f"the node cannot listen on {where}: {error.strerror or error}. Choose another "
                "node.port, or stop what uses it."
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True
        )

    def start(self) -> None:
        """Begin to take connections."""
        self._server.ae._servers.append(self._server)
        self._thread.start()

    def alive(self) -> bool:
        """Whether it listens."""
        return self._thread.is_alive()

    def stop(self, seconds: float) -> None:
        """Take no more connections; let associations end within so many seconds, then abort."""
        if self._thread.is_alive():
            self._server.shutdown()
        else:
            self._server.server_close()
        until = time.monotonic() + seconds
        while (open_now := self._server.active_associations) and time.monotonic() < until:
            time.sleep(0.05)
        for association in open_now:
            association.abort()

    def _ae(self) -> AE:
        settings = self._settings
        ae = AE(settings.ae_title)
        ae.require_called_aet = True
        ae.require_calling_aet = [sender.ae_title for sender in settings.senders]
        ae.maximum_associations = settings.most_clients
        ae.maximum_pdu_size = settings.most_pdu_bytes
        ae.network_timeout = ae.dimse_timeout = settings.idle_s
        ae.acse_timeout = min(_GREETING_S, settings.idle_s)
        ae.add_supported_context(Verification)
        for uid in STORAGE_CLASSES:
            ae.add_supported_context(uid, list(TRANSFER_SYNTAXES))
        ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        return ae

    def _spool(self, *named: str) -> Spool:
        sop_class, sop_instance, syntax, sender, called = named
        most = self._settings.most_object_bytes
        return Spool(self._store.incoming, sop_class, sop_instance, syntax, sender, called, most)

    def _store_object(self, event: Any) -> Dataset:
        begin = time.perf_counter()
        spool = event.request.DataSet
        if not isinstance(spool, Spool):
            return _status(NOT_UNDERSTOOD, "no data set")
        try:
            status, comment = self._take(event, spool)
        except (OSError, sqlite3.Error, MemoryError) as error:  # the machine, whatever it is
            self._log.error("cannot store", error=error)
            status, comment = OUT_OF_ROOM, "cannot be stored now"
        except Exception as error:  # pynetdicom would answer it without a word to anybody here
            self._log.error("defect", error=error)
            status, comment = DEFECT, "defect of the node"
        finally:
            spool.discard()
        if status != SUCCESS:
            word = {OUT_OF_ROOM: "room", WRONG_CLASS: "class", DEFECT: "defect"}.get(
                status, "not understood"
            )
            self._metrics.refused(word)
            self._log.warning(
                "refused", status=f"{status:04X}", sender=event.assoc.requestor.ae_title
            )
        self._metrics.took("receive", time.perf_counter() - begin)
        return _status(status, comment)

    def _take(self, event: Any, spool: Spool) -> tuple[int, str]:
        if spool.no_room or not self._has_room(spool):
            return OUT_OF_ROOM, "no room on the disk"
        if spool.failure:
            return NOT_UNDERSTOOD, spool.failure
        digest = spool.finish()
        if not digest:
            return OUT_OF_ROOM, "no room on the disk"
        header = self._readers(spool.path)
        request = event.request
        if isinstance(header, NotGiven):
            return OUT_OF_ROOM, "cannot be read again now"
        if not isinstance(header, DicomHeader) or not header.sop_class:
            return NOT_UNDERSTOOD, "no DICOM data set, or damaged"
        if header.sop_class != request.AffectedSOPClassUID:
            return WRONG_CLASS, "data set is of another SOP class than the message"
        if header.instance != request.AffectedSOPInstanceUID:
            return NOT_UNDERSTOOD, "data set has another SOP instance than the message"
        if header.what != "image":
            return NOT_UNDERSTOOD, "no pixels of an image"
        if not (header.series and header.study):
            return NOT_UNDERSTOOD, "no Series or Study Instance UID"
        if self._store.is_answer(header.instance):
            return NOT_UNDERSTOOD, "an answer of this node, which it does not segment"
        association = event.assoc
        series = self._store.marks.of(header.series)
        instance = self._store.marks.of(header.instance)
        self._readers.remember(object_file(instance, digest), header)
        what = self._store.put(
            spool.path,
            series,
            instance,
            digest,
            str(association.requestor.ae_title).strip(),
            str(association.acceptor.ae_title).strip(),
        )
        self._metrics.done("received" if what == "new" else what)
        if what != "same":
            self._arrivals.touch(series, association)
        if what == "replaced":
            self._log.warning("an object came again with other contents", series=series)
        return SUCCESS, ""

    def _has_room(self, spool: Spool) -> bool:
        """Whether what came may stay; what is done is removed early if that makes room."""
        size = spool.path.stat().st_size if spool.path.exists() else 0
        settings, store = self._settings, self._store

        def fits() -> bool:
            within = store.used_bytes + size <= settings.quota_bytes
            return within and store.free_bytes() >= settings.reserve_bytes

        if not fits() and time.monotonic() - self._swept > _BETWEEN_SWEEPS_S:
            self._swept = time.monotonic()
            store.sweep(0.0, to_bytes=max(0, store.used_bytes - max(10 * size, 2**20)))
        fits_now = fits()
        if self.full == fits_now:
            self._log.warning("room again" if fits_now else "no room", used_bytes=store.used_bytes)
        self.full = not fits_now
        return fits_now

    def _rejected(self, event: Any) -> None:
        self._metrics.refused("association")
        self._log.warning("association refused", sender=str(event.assoc.requestor.ae_title).strip())

    def _established(self, event: Any) -> None:
        self._metrics.clients(len(self._server.active_associations))
        self._log.debug("association", sender=str(event.assoc.requestor.ae_title).strip())

    def _ended(self, event: Any) -> None:
        event.assoc._ended = True
        self._arrivals.changed.set()


def _status(status: int, comment: str = "") -> Dataset:
    found = Dataset()
    found.Status = status
    if comment:
        found.ErrorComment = comment[:_COMMENT]
    return found
