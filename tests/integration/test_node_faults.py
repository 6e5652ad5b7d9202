"""What goes wrong around a DICOM node, with dcmtk as its peers."""

from __future__ import annotations

import errno
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from campaigns.node import association_request, hostile_bytes
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from support.certificates import Authority
from support.dicom_peers import DCMTK, dcmtk, free_port, program
from support.dicom_series import write_object, write_series
from support.nodes import configured, running
from support.services import half_library, half_volume, wait_until
from typer.testing import CliRunner

from recallseg import Bundle
from recallseg.cli import app
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.dicom_headers import Header, NotGiven
from recallseg.runtime.formats.finding import Finding, PassedOver
from recallseg.runtime.services.node import answering
from recallseg.runtime.services.node.node import Node
from recallseg.runtime.services.node.receiving import HeaderReaders
from recallseg.runtime.services.node.store import NodeStore
from recallseg.runtime.services.patience import MOST_TIMES

pytestmark = [
    DCMTK,
    # pynetdicom lets go of the socket of a refused connection without closing it
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
REPORT = "1.2.840.10008.5.1.4.1.1.88.11"


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    return half_library(tmp_path / "library", fake_bundle)


@contextmanager
def storescp(folder: Path, port: int, *options: object) -> Iterator[Path]:
    """Run dcmtk's receiver; yields the folder where it leaves what it gets."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [program("storescp"), *map(str, options), "-od", str(folder), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _listens(port))
        yield folder
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0


def to(port: int, **more: Any) -> dict[str, Any]:
    return {"p": {"type": "dicom", "host": "127.0.0.1", "port": port, "ae_title": "P", **more}}


def received(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state" / "received").rglob("*.dcm"))


def test_who_and_what_is_not_to_be_taken_is_refused(tmp_path: Path, library: Path) -> None:
    files = write_series(tmp_path / "s", half_volume(2, side=256))
    report = write_object(tmp_path / "report.dcm", REPORT, StudyInstanceUID=generate_uid())
    settings = configured(
        tmp_path,
        library,
        senders=[{"ae_title": "SCANNER1"}],
        most_object_bytes=100_000,
        idle_s=2,
        most_clients=4,
    )
    with running(settings) as node:
        told = dcmtk("echoscu", node.port, "-aet", "SCANNER1", called="WRONG")
        assert "Called AE Title Not Recognized" in told
        assert "Calling AE Title Not Recognized" in dcmtk("echoscu", node.port, "-aet", "NOBODY")
        assert dcmtk("echoscu", node.port, "-aet", "SCANNER1").startswith("0")
        told = dcmtk("storescu", node.port, "-aet", "SCANNER1", report)
        assert "No presentation context" in told or "No Acceptable Presentation Contexts" in told
        told = dcmtk("storescu", node.port, "-aet", "SCANNER1", files[0])
        assert "CannotUnderstand" in told
        assert not received(tmp_path)

        # Half an object, an object that says it is another, one that is none, one without pixels.
        ae = AE("SCANNER1")
        ae.add_requested_context("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.1")
        whole = pydicom.dcmread(write_series(tmp_path / "t", half_volume(1))[0])
        association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
        for part in list(_message(whole, {}).encode_msg(1, 2000))[:3]:
            association.dul.send_pdu(part)
        wait_until(lambda: list((tmp_path / "state" / "incoming").iterdir()))
        association.abort()
        wait_until(lambda: not list((tmp_path / "state" / "incoming").iterdir()))
        association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
        for change, status in (
            ({"SOPInstanceUID": generate_uid()}, 0xC000),
            ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, 0xA900),
            ({"Rows": None}, 0xC000),
            ({"SeriesInstanceUID": None}, 0xC000),
            (None, 0xC000),
        ):
            found = _send(association, whole, change)
            assert found.Status == status, change
            assert found.ErrorComment
        association.release()
        assert not received(tmp_path)

        # Hostile peers, and some who say nothing, while an honest one is served.
        chance = random.Random(3)
        silent = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(6)]
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", node.port)) as link:
                link.sendall(hostile_bytes(chance, association_request()))
        wait_until(lambda: dcmtk("echoscu", node.port, "-aet", "SCANNER1").startswith("0"))
        for link in silent:
            link.close()
        text = node.metrics.text().decode()
        assert 'reason="pdu"' in text
        assert node.alive()


def _message(dataset: Any, change: dict[str, Any] | None) -> Any:
    from io import BytesIO

    from pynetdicom.dsutils import encode

    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = dataset.SOPClassUID
    request.AffectedSOPInstanceUID = dataset.SOPInstanceUID
    if change is None:
        request.DataSet = BytesIO(b"\xff" * 3000)
    else:
        other = pydicom.Dataset(dataset)
        for name, value in change.items():
            if value is None:
                del other[name]
            else:
                setattr(other, name, value)
        request.DataSet = BytesIO(encode(other, False, True) or b"")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return message


def _send(association: Any, dataset: Any, change: dict[str, Any] | None) -> Any:
    association._reactor_checkpoint.clear()  # or it takes the answer, as send_c_store knows
    wait_until(lambda: association._is_paused)
    for part in _message(dataset, change).encode_msg(1, 16000):
        association.dul.send_pdu(part)
    answer = association.dimse.get_msg(block=True)[1]
    association._reactor_checkpoint.set()
    return answer


def test_no_room_is_told_before_it_is_used_up_and_ends_when_there_is_some(
    tmp_path: Path, library: Path
) -> None:
    files = write_series(tmp_path / "s", half_volume(12))  # 8 KiB each
    settings = configured(tmp_path, library, quota_bytes=60_000, rule={"when": {"modality": "XX"}})
    with running(settings) as node:
        told = dcmtk("storescu", node.port, "-nh", *files)
        assert "OutOfResources" in told
        kept = len(received(tmp_path))
        assert 4 <= kept < 12
        assert sum(f.stat().st_size for f in received(tmp_path)) <= 60_000
        assert node.metrics.waits()["room"] == "room on the disk"
        wait_until(lambda: node.counts()["series"] == {"unmatched": 1})
        (aside,) = node.troubles()
        with NodeStore(tmp_path / "state", running=False) as store:
            assert store.remove(aside["series"]) == kept
        node.sweep()
        assert dcmtk("storescu", node.port, *files[:3]).startswith("0")
        assert "room" not in node.metrics.waits()


def test_a_disk_that_is_really_full_is_told_and_lives_on(tmp_path: Path, library: Path) -> None:
    disk = tmp_path / "state"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        files = write_series(tmp_path / "s", half_volume(30, side=128))  # 32 KiB each
        with running(configured(tmp_path, library, rule={"when": {"modality": "XX"}})) as node:
            told = dcmtk("storescu", node.port, "-nh", *files)
            assert "OutOfResources" in told
            stored = told.count("(Success)")
            assert 5 < stored == len(received(tmp_path))
            for left in received(tmp_path)[:20]:
                left.unlink()  # somebody frees the disk
            more = write_series(tmp_path / "t", half_volume(5, side=128))
            assert dcmtk("storescu", node.port, *more).startswith("0")
            assert node.alive()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_no_rule_fits_is_kept_and_listed_and_answered_when_one_does(
    tmp_path: Path, library: Path
) -> None:
    write_series(tmp_path / "s", half_volume(2))
    config = tmp_path / "node.toml"
    config.write_text(f'state = "{tmp_path}/state"\n')
    with running(configured(tmp_path, library, rule={"when": {"modality": "CT"}})) as node:
        dcmtk("storescu", node.port, "+sd", tmp_path / "s")
        wait_until(lambda: node.counts()["series"] == {"unmatched": 1})
        done = CliRunner().invoke(app, ["node", "status", "--config", str(config)])
        assert "1 unmatched" in done.output
        assert "no rule fits modality 'MR'" in done.output
        with pytest.raises(InputError, match="another node runs"):
            Node(configured(tmp_path, library))
    port = free_port()
    settings = configured(tmp_path, library, destinations=to(port))
    with storescp(tmp_path / "out", port) as out, running(settings) as node:
        done = CliRunner().invoke(app, ["node", "retry", "--config", str(config)])
        assert done.output == "1 to be tried again\n"
        wait_until(lambda: list(out.iterdir()))
        wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
        assert node.troubles() == []


def test_two_senders_of_one_series_give_one_answer(tmp_path: Path, library: Path) -> None:
    files = write_series(tmp_path / "s", half_volume(6))
    with running(configured(tmp_path, library, idle_s=300)) as node:
        # As long as this one is there, however long the two take, the series is not complete.
        one = pydicom.dcmread(files[0])
        ae = AE("C")
        ae.add_requested_context(one.SOPClassUID, one.file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
        assert association.send_c_store(one).Status == 0
        first = subprocess.Popen(
            [
                program("storescu"),
                "-aec",
                "RECALLSEG",
                "-aet",
                "A",
                "127.0.0.1",
                str(node.port),
                *map(str, files[:4]),
            ]
        )
        assert dcmtk("storescu", node.port, "-aet", "B", *files[2:]).startswith("0")
        assert first.wait(300) == 0
        association.release()
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})
        time.sleep(0.5)
        assert node.counts()["jobs"] == {"made": 1}
    (answer,) = (tmp_path / "state" / "answers").rglob("*.seg.dcm")
    assert len(pydicom.dcmread(answer).PerFrameFunctionalGroupsSequence) == 6


def test_a_series_that_changes_while_it_is_segmented_is_answered_as_a_whole(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_series(tmp_path / "s", half_volume(4))
    real = answering.segment_to_files
    port = free_port()
    with storescp(tmp_path / "out", port) as out:
        with running(configured(tmp_path, library, destinations=to(port))) as node:

            def slow(*arguments: Any, **options: Any) -> Any:
                monkeypatch.setattr(answering, "segment_to_files", real)
                dcmtk("storescu", node.port, files[3])
                return real(*arguments, **options)

            monkeypatch.setattr(answering, "segment_to_files", slow)
            dcmtk("storescu", node.port, *files[:3])
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
            assert node.counts()["jobs"] == {"made": 1, "superseded": 1}
        (answer,) = out.iterdir()
        assert len(pydicom.dcmread(answer).PerFrameFunctionalGroupsSequence) == 4


def test_what_cannot_be_segmented_is_set_aside_with_the_reason(
    tmp_path: Path, library: Path
) -> None:
    files = write_series(tmp_path / "s", half_volume(5))
    files[2].unlink()
    for file in tmp_path.glob("s/*"):
        if abs(pydicom.dcmread(file).ImagePositionPatient[2] - 26.0) < 0.1:
            file.unlink(missing_ok=True)  # now a slice is missing in the middle
    config = tmp_path / "node.toml"
    config.write_text(f'state = "{tmp_path}/state"\n')
    with running(configured(tmp_path, library)) as node:
        dcmtk("storescu", node.port, "+sd", tmp_path / "s")
        wait_until(lambda: node.counts()["jobs"].get("failed") == 1)
        done = CliRunner().invoke(app, ["node", "quarantine", "--config", str(config), "--json"])
        assert "not segmented" in done.output
        (series,) = {each["series"] for each in node.troubles()}
        asked = ["node", "quarantine", "--config", str(config), "--remove", series]
        assert CliRunner().invoke(app, asked).exit_code == 0
        assert not received(tmp_path)
        assert CliRunner().invoke(app, asked).exit_code == 1


def test_headers_are_remembered_no_longer_than_something_waits_to_read_them(
    tmp_path: Path, library: Path
) -> None:
    write_series(tmp_path / "s", half_volume(2))
    write_series(tmp_path / "t", half_volume(2), Modality="CT", SeriesInstanceUID=generate_uid())
    with running(configured(tmp_path, library, rule={"when": {"modality": "MR"}})) as node:
        dcmtk("storescu", node.port, "+sd", "+r", tmp_path / "s", tmp_path / "t")
        wait_until(lambda: node.counts()["series"] == {"decided": 1, "unmatched": 1})
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})
        wait_until(lambda: not node._readers._known)


def test_a_job_whose_folder_is_not_given_is_put_off(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_series(tmp_path / "s", half_volume(4))
    real, asked = answering.find_in_folder, []

    def find(folder: Path, **named: Any) -> Finding:
        found = real(folder, **named)
        asked.append(folder)
        if len(asked) > 1:
            return found
        lacks = PassedOver(folder, "cannot be looked into: Input/output error", unseen=True)
        return replace(found, items=(), passed=(lacks,), not_given=(lacks,))

    monkeypatch.setattr(answering, "find_in_folder", find)
    with running(configured(tmp_path, library)) as node:
        dcmtk("storescu", node.port, *files)
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})
    assert len(asked) == 2


@pytest.mark.parametrize(
    "told", [None, "its header is damaged", NotGiven("Input/output error", errno.EIO)], ids=str
)
def test_no_answer_is_made_without_an_object_that_was_acknowledged(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, told: Header
) -> None:
    files = write_series(tmp_path / "s", half_volume(4))
    asked, real = [], HeaderReaders.__call__

    def read(readers: HeaderReaders, path: Path) -> Header:
        again = path.parent.parent.name == "work"
        asked.append(again)
        return told if again and sum(asked) == len(files) else real(readers, path)

    monkeypatch.setattr(HeaderReaders, "remember", lambda *_: None)  # as after a restart
    monkeypatch.setattr(HeaderReaders, "__call__", read)
    port = free_port()
    with storescp(tmp_path / "out", port) as out:
        with running(configured(tmp_path, library, destinations=to(port))) as node:
            dcmtk("storescu", node.port, *files)
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
            assert node.counts()["jobs"] == {"made": 1}
        (answer,) = out.iterdir()
        assert len(pydicom.dcmread(answer).PerFrameFunctionalGroupsSequence) == 4
    assert sum(asked) == 2 * len(files), "put off once"


def test_what_the_disk_does_not_give_back_is_refused_as_no_fault_of_the_object(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look at what was received, and the look that decides which rule it is for."""
    (file,) = write_series(tmp_path / "s", half_volume(1))
    asked, real = [], HeaderReaders.__call__

    def read(readers: HeaderReaders, path: Path) -> Header:
        asked.append(path.parent.name == "incoming")
        first = asked.count(asked[-1]) == 1
        return NotGiven("EIO", errno.EIO) if first else real(readers, path)

    monkeypatch.setattr(HeaderReaders, "remember", lambda *_: None)
    monkeypatch.setattr(HeaderReaders, "__call__", read)
    with running(configured(tmp_path, library)) as node:
        ae = AE("SCANNER")
        ae.add_requested_context("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.1.2.1")
        association = ae.associate("127.0.0.1", node.port, ae_title="RECALLSEG")
        statuses = [association.send_c_store(pydicom.dcmread(file)).Status for _ in range(2)]
        association.release()
        assert statuses == [0xA700, 0], "out of resources, and not: cannot understand"
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})
        assert "unreadable" not in str(node.counts())
    assert asked.count(False) > 1


def test_what_always_finds_too_little_memory_is_given_up_and_told(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_series(tmp_path / "s", half_volume(2))
    asked: list[int] = []

    def segment(*_: Any, **__: Any) -> Any:
        asked.append(1)
        raise MemoryError

    monkeypatch.setattr(answering, "segment_to_files", segment)
    monkeypatch.setattr(answering, "backoff", lambda *_: 0.01)
    with running(configured(tmp_path, library)) as node:
        dcmtk("storescu", node.port, *files)
        wait_until(lambda: node.counts()["jobs"] == {"failed": 1})
        assert len(asked) == MOST_TIMES
        (trouble,) = node.troubles()
        assert f"({MOST_TIMES} attempts)" in str(trouble["why"])
        assert "memory" in str(trouble["why"])


def test_a_library_that_is_away_is_waited_for(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "s", half_volume(2))
    with running(configured(tmp_path, library)) as node:
        library.rename(tmp_path / "away")
        dcmtk("storescu", node.port, "+sd", tmp_path / "s")
        wait_until(lambda: any("library" in each["why"] for each in node.troubles()))
        assert node.counts()["jobs"] == {"waiting": 1}
        (tmp_path / "away").rename(library)
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})


def test_tls_takes_certificates_of_its_authority_only(tmp_path: Path, library: Path) -> None:
    ours, others = Authority(tmp_path), Authority(tmp_path, "others")
    (cert, key), (good, good_key) = ours.issue("node"), ours.issue("scanner")
    bad, bad_key = others.issue("stranger")
    tls = {"certificate": cert, "key": key, "authorities": ours.file}
    write_series(tmp_path / "s", half_volume(2))
    port = free_port()
    with storescp(tmp_path / "out", port, "+tls", good_key, good, "+cf", ours.file) as out:
        settings = configured(tmp_path, library, tls=tls, destinations=to(port, tls=tls))
        with running(settings) as node:
            stuck = socket.create_connection(("127.0.0.1", node.port))  # shakes no hands
            ask = ("+cf", ours.file)
            assert not dcmtk("echoscu", node.port).startswith("0")
            assert not dcmtk("echoscu", node.port, "+tls", bad_key, bad, *ask).startswith("0")
            assert not dcmtk("echoscu", node.port, "+tla", *ask).startswith("0")  # without any
            sent = dcmtk("storescu", node.port, "+tls", good_key, good, *ask, "+sd", tmp_path / "s")
            assert sent.startswith("0"), sent
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
            (answer,) = (tmp_path / "state" / "answers").rglob("*.seg.dcm")
            with NodeStore(tmp_path / "state", running=False) as store:
                assert store.is_answer(str(pydicom.dcmread(answer).SOPInstanceUID))
            stuck.close()
            assert 'reason="tls"' in node.metrics.text().decode()
        assert len(list(out.iterdir())) == 1


def test_a_destination_that_is_dead_for_an_hour_loses_nothing(
    tmp_path: Path, library: Path
) -> None:
    moved = [0.0]
    port = free_port()
    settings = configured(
        tmp_path,
        library,
        destinations=to(port, timeout_s=2),
        retry={"first_s": 60, "most_s": 300, "give_up_hours": 2},
    )
    with running(settings, clock=lambda: time.time() + moved[0]) as node:
        for number in range(3):
            write_series(tmp_path / str(number), half_volume(2, seed=number))
            dcmtk("storescu", node.port, "+sd", tmp_path / str(number))
            wait_until(lambda: node.counts()["jobs"] == {"made": number + 1})  # noqa: B023
        wait_until(lambda: len([t for t in node.troubles() if t["attempts"] == 1]) == 3)
        for minutes in (10, 30):  # waits in between, and no more than it has to
            moved[0] = minutes * 60.0
            wait_until(lambda: all(t["attempts"] > minutes / 20 for t in node.troubles()))  # noqa: B023
        with storescp(tmp_path / "out", port) as out:
            moved[0] = 3600.0
            wait_until(lambda: node.counts()["deliveries"] == {"done": 3})
            assert len(list(out.iterdir())) == 3
        moved[0] = 4000.0
        write_series(tmp_path / "late", half_volume(2, seed=9))
        dcmtk("storescu", node.port, "+sd", tmp_path / "late")
        wait_until(lambda: node.counts()["jobs"] == {"made": 4})
        wait_until(lambda: [t["state"] for t in node.troubles()] == ["delivery waiting"])
        moved[0] += 3 * 3600.0
        wait_until(lambda: node.counts()["deliveries"].get("failed") == 1)
        with storescp(tmp_path / "out", port):
            with NodeStore(tmp_path / "state", running=False) as store:
                assert store.retry() == 1
            wait_until(lambda: node.counts()["deliveries"] == {"done": 4})
        moved[0] += 25 * 3600.0  # all is done, and long enough ago
        node.sweep()
        assert not received(tmp_path)
        assert not list((tmp_path / "state" / "answers").iterdir())
        # A late object of a series that has gone is not taken for the whole of it.
        files = list((tmp_path / "late").iterdir())
        late = write_series(tmp_path / "later", half_volume(1, seed=5))[0]
        again = pydicom.dcmread(late)
        again.SeriesInstanceUID = pydicom.dcmread(files[0]).SeriesInstanceUID
        again.save_as(late)
        dcmtk("storescu", node.port, late)
        wait_until(lambda: any(t["state"] == "incomplete" for t in node.troubles()))


def test_answers_that_a_killed_node_had_made_are_sent_as_they_are(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "s", half_volume(2))
    port = free_port()
    settings = configured(tmp_path, library, destinations=to(port))

    class KilledError(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("threading.excepthook", lambda _: None)
        patch.setattr(NodeStore, "finish_job", killed)
        with running(settings) as node:
            dcmtk("storescu", node.port, "+sd", tmp_path / "s")
            wait_until(lambda: not node.alive())
    (made,) = (tmp_path / "state" / "answers").rglob("*.seg.dcm")
    before = made.read_bytes()
    shutil.rmtree(tmp_path / "s")
    with storescp(tmp_path / "out", port) as out:
        with running(settings) as node:
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
        (sent,) = out.iterdir()
    assert made.read_bytes() == before
    ours, theirs = pydicom.dcmread(made), pydicom.dcmread(sent)
    assert ours.SOPInstanceUID == theirs.SOPInstanceUID
    assert ours == theirs


def test_what_was_acknowledged_is_answered_after_a_start_without_the_database(
    tmp_path: Path, library: Path
) -> None:
    write_series(tmp_path / "s", half_volume(3))
    with running(configured(tmp_path, library, quiet_s=60.0)) as node:
        dcmtk("storescu", node.port, "-aet", "SCANNER1", "+sd", tmp_path / "s")
    for left in (tmp_path / "state").glob("node.sqlite*"):
        left.unlink()  # files are the truth
    rule = {"when": {"sender": "SCANNER1", "called": "RECALLSEG"}}
    with running(configured(tmp_path, library, rule=rule)) as node:
        wait_until(lambda: node.counts()["jobs"] == {"made": 1})


def test_a_port_in_use_is_told(tmp_path: Path, library: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"cannot listen on 127.0.0.1:{port}"):
            Node(configured(tmp_path, library, port=port))
    with pytest.raises(InputError, match="a section"):
        Node(configured(tmp_path, library).model_copy(update={"node": None}))


def test_an_archive_of_dcmtk_takes_answers_and_gives_them_back(
    tmp_path: Path, library: Path
) -> None:
    port = free_port()
    (tmp_path / "db").mkdir()
    (tmp_path / "qr.cfg").write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
        "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nP {tmp_path}/db RW (9, 1024mb) ANY\nAETable END\n"
    )
    archive = subprocess.Popen([program("dcmqrscp"), "-c", str(tmp_path / "qr.cfg")])
    try:
        wait_until(lambda: _listens(port))
        write_series(tmp_path / "s", half_volume(2))
        with running(configured(tmp_path, library, destinations=to(port))) as node:
            dcmtk("storescu", node.port, "+sd", tmp_path / "s")
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})
        found = subprocess.run(
            [program("findscu"), "-S", "-aec", "P", "-k", "QueryRetrieveLevel=STUDY", "-k",
             "ModalitiesInStudy", "-k", "StudyInstanceUID", "127.0.0.1", str(port)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        study = str(pydicom.dcmread(next((tmp_path / "s").iterdir())).StudyInstanceUID)
        assert study in found.stdout + found.stderr
    finally:
        archive.kill()
        archive.wait()


SYNTAXES = {
    "explicit": (["dcmconv", "+te"], "-xe"),
    "big endian": (["dcmconv", "+tb"], "-xb"),
    "implicit": (["dcmconv", "+ti"], "-xi"),
    "deflated": (["dcmconv", "+td"], "-xd"),
    "rle": (["dcmcrle"], "-xr"),
    "jpeg lossless": (["dcmcjpeg", "+e1"], "-xs"),
    "jpeg-ls": (["dcmcjpls"], "-xt"),
    "jpeg 2000": ([str(Path(sys.prefix, "bin", "gdcmconv")), "--j2k"], "-xv"),
}


def test_every_syntax_that_is_agreed_on_is_read(tmp_path: Path, library: Path) -> None:
    image = half_volume(2)
    with running(configured(tmp_path, library, quiet_s=1.0)) as node:
        for number, (command, option) in enumerate(SYNTAXES.values()):
            for file in write_series(tmp_path / f"plain{number}", image):
                packed = tmp_path / f"packed{number}" / file.name
                packed.parent.mkdir(exist_ok=True)
                subprocess.run([*command, str(file), str(packed)], check=True, capture_output=True)
            told = dcmtk("storescu", node.port, option, "+sd", packed.parent)
            assert told.startswith("0"), (command, told)
        wait_until(lambda: sum(node.counts()["jobs"].values()) == len(SYNTAXES))
        wait_until(lambda: not node.counts()["jobs"].get("waiting"))
        assert node.troubles() == []
        answers = list((tmp_path / "state" / "answers").rglob("*.seg.dcm"))
        frames = {pydicom.dcmread(a).pixel_array.tobytes() for a in answers}
        assert len(answers) == len(SYNTAXES)
        assert len(frames) == 1  # the same voxels, whatever they were packed in


def test_what_was_promised_is_kept_and_a_clock_that_was_set_back_does_not_stop_it(
    tmp_path: Path,
) -> None:
    now = [1e9]
    with NodeStore(tmp_path / "state", clock=lambda: now[0]) as store:
        for name in ("a", "b"):
            spool = store.incoming / "x"
            spool.write_bytes(name.encode() * 100)
            assert store.put(spool, name * 32, name * 32, name * 64, "S", "R") == "new"
            store.decide(name * 32, store.content(name * 32)[0], [], "decided", "")
        store.keep("a" * 32, now[0] + 1000)
        now[0] += 500
        assert store.sweep(100) == 100
        assert store.holds("a" * 32)
        assert not store.holds("b" * 32)
        assert store.content("b" * 32)[1] is False
        now[0] += 600
        assert store.sweep(100) == 100
        now[0] += 91 * 86400
        store.sweep(100)
        assert store.counts()["series"] == {}

        spool.write_bytes(b"c")
        store.put(spool, "c" * 32, "c" * 32, "c" * 64, "S", "R")
        store.decide("c" * 32, store.content("c" * 32)[0], ["r"], "decided", "")
        job = store.next_job()
        assert job is not None
        store.put_off_job(job, now[0] + 300, "why")
        now[0] -= 10**6
        assert store.next_job() is None
        store.bound_waits(300.0, 3600.0)
        assert store.next_job() is not None
