"""Two that do the same work in turn, and what the processors do for each of them.

    PYTHONPATH=tests python -m campaigns.turns LIBRARY COUNT

is one of them: a segmenter in a process of its own, which does its part when a line comes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.services import half_volume

from recallseg import Segmenter

SIDE = 512
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """What one turn took: seconds, and seconds of processors by process."""

    seconds: float
    processors: dict[str, float]


def pictures(count: int) -> list[np.ndarray]:
    """Images that differ, so that nothing is remembered from one to the next."""
    return [half_volume(1, SIDE, number)[0] for number in range(count)]


def processors_of(process: int) -> float:
    """Seconds that processors have worked for a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def children_of(process: int) -> list[int]:
    """Processes that a process has started."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(each) for task in tasks for each in task.read_text().split()]


@contextmanager
def segmenter_alone(library: Path, count: int) -> Iterator[Callable[[], Turn]]:
    """Give what lets a segmenter in a process of its own do its part once."""
    command = [sys.executable, "-m", "campaigns.turns", str(library), str(count)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, said = process.stdin, process.stdout
        assert said.readline() == "ready\n"

        def turn() -> Turn:
            before = processors_of(process.pid)
            told.write("go\n")
            told.flush()
            seconds = float(said.readline())
            return Turn(seconds, {"segmenter": processors_of(process.pid) - before})

        try:
            yield turn
        finally:
            process.kill()


def in_turn(rounds: int, *parts: Callable[[], Turn]) -> list[list[Turn]]:
    """Let parts take turns, each second round in reverse; return the turns of each.

    What else the machine does, and whether it grows faster or slower, is so of all of them.
    """
    taken: list[list[Turn]] = [[] for _ in parts]
    for number in range(rounds):
        order = range(len(parts)) if number % 2 == 0 else reversed(range(len(parts)))
        for index in order:
            taken[index].append(parts[index]())
    return taken


def ratios(own: Sequence[Turn], other: Sequence[Turn]) -> list[float]:
    """Rates of another beside one's own, round by round: quartiles."""
    found = [one.seconds / two.seconds for one, two in zip(own, other, strict=True)]
    return [round(float(each), 3) for each in np.percentile(found, (25, 50, 75))]


def processor_ms(turns: Sequence[Turn], count: int) -> dict[str, float]:
    """Milliseconds of processors for each of ``count`` images, by process."""
    return {
        name: round(sum(turn.processors[name] for turn in turns) / len(turns) / count * 1e3, 2)
        for name in turns[0].processors
    }


def rate(turns: Sequence[Turn], count: int) -> float:
    """Images a second, by the median of turns."""
    return round(count / statistics.median(turn.seconds for turn in turns), 2)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    images = pictures(count)
    with Segmenter(folder, k=1) as segmenter:
        segmenter.warm_up()
        print("ready", flush=True)
        for _ in sys.stdin:
            begin = time.perf_counter()
            for image in images:
                segmenter.segment(image)
            print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
