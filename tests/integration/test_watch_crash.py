"""A watch that is killed again and again loses nothing, and does nothing twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from recallseg import Bundle, Library
from recallseg.runtime.services.audit import verify_audit_log

IMAGES = 24
KILLS = 10


def picture(seed: int) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 60, (96, 96)).astype(np.uint8)
    image[:48] += 150
    return image


def test_a_watch_survives_being_killed(tmp_path: Path, fake_bundle: Bundle) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        library.add(picture(999), {"half": picture(999) > 100})
    inbox, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "audit.jsonl"
    inbox.mkdir()
    for i in range(IMAGES):
        cv2.imwrite(str(inbox / f"{i:02d}.png"), picture(i))
    command = [sys.executable, "-m", "recallseg", "watch", str(inbox)]
    command += ["--library", str(tmp_path / "library"), "--output", str(out), "--engine", "fake"]
    command += ["--k", "1", "--settle", "0", "--audit", str(log)]

    rng = random.Random(5)
    killed = 0
    while killed < KILLS:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        wanted = len(list(out.glob("*.json"))) + rng.randint(1, 2) if killed < KILLS - 1 else 0
        until = time.monotonic() + 300
        while len(list(out.glob("*.json"))) < min(wanted, IMAGES - 1):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.004))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert done

    finished = subprocess.run([*command, "--once"], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for i in range(IMAGES):
        record = json.loads((out / f"{i:02d}.json").read_text())
        assert record["image"] == f"{i:02d}.png"
        mask = cv2.imread(str(out / record["mask"]), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        assert mask.shape == (96, 96)
    assert not list(out.glob("*.error.json"))
    assert IMAGES <= verify_audit_log(log).entries <= IMAGES + KILLS


def test_a_watch_ends_when_it_is_told_to(tmp_path: Path, fake_bundle: Bundle) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        library.add(picture(999), {"half": picture(999) > 100})
    (tmp_path / "in").mkdir()
    command = [sys.executable, "-m", "recallseg", "watch", str(tmp_path / "in")]
    command += ["--library", str(tmp_path / "library"), "--output", str(tmp_path / "out")]
    command += ["--engine", "fake", "--k", "1", "--settle", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    cv2.imwrite(str(tmp_path / "in" / "late.png"), picture(1))
    assert json.loads(process.stdout.readline())["image"] == "late.png"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, ""), err
