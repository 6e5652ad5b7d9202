"""What came of every point of a campaign, one a line, so that one that was ended goes on.

A point is a call of an operation to the system that fails in one way. It is done when nothing was
found at it; one at which something was found is tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recallseg

__all__ = ["Point", "Record", "code_digest"]


@dataclass(frozen=True)
class Point:
    """The ``number``-th call of a fault's kind in an operation."""

    operation: str
    fault: str
    number: int


class Record:
    """The file of a campaign; ``code`` is what is tried, see :func:`code_digest`."""

    def __init__(self, file: Path, code: str) -> None:
        self._code = code
        self._points: dict[Point, dict[str, Any]] = {}
        self._calls: dict[tuple[str, str], int] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                self._take(json.loads(line))
            except ValueError:  # the last one, of a campaign that was killed
                continue
        self._file = file.open("a", encoding="utf-8")

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _take(self, line: dict[str, Any]) -> None:
        if "calls" in line:
            self._calls[line["operation"], line["fault"]] = line["calls"]
        else:
            self._points[Point(line["operation"], line["fault"], line["number"])] = line

    def _write(self, line: dict[str, Any]) -> None:
        self._take(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def counted(self, operation: str, fault: str, calls: int) -> None:
        """Note how many points there are of a fault in an operation."""
        self._write({"operation": operation, "fault": fault, "calls": calls})

    def note(self, point: Point, fired: bool, outcome: str, violations: list[str]) -> None:
        """Note what came of a point."""
        self._write(
            {
                **vars(point),
                "fired": fired,
                "outcome": outcome,
                "violations": violations,
                "code": self._code,
            }
        )

    def done(self, point: Point) -> bool:
        """Whether a point was tried, and nothing found."""
        return point in self._points and not self._points[point]["violations"]

    def report(self) -> dict[str, Any]:
        """Return, of each operation, how many points there are, were tried, and came to what."""
        return {name: self._of(name) for name in dict.fromkeys(n for n, _ in self._calls)}

    def _of(self, name: str) -> dict[str, Any]:
        points = sum(calls for (operation, _), calls in self._calls.items() if operation == name)
        tried = [
            line
            for point, line in self._points.items()
            if point.operation == name and point.number <= self._calls[name, point.fault]
        ]
        counts = Counter({"cases": len(tried), "fired": sum(line["fired"] for line in tried)})
        counts.update(line["outcome"] for line in tried)
        return {
            "points": points,
            "left": max(0, points - len(tried)),
            "counts": counts,
            "code": Counter(line["code"] for line in tried),
            "violations": [text for line in tried for text in line["violations"]],
        }


def code_digest() -> str:
    """Return a digest of every module of RecallSeg that is found here."""
    digest = hashlib.sha256()
    for path in sorted(_modules(Path(recallseg.__file__).parent)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _modules(folder: Path) -> Iterator[Path]:
    for place, _, files in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in files if name.endswith(".py"))
