"""What a node keeps, when the disk below it does not do what it is asked."""

from __future__ import annotations

import errno
import gc
import io
import os
import socket
import sqlite3
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pynetdicom")

from pydicom.dataset import Dataset
from pynetdicom import AE, _config, evt
from support.nodes import configured

from recallseg.engines.errors import OutputError
from recallseg.runtime.formats.dicom_headers import NotGiven
from recallseg.runtime.services import patience
from recallseg.runtime.services.logs import configure_logs
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node import store as store_module
from recallseg.runtime.services.node.answering import Decider
from recallseg.runtime.services.node.database import Answer
from recallseg.runtime.services.node.node import Node
from recallseg.runtime.services.node.objects import Spool
from recallseg.runtime.services.node.receiving import Arrivals
from recallseg.runtime.services.node.sending import EXPLICIT, sending_to
from recallseg.runtime.services.node.settings import DicomDestination, RetrySettings
from recallseg.runtime.services.node.store import NodeStore


def failing(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["make_folder", "Marks"])
def test_a_state_that_cannot_be_made_is_told_by_its_folder_and_may_be_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, what, failing)
        with pytest.raises(OutputError, match=rf"{tmp_path}.*No space left"):
            NodeStore(tmp_path / "state")
    NodeStore(tmp_path / "state").close()  # nobody holds its lock


def test_a_state_that_is_no_database_is_told_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "node.sqlite").write_bytes(b"something else " * 500)
    with pytest.raises(OutputError, match=rf"{tmp_path}.*not a database"):
        NodeStore(tmp_path, running=False)


class Full:
    """A connection of SQLite whose commits fail: it gives the transaction up, or keeps it open."""

    def __init__(self, real: sqlite3.Connection, gives_up: bool) -> None:
        self.real, self.gives_up, self.left = real, gives_up, 1

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT" and self.left:
            self.left -= 1
            if self.gives_up:
                self.real.rollback()
            raise sqlite3.OperationalError("database or disk is full")
        return self.real.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_commit_that_fails_says_why_and_lets_the_next_one_begin(
    tmp_path: Path, gives_up: bool
) -> None:
    with NodeStore(tmp_path / "state") as store:
        store._database = Full(store._database, gives_up)
        with pytest.raises(sqlite3.OperationalError, match="disk is full"):
            store.decide("series", "content", ["rule"], "decided", "")
        assert store.counts()["jobs"] == {}
        store.decide("series", "content", ["rule"], "decided", "")
        assert store.counts()["jobs"] == {"waiting": 1}


class Reader:
    """Reads headers: a picture's, but where the disk does not give them."""

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def __call__(self, path: Path) -> NotGiven | str:
        if path.parent.name in self.broken:
            return NotGiven("the disk does not give it", errno.EIO, False)
        return "it is none"

    def forget(self, files: object) -> None:
        """Know of none."""


def arrived(store: NodeStore, arrivals: Arrivals, *names: str) -> None:
    for number, series in enumerate(names):
        spool = store.incoming / "spool"
        spool.write_bytes(b"an object")
        assert store.put(spool, series, f"{number:032x}", "d" * 64, "MR", "US") == "new"
        arrivals.touch(series)


@pytest.fixture
def deciding(tmp_path: Path) -> Iterator[tuple[Decider, NodeStore, Arrivals, Reader]]:
    arrivals, reader = Arrivals(0.0), Reader()
    with NodeStore(tmp_path / "state") as store:
        made = Decider(store, arrivals, {}, reader, Metrics("node"))  # type: ignore[arg-type]
        yield made, store, arrivals, reader


Deciding = tuple[Decider, NodeStore, Arrivals, Reader]


def test_a_series_about_which_nothing_could_be_noted_is_not_forgotten(
    deciding: Deciding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    decider, store, arrivals, _ = deciding
    arrived(store, arrivals, "one", "two")
    store._database = Full(store._database, True)
    assert decider.look() == 1
    assert len(arrivals) == 1
    assert decider.look() == 1
    assert store.counts()["series"] == {"unreadable": 2}


def test_a_file_that_is_not_given_keeps_no_other_series_waiting(
    deciding: Deciding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    decider, store, arrivals, reader = deciding
    reader.broken = {"one"}
    arrived(store, arrivals, "one", "two")
    assert decider.look() == 1
    assert store.counts()["series"] == {"unreadable": 1}
    reader.broken = set()
    assert decider.look() == 1
    reader.broken = {"one"}
    assert store.retry("one") == 1  # nor where somebody asked to decide about it again
    arrived(store, arrivals, "three")
    assert decider.look() == 1
    assert store.counts()["series"] == {"again": 1, "unreadable": 2}


def test_what_is_tried_again_and_again_is_not_tried_at_every_look(deciding: Deciding) -> None:
    decider, store, arrivals, reader = deciding
    reader.broken = {"one"}
    arrived(store, arrivals, "one")
    assert decider.look() == 0
    reader.broken = set()
    assert decider.look() == 0
    assert len(arrivals) == 1


def test_a_series_that_is_deleted_while_it_arrives_keeps_no_other_waiting(
    deciding: Deciding,
) -> None:
    decider, store, arrivals, _ = deciding
    arrived(store, arrivals, "one", "two")
    assert store.remove("one") == 1
    decider.look()
    assert len(arrivals) == 0
    assert store.counts()["series"] == {"unreadable": 1}


def test_a_clock_that_was_set_back_stops_neither_commitment_nor_cleaning(tmp_path: Path) -> None:
    now = [10.0**9]
    with NodeStore(tmp_path / "state", clock=lambda: now[0]) as store:
        arrived(store, Arrivals(0.0), "one")
        store.decide("one", store.content("one")[0], ["rule"], "decided", "")
        job = store.next_job()
        assert job is not None
        answer = Answer("a.dcm", "1.2", "1.2.3")
        store.finish_job(job, [answer], ["pacs"])
        [sent] = store.due("pacs")
        store.delivered(sent, commit=True)
        store.ask_commitment([sent], "1.9", now[0] + 5)
        store.put_off_commitment("1.9", now[0] + 60, "no answer")
        now[0] -= 10**7
        store.bound_waits(300.0, 3600.0)
        assert store.to_commit("pacs") == [sent._replace(attempts=1)]
        store.delivered(sent, commit=False)
        assert store.sweep(0.0) == 9


def test_a_report_is_waited_for_as_long_as_is_configured(tmp_path: Path) -> None:
    node = configured(
        tmp_path,
        tmp_path,
        destinations={
            "pacs": {"type": "dicom", "host": "pacs", "port": 104, "ae_title": "PACS",
                     "commitment": True, "commitment_s": 30 * 86400.0}
        },
    )  # fmt: skip
    made = Node(node)
    try:
        store = made._store
        arrived(store, Arrivals(0.0), "one")
        store.decide("one", store.content("one")[0], ["half"], "decided", "")
        job = store.next_job()
        assert job is not None
        store.finish_job(job, [Answer("a.dcm", "1.2", "1.2.3")], ["pacs"])
        until = store.clock() + 30 * 86400
        store.ask_commitment(store.due("pacs"), "1.9", until)
        store.bound_waits(*made._most_waits())
        assert store._one("SELECT next_at FROM deliveries") == (until,)
    finally:
        made.stop(1)


def test_what_there_is_no_room_for_is_refused_as_that(tmp_path: Path) -> None:
    """Also where the disk cannot even take what was held of it."""
    spool = Spool(tmp_path, "1.2", "1.2.3", "1.2.840.10008.1.2", "A", "B", 100)
    spool._file.close()
    spool._file = open("/dev/full", "wb")  # noqa: SIM115
    spool.write(b"pixels")
    spool.discard()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), 0xA700), (KeyError(), 0x0110)])
def test_what_keeps_an_object_from_being_taken_is_logged_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """Else pynetdicom says 0xC211, and nobody here is told: its own log is silenced."""
    told = io.StringIO()
    configure_logs(stream=told)
    made = Node(configured(tmp_path, tmp_path))
    try:

        def broken(*_: object) -> None:
            raise error

        monkeypatch.setattr(made._receiver, "_take", broken)
        spool = Spool(tmp_path, "1.2", "1.2.3", "1.2.840.10008.1.2", "A", "B", 100)
        event = SimpleNamespace(
            request=SimpleNamespace(DataSet=spool),
            assoc=SimpleNamespace(requestor=SimpleNamespace(ae_title="MR")),
        )
        assert made._receiver._store_object(event).Status == status
        assert type(error).__name__ in told.getvalue()

        monkeypatch.setattr(made._store, "committing", broken)
        report = Dataset()
        report.TransactionUID = "1.2"
        answered = next(handle for _, handle in made._commitments.handlers())(
            SimpleNamespace(event_information=report)
        )
        assert answered == (0x0110, None)
        assert "cannot answer" in told.getvalue()
    finally:
        made.stop(1)
        configure_logs()


def test_a_node_that_cannot_be_made_listens_no_more(tmp_path: Path) -> None:
    with socket.socket() as taken, socket.socket() as free:
        for each in (taken, free):
            each.bind(("127.0.0.1", 0))
        taken.listen()
        port = free.getsockname()[1]
        free.close()
        metrics = {"port": taken.getsockname()[1]}
        for _ in range(2):
            with pytest.raises(OutputError, match="metrics cannot be served"):
                Node(configured(tmp_path, tmp_path, port=port, metrics=metrics))
    made = Node(configured(tmp_path, tmp_path, port=port))
    made.stop(1)  # one that was never started
    Node(configured(tmp_path, tmp_path, port=port)).stop(1)


def test_a_report_for_a_sender_that_is_configured_no_more_is_told_as_that(tmp_path: Path) -> None:
    told = io.StringIO()
    configure_logs(stream=told)
    made = Node(configured(tmp_path, tmp_path, commitment={}, senders=[{"ae_title": "MR"}]))
    try:
        for sender in ("MR", "GONE"):
            made._store.promise("1.2", sender, '{"kept": [], "lost": []}', failed=False)
        for promise in made._store.due_promises():
            made._commitments._report(promise)
        assert told.getvalue().count("address is not configured") == 2
        assert made.counts()["promises"] == {"waiting": 2}
    finally:
        made.stop(1)
        configure_logs()


def test_connections_that_found_no_thread_are_not_counted_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Node(configured(tmp_path, tmp_path, most_clients=1))
    try:
        server = made._receiver._server

        def no_more(*_: object, **__: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_more)
            for _ in range(50):
                with pytest.raises(RuntimeError):
                    server.process_request(None, None)
        assert server.verify_request(None, None)
    finally:
        made.stop(1)


def test_a_spool_that_cannot_be_removed_says_nothing_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked: it is collected. Warnings are errors here, those of ``__del__`` too."""
    spool = Spool(tmp_path, "1.2", "1.2.3", "1.2.840.10008.1.2", "A", "B", 100)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        del spool
        gc.collect()


class Worn(io.FileIO):
    """A file whose end the disk does not give."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 2**15:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(2**15 if size is None or size < 0 else min(size, 2**15))


def test_an_answer_whose_file_is_gone_keeps_no_other_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # as a node has it
    taken: list[str] = []

    def take(event: Any) -> int:
        taken.append(str(event.request.AffectedSOPInstanceUID))
        return 0

    pacs = AE("PACS")
    pacs.add_supported_context("1.2.840.10008.5.1.4.1.1.66.4")
    server = pacs.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)]
    )
    try:
        with NodeStore(tmp_path / "state") as store:
            arrived(store, Arrivals(0.0), "one")
            store.decide("one", store.content("one")[0], ["rule"], "decided", "")
            job = store.next_job()
            assert job is not None
            answers = [
                Answer(f"{uid}.dcm", "1.2.840.10008.5.1.4.1.1.66.4", uid)
                for uid in ("1.2.1", "1.2.2", "1.2.4", "1.2.3")
            ]
            folder = store.answers / str(job.id)
            folder.mkdir()
            (folder / answers[1].file).write_bytes(b"no DICOM")
            for answer in answers[2:]:
                whole = Spool(
                    folder, answer.sop_class, answer.sop_instance, EXPLICIT, "A", "B", 10**6
                )
                whole.write(
                    struct.pack("<HH2sH", 0x0008, 0x0018, b"UI", 6) + answer.sop_instance.encode()
                )
                whole.write(b"\0" + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 99_000))
                whole.write(bytes(99_000))
                assert whole.finish()
                whole.path.rename(folder / answer.file)
            damaged = folder / answers[2].file

            def open_worn(path: Any, *more: Any, opened: Any = open, **how: Any) -> Any:
                return Worn(path) if path == damaged else opened(path, *more, **how)

            monkeypatch.setattr("builtins.open", open_worn)
            store.finish_job(job, answers, ["pacs"])
            port = server.server_address[1]
            where = DicomDestination(type="dicom", host="127.0.0.1", port=port, ae_title="PACS")
            sending = sending_to("pacs", where, "US", store, RetrySettings(), Metrics("node"))
            assert sending.send_due() == 1
            assert taken == ["1.2.3"]
            told = {each["why"] for each in store.troubles()}
            assert any("FileNotFoundError" in why for why in told), told
            assert any("InvalidDicomError" in why for why in told), told
            assert any("Input/output error" in why for why in told), told
            (folder / answers[3].file).unlink()
            store.retry()
            assert sending.send_due() == 0  # and where nothing can be read nobody is called
    finally:
        server.shutdown()
