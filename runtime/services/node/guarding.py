"""pynetdicom's server, kept within bounds: hostile or broken peers cost little, and stop nobody.

pynetdicom reads as many bytes as a PDU's head claims (up to 4 GiB), for as long as a peer takes,
holds whole messages in memory, and shakes hands for TLS in the thread that accepts connections. All
of that is bounded here: a PDU by size and time, a command by size, an object goes to a file, and a
connection has a thread of its own from its first byte.
"""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, cast

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, N_EVENT_REPORT_RQ
from pynetdicom.fsm import StateMachine
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from recallseg.runtime.services.node.objects import Spool

__all__ = ["Bounds", "GuardedServer"]

_COMMAND_BYTES = 2**16
_QUICK: int | None = getattr(socket, "TCP_QUICKACK", None)
_SMALL_BYTES = 2**22  # a data set that is no object: of a commitment, say
_LEAST_PDU = 2**17  # an association request lists many transfer syntaxes
_WAITING = 8  # messages that a peer may send ahead
_REPORTS = 64  # events that one association may report
_SPARE = 16  # connections that have not asked for an association yet, beyond those that may


class Bounds:
    """What one peer may take, and who is told when it wants more.

    Attributes
    ----------
    pdu_bytes, idle_s : of one PDU.
    clients : connections at once.
    refused : is told a word for each refusal.
    spool : makes room for an object: SOP class, instance, transfer syntax, sender, called.
    """

    def __init__(
        self,
        pdu_bytes: int,
        idle_s: float,
        clients: int,
        refused: Callable[[str], None],
        spool: Callable[[str, str, str, str, str], Spool],
    ) -> None:
        self.pdu_bytes, self.idle_s, self.clients = max(pdu_bytes, _LEAST_PDU), idle_s, clients
        self.refused, self.spool = refused, spool


class _Link(AssociationSocket):
    """A connection whose PDUs are bounded in size and time."""

    bounds: Bounds

    def recv(self, nr_bytes: int) -> bytearray:
        """Return so many bytes, or fewer if the peer has gone."""
        if nr_bytes > self.bounds.pdu_bytes:
            self.bounds.refused("pdu")
            raise OSError(errno.EMSGSIZE, "a PDU longer than was agreed")
        link = cast(socket.socket, self.socket)
        buffer = bytearray(nr_bytes)
        view, got, until = memoryview(buffer), 0, monotonic() + self.bounds.idle_s
        while got < nr_bytes:
            left = until - monotonic()
            if left <= 0:
                self.bounds.refused("slow")
                raise TimeoutError("a PDU that takes too long")
            link.settimeout(left)
            try:
                count = link.recv_into(view[got:])
            except TimeoutError:
                continue
            if not count:
                break
            got += count
        if _QUICK is not None:  # or senders that write a head and a body wait 40 ms between them
            link.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)
        view.release()
        link.settimeout(self.bounds.idle_s)
        return buffer if got == nr_bytes else buffer[:got]


class _Dimse(DIMSEServiceProvider):
    """Messages of one association: commands are small, objects go to files."""

    bounds: Bounds
    _reports = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Take what a PDU holds, one part after the other."""
        for part in primitive.presentation_data_value_list:
            try:
                one = P_DATA()
                one.presentation_data_value_list = [[*part]]  # type: ignore[list-item]  # as it asks
                super().receive_primitive(one)
                within = self._is_within(part[0])
            except Exception:  # whatever hostile bytes make pynetdicom raise
                within = False
            if not within:
                self.bounds.refused("message")
                self.message = None
                self.dul.event_queue.put("Evt19")  # an invalid PDU: the association is aborted
                return

    def _is_within(self, context_id: int) -> bool:
        if self.msg_queue.qsize() > _WAITING:
            return False
        message: Any = self.message
        if message is None:  # it was whole
            return True
        if message.encoded_command_set.tell() > _COMMAND_BYTES:
            return False
        data = message.data_set
        if isinstance(message, N_EVENT_REPORT_RQ) and not data.tell():
            self._reports += 1  # each gets a thread
            return self._reports <= _REPORTS
        if isinstance(data, Spool):
            return True
        if isinstance(message, C_STORE_RQ) and not data.tell():
            command = message.command_set
            context = self.assoc._accepted_cx[context_id]
            message.data_set = self.bounds.spool(
                str(command.AffectedSOPClassUID),
                str(command.AffectedSOPInstanceUID),
                str(context.transfer_syntax[0]),
                str(self.assoc.requestor.ae_title).strip(),
                str(self.assoc.acceptor.ae_title).strip(),
            )
            return True
        return bool(data.tell() <= _SMALL_BYTES)


class _Machine(StateMachine):
    """The states of one association; what cannot follow (PS3.8 9.2) ends it at once.

    pynetdicom lets the thread die, and the association wait for it.
    """

    bounds: Bounds

    def do_action(self, event: str) -> None:
        """Do what an event asks for."""
        nothing: Any = None
        try:
            super().do_action(event)
        except Exception:  # an event out of turn, or whatever else hostile bytes lead to
            self.bounds.refused("sequence")
            self.dul._kill_thread = True
            self.dul.to_user_queue.put(nothing)  # as if no request had come in time
            return
        if self.current_state == "Sta1" and self.dul.assoc.requestor.primitive is None:
            self.dul.to_user_queue.put(nothing)  # gone before it asked: no longer waited for


class _Handler(RequestHandler):
    def _create_association(self) -> Any:
        association = super()._create_association()
        bounds = cast(GuardedServer, self.server).bounds
        link: Any = association.dul.socket
        link.__class__ = _Link  # made in there; a second one would report the connection twice
        link.bounds = bounds
        machine: Any = association.dul.state_machine
        machine.__class__, machine.bounds = _Machine, bounds
        dimse = _Dimse(association)
        dimse.bounds = bounds
        association.dimse = dimse
        return association


class GuardedServer(ThreadedAssociationServer):
    """pynetdicom's threaded server within :class:`Bounds`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any, bounds: Bounds, **options: Any) -> None:
        self.bounds = bounds
        self._greeting = 0
        self._count = threading.Lock()
        super().__init__(*arguments, **{**options, "request_handler": _Handler})

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept a connection; hands are shaken in its own thread."""
        link, address = cast(socket.socket, self.socket).accept()
        link.settimeout(self.bounds.idle_s)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Close a connection too many at once; pynetdicom refuses associations too many."""
        open_now = len(self.active_associations) + self._greeting
        if open_now >= self.bounds.clients + _SPARE:
            self.bounds.refused("connections")
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread."""
        with self._count:
            self._greeting += 1
        try:
            super().process_request(request, client_address)
        except BaseException:  # the system has no thread left: it greets nobody
            with self._count:
                self._greeting -= 1
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands, if TLS is asked for, and begin an association."""
        try:
            if self.ssl_context is not None:
                try:
                    request = self.ssl_context.wrap_socket(request, server_side=True)
                except (OSError, ssl.SSLError, ValueError):
                    self.bounds.refused("tls")
                    self.shutdown_request(request)
                    return
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._greeting -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count it; socketserver would print what the peer sent."""
        self.bounds.refused("connection")
