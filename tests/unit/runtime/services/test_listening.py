"""Connections when the system has no thread left for one."""

from __future__ import annotations

import socket
import threading

import pytest

from recallseg.runtime.services.listening import Acceptor, listen


def test_a_connection_without_a_thread_is_refused_and_the_next_one_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = threading.Event()
    acceptor = Acceptor(
        listen("127.0.0.1", 0, "--port"),
        2,
        lambda link: link.sendall(b"hello"),
        lambda link: refused.set(),
    )
    acceptor.start()
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    try:
        with socket.create_connection(("127.0.0.1", acceptor.port)) as link:
            assert link.recv(5) == b""
        assert refused.is_set()
        assert acceptor.alive()
        assert not len(acceptor)
        with socket.create_connection(("127.0.0.1", acceptor.port)) as link:
            assert link.recv(5) == b"hello"
    finally:
        acceptor.close()
        acceptor.join(5)
