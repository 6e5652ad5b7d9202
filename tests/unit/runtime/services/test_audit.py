from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.errors import AuditError
from recallseg.runtime.services.audit import NOTHING, AuditLog, verify_audit_log

Entry = tuple[np.ndarray, np.ndarray, dict[str, Any]]


@pytest.fixture
def segmented(tmp_path: Path, fake_bundle: Bundle) -> Entry:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    image = np.full((64, 64), 30, np.uint8)
    image[:32] = 200
    library.add(image, {"top": image > 100}, tags={"patient": "Jane Doe"})
    result = Segmenter(library, k=1, engine="fake").segment(image)
    return image, result.label_map, result.to_json()


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
        writer.join(60)
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
