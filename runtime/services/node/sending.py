"""Answers to their destinations: by C-STORE or STOW-RS, again and again until they are taken.

Each destination has a thread of its own, so that a dead one stops no other. An answer is sent at
least once and always with the same bytes; a destination that has it already takes it again.
"""

from __future__ import annotations

import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom.filereader import read_file_meta_info
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from recallseg.engines.reading import read_text
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node.answering import backoff
from recallseg.runtime.services.node.commitment import ask_for
from recallseg.runtime.services.node.database import Delivery
from recallseg.runtime.services.node.settings import (
    DicomDestination,
    RetrySettings,
    StowDestination,
)
from recallseg.runtime.services.node.store import NodeStore

__all__ = ["Sending", "sending_to"]

EXPLICIT = "1.2.840.10008.1.2.1"
_LOOK_S = 1.0
_OUR_SYNTAXES = [EXPLICIT]
Outcome = tuple[bool, str]
"""Whether an answer was taken, and what was said."""


class Sending(ABC):
    """Sends what is due to one destination, from a thread of its own."""

    commit = False

    def __init__(self, name: str, store: NodeStore, retry: RetrySettings, metrics: Metrics) -> None:
        self.name, self._store, self._retry, self._metrics = name, store, retry, metrics
        self._log = ServiceLog("node.send")
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"send to {name}", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def wake(self) -> None:
        """Look at once whether something is due."""
        self._wake.set()

    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def stop(self, seconds: float) -> None:
        """End after what is being sent."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def send_due(self) -> int:
        """Send what is due; return how many were taken."""
        due = self._store.due(self.name)
        if not due:
            return 0
        begin = time.perf_counter()
        try:
            outcomes = self._send(due)
        except Exception as error:  # whatever a destination makes a library raise
            outcomes = [(False, f"{type(error).__name__}: {error}")] * len(due)
        taken = 0
        for delivery, (ok, said) in zip(due, outcomes, strict=True):
            if ok:
                taken += 1
                self._store.delivered(delivery, commit=self.commit, note=said)
                self._metrics.done("sent")
            else:
                self.put_off(delivery, said)
        self._metrics.took("send", time.perf_counter() - begin)
        say = self._log.info if taken == len(due) else self._log.warning
        say("sent", destination=self.name, taken=taken, put_off=len(due) - taken)
        return taken

    def put_off(self, delivery: Delivery, said: str) -> None:
        """Send an answer again later, or give up until somebody says ``node retry``."""
        now = self._store.clock()
        give_up = now - delivery.first_at > self._retry.give_up_hours * 3600
        wait = backoff(self._retry, delivery.attempts)
        self._store.put_off(delivery, now + wait, printable(said), give_up=give_up)
        self._metrics.done("given up" if give_up else "put off")
        if give_up:
            self._log.error("given up", destination=self.name, job=delivery.job)

    def look(self) -> None:  # noqa: B027  # most have nothing else to do
        """Do what is due beside sending."""

    @abstractmethod
    def _send(self, due: Sequence[Delivery]) -> list[Outcome]:
        """Send; raises whatever it raises if nothing could be sent."""

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                while self.send_due() and not self._stop.is_set():
                    pass
                self.look()
            except Exception as error:  # a full disk under the database, say: it is tried again
                self._log.error("cannot send", destination=self.name, error=error)
            self._wake.wait(_LOOK_S)


class DicomSending(Sending):
    """By C-STORE, with storage commitment if that is asked for."""

    def __init__(
        self,
        name: str,
        settings: DicomDestination,
        own_title: str,
        store: NodeStore,
        retry: RetrySettings,
        metrics: Metrics,
    ) -> None:
        super().__init__(name, store, retry, metrics)
        self._settings, self._title = settings, settings.calling or own_title
        self.commit = settings.commitment

    def look(self) -> None:
        """Ask for commitment to what was taken; what was not committed in time is sent again."""
        for overdue in self._store.overdue_commitments(self.name):
            self.put_off(overdue, "no report of storage commitment came in time")
        due = self._store.to_commit(self.name)
        if not due:
            return
        uid, now = str(generate_uid(prefix=None)), self._store.clock()
        self._store.ask_commitment(due, uid, now + self._settings.commitment_s)
        try:
            ask_for(self._associate([StorageCommitmentPushModel], commitment=True), uid, due)
            self._log.info("asked for commitment", destination=self.name, answers=len(due))
        except Exception as error:  # as in send_due
            wait = backoff(self._retry, max(each.attempts for each in due))
            self._store.put_off_commitment(uid, now + wait, f"{type(error).__name__}: {error}")
            self._log.warning("commitment not asked for", destination=self.name, error=error)

    def _send(self, due: Sequence[Delivery]) -> list[Outcome]:
        """Send over one association; an answer whose file cannot be read keeps no other back."""
        unread = {each.id: _unreadable(self._store.file_of(each)) for each in due}
        classes = sorted({each.sop_class for each in due if not unread[each.id]})
        association = self._associate(classes) if classes else None
        outcomes: list[Outcome] = []
        try:
            for each in due:
                if association is None or unread[each.id]:
                    outcomes.append((False, unread[each.id]))
                    continue
                if not association.is_established:
                    outcomes.append((False, "the destination ended the association"))
                    continue
                try:
                    status = association.send_c_store(self._store.file_of(each))
                except ValueError:
                    outcomes.append((False, "the destination does not take this SOP class"))
                    continue
                code = status.get("Status")
                if code is None:
                    outcomes.append((False, "no answer in time"))
                else:
                    comment = str(status.get("ErrorComment", "") or "")
                    ok = code == 0 or code & 0xF000 == 0xB000
                    said = "" if code == 0 else f"status {code:04X} {comment}".strip()
                    outcomes.append((ok, said))
        finally:
            if association is not None and association.is_established:
                association.release()
        return outcomes

    def _associate(self, classes: Sequence[str], *, commitment: bool = False) -> Any:
        settings = self._settings
        ae = AE(self._title)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.timeout_s
        ae.connection_timeout = settings.timeout_s
        for uid in classes:
            ae.add_requested_context(uid, None if commitment else _OUR_SYNTAXES)
        roles: list[Any] = [build_role(uid, scu_role=True, scp_role=False) for uid in classes]
        association = ae.associate(
            settings.host,
            settings.port,
            ae_title=settings.ae_title,
            tls_args=None if settings.tls is None else (settings.tls.client(), settings.host),
            ext_neg=roles if commitment else None,
        )
        if not association.is_established:
            why = "refused the association" if association.is_rejected else "cannot be reached"
            raise ConnectionError(f"{self.name} {why}")
        return association


class StowSending(Sending):
    """By STOW-RS (PS3.18 10.5), one answer a request."""

    def __init__(
        self,
        name: str,
        settings: StowDestination,
        store: NodeStore,
        retry: RetrySettings,
        metrics: Metrics,
    ) -> None:
        super().__init__(name, store, retry, metrics)
        self._settings = settings

    def _send(self, due: Sequence[Delivery]) -> list[Outcome]:
        from pydicom import dcmread

        outcomes: list[Outcome] = []
        with self._client() as client:
            for each in due:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # about values of the source
                        answer = client.store_instances([dcmread(self._store.file_of(each))])
                    failed = answer.get("FailedSOPSequence") or ()
                    outcomes.append((not failed, f"status {_reason(failed)}" if failed else ""))
                except Exception as error:  # of requests, of the client
                    outcomes.append((False, f"{type(error).__name__}: {error}"))
        return outcomes

    def _client(self) -> Any:
        return _StowClient(self._settings)


class _StowClient:
    """A session and dicomweb-client's client of it."""

    def __init__(self, settings: StowDestination) -> None:
        import requests
        from dicomweb_client.api import DICOMwebClient

        self._session = session = requests.Session()
        session.trust_env = False  # no proxy but the configuration's word
        session.verify = str(settings.authorities) if settings.authorities else True
        if settings.certificate is not None:
            session.cert = (str(settings.certificate), str(settings.key or settings.certificate))
        if settings.user is not None and settings.password_file is not None:
            session.auth = (settings.user, read_text(settings.password_file).strip())
        if settings.token_file is not None:
            session.headers["Authorization"] = f"Bearer {read_text(settings.token_file).strip()}"
        self._client = DICOMwebClient(
            settings.url, session=session, timeout=(settings.timeout_s, settings.timeout_s)
        )
        self._client.set_http_retry_params(retry=False)

    def __enter__(self) -> Any:
        return self._client

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _unreadable(file: Path) -> str:
    """Return why a file cannot be sent; empty if it can.

    It is read to its end: a message that broke off in the middle would end the association for all.
    """
    try:
        read_file_meta_info(file)
        with open(file, "rb") as data:
            while data.read(2**20):
                pass
    except Exception as error:  # whatever pydicom makes of it
        return f"{type(error).__name__}: {error}"
    return ""


def _reason(failed: Any) -> str:
    return f"{int(failed[0].get('FailureReason', 0)):04X}"


def sending_to(
    name: str,
    settings: DicomDestination | StowDestination,
    own_title: str,
    store: NodeStore,
    retry: RetrySettings,
    metrics: Metrics,
) -> Sending:
    """Return what sends to a destination."""
    if isinstance(settings, DicomDestination):
        return DicomSending(name, settings, own_title, store, retry, metrics)
    return StowSending(name, settings, store, retry, metrics)
