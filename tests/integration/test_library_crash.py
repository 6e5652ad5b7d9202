"""Kill the writing process hundreds of times: every add that had returned is there, whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.fake_library import GEOMETRY, HashEncoder, StubBundle, draw

from recallseg.runtime.library import Library

DRIVER = Path(__file__).parents[1] / "support" / "add_until_killed.py"
KILLS = int(os.environ.get("RECALLSEG_TEST_KILLS", "120"))
"""Kills at random instants; those at every step come on top."""
MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
"""Where libraries lie in these tests: SIGKILL does not care, and fsync is fast in memory."""


class Writers:
    """A process that forks writers; see tests/support/add_until_killed.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(MEMORY or tempfile.gettempdir())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def run(self, library: Path, first: int, step: str, occurrence: int) -> tuple[list[str], bool]:
        """Let one write until it is killed; return what it said, and whether it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{library}\t{first}\t{step}\t{occurrence}\n")
        self._process.stdin.flush()
        lines = []
        while not (line := self._process.stdout.readline()).startswith("end "):
            assert line, "the process that forks writers has died"
            lines.append(line.rstrip("\n"))
        return lines, line == "end -9\n"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)
        self._process.stdout.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    process = Writers()
    yield process
    process.close()


class Crashes:
    """One library that is written and killed again and again, and what it must hold."""

    def __init__(self, path: Path, writers: Writers) -> None:
        self.path = path
        self.writers = writers
        self.kills = 0
        self.returned = 0
        self.keys: set[str] = set()
        self.next = 0
        # Small shards, so that beginning one is killed too.
        with Library.create(path, StubBundle(), encoder=HashEncoder(), shard_bytes=6000):
            pass

    def run(self, step: str, occurrence: int) -> bool:
        """Let a process write until it is killed; return whether it was."""
        lines, killed = self.writers.run(self.path, self.next, step, occurrence)
        self.kills += killed
        for line in lines:
            if line.startswith("+ "):
                self.returned += 1
                self.keys.add(line[2:])
            elif line.startswith("- "):
                self.keys.discard(line[2:])
        self.check()
        return killed

    def check(self) -> None:
        """Compare the library with what must be there. At most one change may have come on top."""
        with Library.open(self.path, mode="write", encoder=HashEncoder()) as library:
            report = library.verify()
            assert report.ok, report.problems
            found = {exemplar.key for exemplar in library}
            lost, more = self.keys - found, found - self.keys
            assert len(lost | more) <= 1, (lost, more)
            if lost:  # only a removal that was under way when the process died
                newest = max(int(key.split()[1]) for key in self.keys)
                assert newest % 5 == 4
                assert lost == {f"case {newest - 1}"}
            self.keys = found
            for key in found:
                self.compare(library, key)
            orphans = list(self.path.rglob("*.tmp"))
            assert not orphans
            sources = list((self.path / "sources").rglob("*.npz"))
            assert len(sources) == len(found)
            # Numbers that a killed add has used are free again: no exemplar is there twice.
            self.next = max((int(key.split()[1]) for key in found), default=-1) + 1
            if len(found) > 12:  # keep checks fast
                for key in sorted(found, key=lambda k: int(k.split()[1]))[:-4]:
                    library.remove(key)
                    self.keys.discard(key)
                library.compact()

    @staticmethod
    def compare(library: Library, key: str) -> None:
        number = int(key.split()[1])
        image, mask = draw(number)
        exemplar = library.get(key)
        assert exemplar.structures == (("nucleus", "wall") if number % 3 else ("nucleus",))
        assert exemplar.absent == (("cyst",) if number % 2 else ())
        assert exemplar.tags == {"n": str(number)}
        stored, masks = library.source(key)
        assert np.array_equal(stored, image)
        assert np.array_equal(masks["nucleus"], mask)
        expected = HashEncoder().encode(image, masks)
        memories = np.zeros((1, GEOMETRY.tokens, GEOMETRY.memory_dim), np.float32)
        pointers = np.zeros((1, GEOMETRY.channels), np.float32)
        for name in exemplar.structures:
            library.gather(library.memories([key], name), memories, pointers)
            assert np.allclose(memories[0], expected.memories[name], rtol=2**-10, atol=1e-6)
            assert np.array_equal(pointers[0], expected.pointers[name])
        best = library.search(expected.embedding, "nucleus", 1)[-1]
        assert best.key == key
        assert best.distance < 1e-5


def test_killed_at_random_instants(folder: Path, writers: Writers) -> None:
    crashes = Crashes(folder / "library", writers)
    chance = random.Random(7)
    while crashes.kills < KILLS:
        assert crashes.run("after", chance.randrange(0, 4_000))
    print(f"{crashes.kills} kills at random instants, {crashes.returned} adds returned, 0 lost")
    assert crashes.returned > KILLS / 10  # otherwise only start-up was killed


@pytest.mark.parametrize(
    ("step", "occurrences"),
    [
        ("write", 12),
        ("half-write", 12),
        ("fsync", 16),
        ("unlink", 8),
        ("statement", 45),
        ("append", 6),
        ("begin-shard", 3),
        ("sync-shard", 6),
    ],
)
def test_killed_at_every_step(folder: Path, writers: Writers, step: str, occurrences: int) -> None:
    crashes = Crashes(folder / "library", writers)
    for occurrence in range(1, occurrences + 1):
        assert crashes.run(step, occurrence)
    print(f"{crashes.kills} kills before '{step}', {crashes.returned} adds returned, 0 lost")


@pytest.mark.parametrize(
    ("step", "occurrences"),
    [("write", 8), ("fsync", 14), ("statement", 60), ("append", 7)],
)
def test_of_many_all_are_there_or_none(
    folder: Path, writers: Writers, step: str, occurrences: int
) -> None:
    path, known = folder / "library", set[str]()
    with Library.create(path, StubBundle(), encoder=HashEncoder(), shard_bytes=6000):
        pass
    for occurrence in range(1, occurrences + 1, 3 if step == "statement" else 1):
        lines, killed = writers.run(path, len(known), f"many-{step}", occurrence)
        assert killed
        known |= {line[2:] for line in lines if line.startswith("+ ")}
        with Library.open(path, mode="write", encoder=HashEncoder()) as library:
            assert library.verify().problems == ()
            found = {exemplar.key for exemplar in library}
            assert known <= found
            assert len(found - known) in (0, 3)
            assert len([*(path / "sources").rglob("*.npz*")]) == len(found)
            known = found
            for key in found:
                image, masks = library.source(key)
                assert np.array_equal(image, draw(int(key.split()[1]))[0])
                encoded = HashEncoder().encode(image, masks)
                assert library.search(encoded.embedding, "wall", 1)[0].key == key
                memories = np.zeros((1, GEOMETRY.tokens, GEOMETRY.memory_dim), np.float32)
                pointers = np.zeros((1, GEOMETRY.channels), np.float32)
                library.gather(library.memories([key], "wall"), memories, pointers)
                assert np.array_equal(pointers[0], encoded.pointers["wall"])
