"""Hostile items among good ones: the good ones are done once, the others set aside with reasons."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.dicom_series import write_series
from support.hostile import KINDS, leave, picture

from recallseg import Bundle, Library
from recallseg.runtime.services.audit import verify_audit_log


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    image = picture(np.random.default_rng(999))
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as made:
        made.add(image, {"half": image > 100})
    return tmp_path / "library"


def command(tmp_path: Path, library: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "recallseg", "watch", str(tmp_path / "in"), "--library"]
    words += [str(library), "--output", str(tmp_path / "out"), "--engine", "fake", "--k", "1"]
    return [*words, "--settle", "0", "--audit", str(tmp_path / "audit.jsonl"), *more]


def campaign(tmp_path: Path, library: Path, good: int, hostile: int, timeout: float) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    rng = np.random.default_rng(20)
    wanted = set()
    for number in range(hostile):
        folder = inbox / f"ward {number % 9}"
        folder.mkdir(exist_ok=True)
        leave(folder, number, rng)
    for number in range(good):
        if number % 10 == 0:
            planes = np.stack([picture(rng).astype(np.uint16) for _ in range(2)])
            write_series(inbox / f"ward {number % 9}" / f"series {number}", planes)
        else:
            path = inbox / f"ward {number % 9}" / f"good {number:03d}.png"
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), picture(rng))
            wanted.add(path.name)
    before = time.monotonic()
    done = subprocess.run(
        command(tmp_path, library, "--once", "--json"), capture_output=True, timeout=timeout
    )
    seconds = time.monotonic() - before
    assert done.returncode == 1, done.stderr[-2000:]  # something could not be segmented
    assert b"Traceback" not in done.stderr
    *told, left_out = [json.loads(line) for line in done.stdout.splitlines()]
    images = [each["image"] for each in told if "error" not in each]
    assert len(images) == len(set(images) | set()) or len(images) > good
    assert sorted(name for name in images if name.startswith("good ")) == sorted(wanted)
    assert sum(name.startswith("MR-") for name in images) >= -(-good // 10)
    records = [json.loads(p.read_bytes()) for p in out.rglob("*.json") if ".error." not in p.name]
    assert sorted(r["image"] for r in records if r["image"].startswith("good ")) == sorted(wanted)
    errors = list(out.rglob("*.error.json"))
    assert len(errors) == sum("error" in each for each in told) > hostile // 4
    assert len(left_out["passed_over"]) > hostile // 4
    entries = verify_audit_log(tmp_path / "audit.jsonl").entries
    assert entries == len(records)

    again = subprocess.run(
        command(tmp_path, library, "--once", "--json"), capture_output=True, timeout=timeout
    )
    assert again.returncode == 0
    (told_again,) = [json.loads(line) for line in again.stdout.splitlines()]  # none is met again
    assert len(told_again["set_aside"]) == len(errors)
    assert verify_audit_log(tmp_path / "audit.jsonl").entries == entries
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{good} good, {hostile} hostile, {len(errors)} set aside: {seconds:.0f} s, {peak:.2f} GiB"
    )


def test_every_kind_once(tmp_path: Path, library: Path) -> None:
    campaign(tmp_path, library, 20, len(KINDS), 280)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_among_two_hundred(tmp_path: Path, library: Path) -> None:
    campaign(tmp_path, library, 200, 2000, 3500)


def test_a_decoder_that_hangs_is_left_when_the_watch_is_to_end(
    tmp_path: Path, library: Path
) -> None:
    """A file of zeros behind a DICOM preamble is read for ever; SIGTERM ends the watch at once."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "zeros.dcm"
    path.write_bytes(bytes(128) + b"DICM")
    os.truncate(path, 10**11)
    process = subprocess.Popen(command(tmp_path, library), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "watching" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 0
