"""Does several things at the same time, again and again, and looks at what the process holds."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from struct import Struct
from tempfile import TemporaryFile

from recallseg.benchmarks.resident import held_bytes
from recallseg.benchmarks.schema import SoakSeries

__all__ = ["Load", "Times", "duration_series", "process_series", "reading"]

MOST_ERRORS = 20
"""Of one thing, before it is not done any more."""
MOST_GROWTH = 0.03
"""Of memory, from the second quarter of a run to its last."""
MOST_MORE = 2
"""Files and threads, likewise: clients come and go."""
MOST_SLOWER = 1.5
"""Times that a median may be in the last quarter."""
POINTS = 400
"""Of a curve."""


_PAIR = Struct("dd")


class Times:
    """When something was done, and how long it took: kept in a file.

    In memory they would be most of what grows while everything else stays as it is.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # closed when they are taken

    def add(self, seconds: float, milliseconds: float) -> None:
        """Keep one: when it was begun, and how long it took."""
        self._file.write(_PAIR.pack(seconds, milliseconds))

    def take(self) -> list[tuple[float, float]]:
        """Return all of them, once."""
        with self._file as file:
            file.seek(0)
            return [*_PAIR.iter_unpack(file.read())]


class Load:
    """Threads that do one thing each, until it is over.

    Attributes
    ----------
    counts : how often each was done.
    errors : what failed.
    spent : by what was done: seconds since the beginning, and milliseconds that it took.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.spent: dict[str, Times] = {}
        self.over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self._began

    def begin(self, name: str, act: Callable[[int], object], every: float) -> None:
        """Do ``act`` with 0, 1, 2, ... and wait ``every`` seconds in between."""
        spent = self.spent[name] = Times()

        def work() -> None:
            number = failed = 0
            while not self.over.is_set() and failed < MOST_ERRORS:
                begin = self.seconds
                try:
                    act(number)
                    self.counts[name] += 1
                    spent.add(begin, (self.seconds - begin) * 1e3)
                except Exception as error:  # whatever it is, the report tells it
                    self.errors.append(f"{name}, after {begin:.0f} s: {error!r}")
                    failed += 1
                number += 1
                self.over.wait(every)

        self._threads.append(threading.Thread(target=work, name=f"load {name}"))
        self._threads[-1].start()

    def end(self) -> None:
        """Wait until all have ended."""
        self.over.set()
        for thread in self._threads:
            thread.join()


def reading(folder: Path) -> dict[str, float]:
    """Return what this process and its children hold, and a folder on the disk, in MiB."""
    own = held_bytes() or 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    disk = 0
    for path in files:
        with suppress(OSError):  # it has just gone
            disk += path.stat().st_size
    return {
        "memory": own / 2**20,
        "memory of its processes": _children() / 2**20,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count() + _foreign_threads(),
        "on the disk": disk / 2**20,
    }


def _foreign_threads() -> int:
    """Threads that Python does not know: those of engines."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def _children() -> int:
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, IndexError):
            text = status.read_text(encoding="ascii", errors="replace")
            if int(text.split("PPid:")[1].split()[0]) == os.getpid():
                total += held_bytes(status) or 0
    return total


def process_series(readings: Sequence[tuple[float, dict[str, float]]]) -> tuple[SoakSeries, ...]:
    """Compare the second quarter of the readings with the last."""
    found = []
    for name in readings[0][1]:
        values = [taken[name] for _, taken in readings]
        early, late = map(mean, _quarters(values))
        in_memory = "memory" in name
        most: float | None = early * (1 + MOST_GROWTH) if in_memory else early + MOST_MORE
        if name == "on the disk":  # a node keeps for months what it has answered
            most = None
        unit = "MiB" if in_memory or name == "on the disk" else ""
        seconds = [at for at, _ in readings]
        found.append(_series(name, unit, early, late, most, seconds, values))
    return tuple(found)


def duration_series(spent: Mapping[str, Times]) -> tuple[SoakSeries, ...]:
    """Compare, of each thing that was done, how long it took; takes the times."""
    found = []
    for name, times in spent.items():
        pairs = times.take()
        if not pairs:
            continue
        seconds, values = [at for at, _ in pairs], [took for _, took in pairs]
        early, late = map(median, _quarters(values))
        found.append(_series(name, "ms", early, late, early * MOST_SLOWER, seconds, values))
    return tuple(found)


def _quarters(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    quarter = max(1, len(values) // 4)
    return values[quarter : 2 * quarter] or values, values[-quarter:]


def _series(
    name: str,
    unit: str,
    early: float,
    late: float,
    most: float | None,
    seconds: Sequence[float],
    values: Sequence[float],
) -> SoakSeries:
    every = max(1, len(values) // POINTS)
    return SoakSeries(
        name,
        unit,
        round(early, 3),
        round(late, 3),
        None if most is None else round(most, 3),
        tuple(round(at, 1) for at in seconds[::every]),
        tuple(round(value, 3) for value in values[::every]),
    )
