"""Storage commitment (PS3.4 J): asked of destinations, and promised to senders.

As SCU, a transaction's UID is stored before the N-ACTION is sent, and the report (N-EVENT-REPORT)
may come on the same association or on another one that the destination opens to the node. As SCP,
the answer is noted before the N-ACTION is acknowledged, and sent on an association to the sender's
configured address until it is taken.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node.database import Delivery, Promise
from recallseg.runtime.services.node.settings import NodeSettings, Sender
from recallseg.runtime.services.node.store import NodeStore

__all__ = ["REPORT_MOST_S", "Commitments", "ask_for"]

_REQUEST, _ALL_KEPT, _SOME_LOST = 1, 1, 2
_NO_SUCH_OBJECT = 0x0112
_LOOK_S = 1.0
_DAY = 86400.0
_GIVE_UP_S = 3 * _DAY
REPORT_MOST_S = 300.0
"""Between two tries to send a report."""
MOST_OBJECTS = 100_000


def ask_for(association: Any, uid: str, deliveries: Iterable[Delivery]) -> None:
    """Ask on an open association to commit to answers, and release it.

    Raises
    ------
    ConnectionError
        If the destination does not acknowledge the request.
    """
    request = Dataset()
    request.TransactionUID = uid
    request.ReferencedSOPSequence = [
        _reference(each.sop_class, each.sop_instance) for each in deliveries
    ]
    try:
        status, _ = association.send_n_action(
            request, _REQUEST, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
    finally:
        if association.is_established:
            association.release()
    code = status.get("Status")
    if code != 0:
        raise ConnectionError("no answer" if code is None else f"status {code:04X}")


class Commitments:
    """Takes reports of destinations, answers requests of senders."""

    def __init__(
        self,
        settings: NodeSettings,
        store: NodeStore,
        metrics: Metrics,
        put_off: Callable[[Delivery, str], None],
    ) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        self._put_off = put_off
        self._senders: Mapping[str, Sender] = {each.ae_title: each for each in settings.senders}
        self._log = ServiceLog("node.commit")
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="commitments", daemon=True)

    def handlers(self) -> list[tuple[Any, Callable[[Any], Any]]]:
        """Return the handlers of pynetdicom's events."""
        return [
            (evt.EVT_N_EVENT_REPORT, partial(self._told, self._reported)),
            (evt.EVT_N_ACTION, partial(self._told, self._asked)),
        ]

    def start(self) -> None:
        """Begin to send reports, if senders are promised any."""
        if self._settings.commitment is not None:
            self._thread.start()

    def alive(self) -> bool:
        """Whether its thread lives, if there shall be one."""
        return self._settings.commitment is None or self._thread.is_alive()

    def stop(self, seconds: float) -> None:
        """End."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _told(self, handle: Callable[[Any], tuple[int, None]], event: Any) -> tuple[int, None]:
        """Answer an event; pynetdicom would say nothing here of what keeps us from it."""
        try:
            return handle(event)
        except Exception as error:  # a full disk under the database, say: the peer asks again
            self._log.error("cannot answer", error=error)
            return 0x0110, None

    # As the one who asked

    def _reported(self, event: Any) -> tuple[int, None]:
        try:
            report = event.event_information
            uid = str(report.TransactionUID)
            failed = {
                str(each.ReferencedSOPInstanceUID): int(each.get("FailureReason", 0))
                for each in report.get("FailedSOPSequence") or ()
            }
            kept = {
                str(each.ReferencedSOPInstanceUID)
                for each in report.get("ReferencedSOPSequence") or ()
            }
        except Exception:  # whatever a peer sends in its place
            return 0x0115, None
        asked = self._store.committing(uid)
        if not asked:
            self._log.warning("report of an unknown commitment")
            return 0x0115, None
        for delivery in asked:
            if delivery.sop_instance in kept and delivery.sop_instance not in failed:
                self._store.delivered(delivery, commit=False)
                self._metrics.done("committed")
            else:
                reason = failed.get(delivery.sop_instance, 0)
                self._put_off(delivery, f"not committed, reason {reason:04X}")
        self._log.info("committed", answers=len(asked), refused=len(failed))
        return 0x0000, None

    # As the one who promises

    def _asked(self, event: Any) -> tuple[int, None]:
        settings = self._settings.commitment
        sender = str(event.assoc.requestor.ae_title).strip()
        known = self._senders.get(sender)
        if settings is None or known is None or known.host is None or not known.port:
            self._metrics.refused("commitment")
            return 0x0110, None
        try:
            request = event.action_information
            uid = str(request.TransactionUID)
            wanted = [
                (str(each.ReferencedSOPClassUID), str(each.ReferencedSOPInstanceUID))
                for each in request.ReferencedSOPSequence
            ]
        except Exception:  # whatever a peer sends in its place
            return 0x0115, None
        if not uid or len(wanted) > MOST_OBJECTS:
            return 0x0115, None
        until = self._store.clock() + settings.keep_days * _DAY
        report: dict[str, list[list[str]]] = {"kept": [], "lost": []}
        for sop_class, sop_instance in wanted:
            mark = self._store.marks.of(sop_instance)
            here = self._store.holds(mark)
            if here:
                self._store.keep(mark, until)
            report["kept" if here else "lost"].append([sop_class, sop_instance])
        self._store.promise(uid, sender, json.dumps(report), failed=bool(report["lost"]))
        self._log.info("promised", kept=len(report["kept"]), lost=len(report["lost"]))
        self._wake.set()
        return 0x0000, None

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                for promise in self._store.due_promises():
                    self._report(promise)
            except Exception as error:  # a full disk under the database, say: it is tried again
                self._log.error("cannot report", error=error)
            self._wake.wait(_LOOK_S)

    def _report(self, promise: Promise) -> None:
        now = self._store.clock()
        sender = self._senders.get(promise.sender)
        try:
            if sender is None or sender.host is None or not sender.port:
                self._log.error("a sender's address is not configured", sender=promise.sender)
                raise ConnectionError("its address is not configured any more")
            self._send_report(promise, sender, (sender.host, sender.port))
            self._store.settle_promise(promise, "done")
        except Exception as error:  # whatever a peer makes pynetdicom raise
            given_up = now - promise.first_at > _GIVE_UP_S
            wait = min(REPORT_MOST_S, 2.0 * 2 ** min(promise.attempts, 10))
            self._store.settle_promise(promise, "failed" if given_up else "waiting", now + wait)
            self._log.warning("report not taken", sender=promise.sender, error=error)

    def _send_report(self, promise: Promise, sender: Sender, where: tuple[str, int]) -> None:
        found = json.loads(promise.report)
        report = Dataset()
        report.TransactionUID = promise.transaction_uid
        report.ReferencedSOPSequence = [_reference(*each) for each in found["kept"]]
        if found["lost"]:
            report.FailedSOPSequence = [_reference(*each) for each in found["lost"]]
            for each in report.FailedSOPSequence:
                each.FailureReason = _NO_SUCH_OBJECT
        ae = AE(self._settings.ae_title)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = self._settings.idle_s
        ae.connection_timeout = 10.0
        ae.add_requested_context(StorageCommitmentPushModel)
        association = ae.associate(
            *where,
            ae_title=sender.ae_title,
            tls_args=None if sender.tls is None else (sender.tls.client(), where[0]),
            ext_neg=[build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)],
        )
        if not association.is_established:
            raise ConnectionError("the sender cannot be reached")
        try:
            status, _ = association.send_n_event_report(
                report,
                _SOME_LOST if found["lost"] else _ALL_KEPT,
                StorageCommitmentPushModel,
                StorageCommitmentPushModelInstance,
            )
        finally:
            if association.is_established:
                association.release()
        if status.get("Status") != 0:
            raise ConnectionError("the sender did not take the report")


def _reference(sop_class: str, sop_instance: str) -> Dataset:
    made = Dataset()
    made.ReferencedSOPClassUID, made.ReferencedSOPInstanceUID = sop_class, sop_instance
    return made
