from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from recallseg import Bundle, Library, Segmenter
from recallseg.cli import app
from recallseg.engines.errors import AuditError, InputError
from recallseg.engines.signing import create_key
from recallseg.runtime.services import audit
from recallseg.runtime.services.audit import NOTHING, AuditLog, Bookmark, verify_audit_log
from recallseg.runtime.services.audit_keys import AuditKey, create_audit_key, read_audit_key

Entry = tuple[np.ndarray, np.ndarray, dict[str, Any]]


@pytest.fixture
def segmented(tmp_path: Path, fake_bundle: Bundle) -> Entry:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    image = np.full((64, 64), 30, np.uint8)
    image[:32] = 200
    library.add(image, {"top": image > 100}, tags={"patient": "Jane Doe"})
    result = Segmenter(library, k=1, engine="fake").segment(image)
    return image, result.label_map, result.to_audit()


@pytest.fixture
def log(tmp_path: Path, segmented: Entry) -> Path:
    """A log of five entries."""
    path = tmp_path / "audit.jsonl"
    written = AuditLog(path)
    for _ in range(5):
        written.record(*segmented)
    return path


def test_entries_are_chained(log: Path) -> None:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    summary = verify_audit_log(log)
    assert summary.entries == 5
    assert summary.newest == entries[-1]["digest"]
    assert [entry["number"] for entry in entries] == list(range(5))
    assert [entry["previous"] for entry in entries] == [
        NOTHING,
        *(entry["digest"] for entry in entries[:-1]),
    ]
    assert {"provenance", "format_version", "recalled", "quality", "time"} <= set(entries[0])


def test_no_patient_and_no_file_is_named(log: Path, tmp_path: Path) -> None:
    text = log.read_text()
    assert "Jane" not in text
    assert tmp_path.name not in text


@pytest.mark.parametrize("change", ["value", "remove", "swap", "insert", "spaces"])
def test_every_change_is_seen(log: Path, change: str) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    if change == "value":
        lines[2] = lines[2].replace(b'"flag":"', b'"flag":"x')
    elif change == "remove":
        del lines[2]
    elif change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "insert":
        lines.insert(2, lines[1])
    else:
        lines[2] = lines[2].replace(b",", b", ", 1)
    log.write_bytes(b"".join(lines))
    with pytest.raises(AuditError, match=r"line [23]"):
        verify_audit_log(log)
    with pytest.raises(AuditError):
        AuditLog(log)


def test_a_known_digest_sees_a_shortened_log(log: Path) -> None:
    newest = verify_audit_log(log).newest
    assert verify_audit_log(log, newest[:12]).entries == 5
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert verify_audit_log(log).entries == 4
    with pytest.raises(AuditError, match="cut off"):
        verify_audit_log(log, newest)


def test_a_writer_that_died_costs_only_what_it_had_not_acknowledged(
    log: Path, segmented: Entry
) -> None:
    with log.open("ab") as file:
        file.write(b'{"number":5,"previ')
    assert verify_audit_log(log).unfinished == 18
    AuditLog(log).record(*segmented)
    summary = verify_audit_log(log)
    assert (summary.entries, summary.unfinished) == (6, 0)


def _write(path: str, image: np.ndarray, result: dict[str, object]) -> None:
    log = AuditLog(path)
    for _ in range(20):
        log._append({"event": "test", **result})


def test_processes_may_share_a_log(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    context = multiprocessing.get_context("spawn")
    image = np.zeros((2, 2), np.uint8)
    writers = [context.Process(target=_write, args=(str(path), image, {"w": i})) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(300)
        assert writer.exitcode == 0
    assert verify_audit_log(path).entries == 60


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="folder that exists"):
        AuditLog(tmp_path / "nowhere" / "log")
    (tmp_path / "notes.txt").write_text("buy milk\n")
    with pytest.raises(AuditError, match="not an entry"):
        AuditLog(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "buy milk\n"
    with pytest.raises(AuditError, match="8 digits"):
        verify_audit_log(tmp_path / "notes.txt", "abc")


def test_a_full_disk_leaves_the_log_whole(
    log: Path, segmented: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    written = AuditLog(log)
    before = log.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AuditError, match="No space"):
        written.record(*segmented)
    assert log.read_bytes() == before


KEYS = ("secret", "signer")


def make_key(folder: Path, kind: str) -> tuple[AuditKey, AuditKey]:
    """Return what seals, and what checks."""
    path = folder / f"{kind}.key"
    if kind == "secret":
        create_audit_key(path)
        return read_audit_key(path), read_audit_key(path)
    create_key(path)
    return read_audit_key(path), read_audit_key(folder / f"{kind}.key.pub")


@pytest.fixture(params=KEYS)
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[AuditKey, AuditKey]:
    return make_key(tmp_path, request.param)


@pytest.fixture
def sealed(tmp_path: Path, segmented: Entry, keys: tuple[AuditKey, AuditKey]) -> Path:
    path = tmp_path / "sealed.jsonl"
    written = AuditLog(path, key=keys[0], head=tmp_path / "head")
    for _ in range(5):
        written.record(*segmented)
    return path


def forge(path: Path, line: int, **changed: Any) -> None:
    """Write what somebody without the key can: a chain that is whole."""
    entries = [json.loads(text) for text in path.read_text().splitlines()]
    entries[line] |= changed
    previous = entries[0]["previous"]
    for entry in entries:
        entry["previous"] = previous
        entry["digest"] = audit._digest_entry(entry)
        previous = entry["digest"]
    path.write_bytes(b"".join(audit._canonical(entry) + b"\n" for entry in entries))


def test_a_forged_chain_is_whole_and_its_seals_are_not(
    sealed: Path, keys: tuple[AuditKey, AuditKey]
) -> None:
    assert verify_audit_log(sealed, key=keys[1]).sealed == 5
    forge(sealed, 2, k=7)
    assert verify_audit_log(sealed).entries == 5  # the chain alone does not see it
    with pytest.raises(AuditError, match=r"line 3 is not sealed by the key .*: it is forged"):
        verify_audit_log(sealed, key=keys[1])
    with pytest.raises(AuditError, match="line 3 is not sealed"):
        AuditLog(sealed, key=keys[0])


def test_a_cut_tail_a_swap_and_an_older_copy_are_seen_by_the_head(
    sealed: Path, tmp_path: Path, keys: tuple[AuditKey, AuditKey], segmented: Entry
) -> None:
    head = tmp_path / "head"
    whole = sealed.read_text()
    lines = whole.splitlines(keepends=True)
    assert verify_audit_log(sealed, key=keys[1], head=head).entries == 5
    sealed.write_text("".join(lines[:4]))
    assert verify_audit_log(sealed, key=keys[1]).entries == 4
    with pytest.raises(AuditError, match="cut off its end, or it is another log, or an older copy"):
        verify_audit_log(sealed, key=keys[1], head=head)
    with pytest.raises(AuditError, match="cut off its end"):
        AuditLog(sealed, key=keys[0], head=head)
    sealed.unlink()
    AuditLog(sealed, key=keys[0]).record(*segmented)  # another log, by the same key
    with pytest.raises(AuditError, match="another log"):
        verify_audit_log(sealed, key=keys[1], head=head)
    sealed.write_text(whole)
    assert verify_audit_log(sealed, key=keys[1], head=head).entries == 5


def test_who_has_no_key_cannot_go_on(
    sealed: Path, tmp_path: Path, keys: tuple[AuditKey, AuditKey], segmented: Entry
) -> None:
    with pytest.raises(AuditError, match=r"is sealed by the key [0-9a-f]{16}\. Give it"):
        AuditLog(sealed)
    (tmp_path / "other").mkdir()
    other, _ = make_key(tmp_path / "other", "secret")
    with pytest.raises(AuditError, match="not sealed by the key"):
        AuditLog(sealed, key=other)
    entry = json.loads(sealed.read_text().splitlines()[-1])
    added = {"format": 2, "number": 5, "previous": entry["digest"], "event": "segment"}
    added["digest"] = audit._digest_entry(added)
    with sealed.open("ab") as file:
        file.write(audit._canonical(added) + b"\n")
    with pytest.raises(AuditError, match="line 6 has no seal, and entries before it have"):
        verify_audit_log(sealed)


def test_a_log_without_seals_is_none_of_the_key(
    log: Path, keys: tuple[AuditKey, AuditKey], segmented: Entry
) -> None:
    with pytest.raises(AuditError, match="no entry is sealed"):
        verify_audit_log(log, key=keys[1])
    AuditLog(log, key=keys[0]).record(*segmented)  # from here on it is
    assert verify_audit_log(log, key=keys[1]).sealed == 1


def test_old_logs_verify_and_go_on(tmp_path: Path, segmented: Entry) -> None:
    path = tmp_path / "old.jsonl"
    previous = NOTHING
    with path.open("wb") as file:
        for number in range(3):  # as format 1 wrote them
            entry = {"format": 1, "number": number, "time": "2025-01-01T00:00:00.000+00:00",
                     "previous": previous, "event": "segment", "k": 4}  # fmt: skip
            entry["digest"] = hashlib.sha256(
                json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
            ).hexdigest()
            file.write(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n")
            previous = str(entry["digest"])
    assert verify_audit_log(path).newest == previous
    AuditLog(path).record(*segmented)
    assert verify_audit_log(path, previous).entries == 4
    path.write_text(path.read_text().replace('"k":4', '"k":5', 1))
    with pytest.raises(AuditError, match="line 1 was changed"):
        verify_audit_log(path)


def test_rotation_keeps_the_chain(
    sealed: Path, tmp_path: Path, keys: tuple[AuditKey, AuditKey], segmented: Entry
) -> None:
    log = AuditLog(sealed, key=keys[0], head=tmp_path / "head")
    newest = verify_audit_log(sealed).newest
    aside = log.rotate()
    assert aside.name == "sealed.jsonl.000000005"
    log.record(*segmented)
    second = log.rotate()
    log.record(*segmented)
    alone = verify_audit_log(sealed, key=keys[1], head=tmp_path / "head")
    assert (alone.entries, alone.sealed) == (2, 2)
    whole = verify_audit_log(sealed, key=keys[1], before=[aside, second])
    assert (whole.entries, whole.continues) == (9, None)
    assert verify_audit_log(second).continues == newest
    with pytest.raises(AuditError, match="does not follow the one before"):
        verify_audit_log(sealed, before=[aside])
    with pytest.raises(AuditError, match="does not follow the one before"):
        verify_audit_log(sealed, before=[second, aside])
    with pytest.raises(AuditError, match="nothing to put aside"):
        AuditLog(tmp_path / "empty").rotate()


def test_a_rotation_that_was_cut_off_before_its_head_goes_on(
    sealed: Path, tmp_path: Path, keys: tuple[AuditKey, AuditKey], segmented: Entry
) -> None:
    head = tmp_path / "head"
    before = head.read_bytes()
    AuditLog(sealed, key=keys[0], head=head).rotate()
    head.write_bytes(before)  # the power was cut: it still names the last entry put aside
    AuditLog(sealed, key=keys[0], head=head).record(*segmented)
    assert verify_audit_log(sealed, key=keys[1], head=head).entries == 2


def test_a_head_that_cannot_be_written_is_told_as_that(tmp_path: Path, segmented: Entry) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(
        AuditError, match=r"the head .*gone/head .*: its folder .*gone is not there"
    ):
        AuditLog(tmp_path / "log", head=folder / "head")  # before anything is segmented
    folder.mkdir()
    log = AuditLog(tmp_path / "log", head=folder / "head")
    folder.rmdir()
    with pytest.raises(AuditError, match=r"the head .*gone/head of the audit log .* No such file"):
        log.record(*segmented)


def test_a_log_is_private_and_no_link(tmp_path: Path, segmented: Entry) -> None:
    path = tmp_path / "log"
    AuditLog(path).record(*segmented)
    assert path.stat().st_mode & 0o777 == 0o600
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AuditError, match="it is not a file"):
        AuditLog(tmp_path / "pipe")


def test_keys_of_audit_logs(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    create_audit_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="cannot be written"):
        create_audit_key(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_audit_key(path)
    path.write_text("abcd")
    path.chmod(0o600)
    with pytest.raises(InputError, match="no key of an audit log"):
        read_audit_key(path)
    create_key(tmp_path / "signer")
    with pytest.raises(AuditError, match="only checks"):
        AuditLog(tmp_path / "log", key=read_audit_key(tmp_path / "signer.pub"))


def test_the_commands(tmp_path: Path, log: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return result.exit_code, result.output

    assert run("audit", "key", tmp_path / "k")[0] == 0
    status, aside = run(
        "audit", "rotate", log, "--audit-key", tmp_path / "k", "--audit-head", tmp_path / "h"
    )
    assert status == 0
    status, text = run("audit", "verify", log, "--key", tmp_path / "k", "--head", tmp_path / "h",
                       "--before", aside.strip())  # fmt: skip
    assert status == 0
    assert "6 entries, all in order, 1 seals fit" in text
    status, text = run("audit", "verify", aside.strip())
    assert "whoever can write the file can write another chain" in text
    status, text = run("audit", "verify", aside.strip(), "--head", tmp_path / "h")
    assert status == 1
    assert "cut off its end" in text
    assert run("audit", "rotate", tmp_path / "none")[0] == 2


def test_who_reads_on_is_told_each_entry_once(tmp_path: Path) -> None:
    """Also behind an entry that was cut off, and in the log that follows a rotation."""
    log, mark = AuditLog(tmp_path / "audit.jsonl"), Bookmark()

    def new() -> list[int]:
        return [entry["item"] for entry in log.entries("reject", mark)]

    assert new() == []
    for item in (1, 2):
        log.note("reject", {"item": item})
    assert new() == [1, 2]
    assert new() == []
    log.note("accept", {"item": 3})
    with log.path.open("ab") as file:
        file.write(b'{"event": "reject", ')  # its writer died
    assert new() == []
    log.note("reject", {"item": 4})
    assert new() == [4]
    log.rotate()
    for item in range(5, 12):
        log.note("reject", {"item": item})
    assert new() == [5, 6, 7, 8, 9, 10, 11]
    text = log.path.read_bytes()
    log.path.write_bytes(text.replace(b'"item":11', b'"item":12'))
    with pytest.raises(AuditError, match="line 8 was changed"):
        new()
