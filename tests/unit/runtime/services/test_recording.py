"""Recordings of MRD streams where the disk is full, and services that go away."""

from __future__ import annotations

import io
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from recallseg.engines.errors import OutputError
from recallseg.runtime.services.logs import configure_logs
from recallseg.runtime.services.mrd import segmenting
from recallseg.runtime.services.mrd.recording import Recording, replay
from recallseg.runtime.services.mrd.wire import CONFIG_FILE, Message

NAMED = Message(CONFIG_FILE, struct.pack("<H", CONFIG_FILE) + b"half".ljust(1024, b"\0"))


@pytest.mark.parametrize("count", [1, 100])
def test_a_recording_for_which_there_is_no_room_ends_and_keeps_nothing_open(
    tmp_path: Path, count: int
) -> None:
    recording = Recording(tmp_path)
    recording._file.close()
    recording._file = open("/dev/full", "wb")  # noqa: SIM115
    kept = [recording.add(NAMED) for _ in range(count) if not recording._file.closed]
    assert all(kept[:-1])
    assert kept[-1] is (count == 1)  # a few bytes are held until it is closed
    recording.close()
    assert recording._file.closed


def test_a_service_that_goes_away_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "one.mrd").write_bytes(NAMED.raw)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def leave() -> None:
            link, _ = server.accept()
            link.recv(4096)
            link.close()

        leaves = threading.Thread(target=leave)
        leaves.start()
        with pytest.raises(
            OutputError, match=r"without CLOSE: the service closed the connection\."
        ):
            replay(tmp_path / "one.mrd", "127.0.0.1", server.getsockname()[1], seconds=20)
        leaves.join()


def test_a_defect_of_the_segmentation_is_told_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process writes to the service's stderr, where no word of a sender may stand."""

    def broken(link: socket.socket) -> None:
        raise KeyError("DOE^JANE")

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(segmenting, "_serve", broken)
    monkeypatch.setattr(segmenting, "bound_process", lambda *_: True)
    monkeypatch.setattr(sys, "argv", ["-c", str(theirs.detach()), "1"])
    told = io.StringIO()
    configure_logs(stream=told)
    try:
        with ours, pytest.raises(SystemExit):
            segmenting.main()
    finally:
        configure_logs()
    assert "KeyError" in told.getvalue()
    assert "DOE" not in told.getvalue() + "".join(capfd.readouterr())
