"""In steady state a query allocates nothing that stays: seen from outside, by resident memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
import numpy as np
from recallseg import Bundle, Library, Segmenter

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

rng = np.random.default_rng(0)
images = rng.integers(0, 255, (4, 300, 400), np.uint8)
mask = np.zeros((300, 400), bool)
mask[100:200, 100:300] = True
with Library.create(sys.argv[1], Bundle.open("demo"), threads=1) as library:
    for image in images:
        library.add(image, {"a": mask, "b": ~mask})
    segmenter = Segmenter(library, k=4, threads=1)
    for i in range(10):
        segmenter.segment(images[i % 4])
    before = resident()
    for i in range(40):
        segmenter.segment(images[i % 4])
    print(before, resident(), segmenter.model.nbytes)
"""


def test_resident_memory_stays(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "library")],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, workspace = map(int, done.stdout.split())
    # One leaked mask of 120 kB a query would be 4.8 MB; a leaked workspace far more.
    assert after - before < 2_000_000
    assert before > workspace
