"""How far an archive is, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["Archived", "Progress"]


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes
    ----------
    found : inputs until now; more may come while ``looking``.
    done, before : with their outputs there; of them by an earlier call.
    set_aside : after bounded attempts, by this or an earlier call.
    refused : without a name or place of their own, or not there.
    passed_over : files that are no images.
    workers : that are there, or will be.
    per_second : inputs that were segmented, of late.
    end : when all that is known will be done; None while that cannot be said.
    notice : what must be said of the weights; empty before a worker is ready, or if nothing.
    """

    found: int = 0
    done: int = 0
    before: int = 0
    set_aside: int = 0
    refused: int = 0
    passed_over: int = 0
    looking: bool = True
    workers: int = 0
    per_second: float = 0.0
    end: datetime | None = None
    notice: str = ""

    def __str__(self) -> str:
        more = " so far" if self.looking else ""
        aside = f", {self.set_aside} set aside" if self.set_aside else ""
        refused = f", {self.refused} refused" if self.refused else ""
        rate = f", {self.per_second:.3g} a second" if self.per_second else ""
        end = "" if self.end is None else f", until about {self.end:%Y-%m-%d %H:%M:%S}"
        return f"{self.done} of {self.found}{more}{aside}{refused}{rate}{end}"


@dataclass(frozen=True)
class Archived:
    """What became of an archive.

    Attributes
    ----------
    progress : at the end.
    complete : False if it was told to stop before.
    set_aside : inputs that were set aside or refused, and why; at most 100, the summary has all.
    rows : of the summary.
    summary : its file.
    seconds : from the call to its end.
    provenance : digest of what made the outputs.
    """

    progress: Progress
    complete: bool
    set_aside: dict[str, str]
    rows: int
    summary: Path
    seconds: float
    provenance: str

    @property
    def failed(self) -> int:
        """How many inputs have no output, and will not get one without a person."""
        return self.progress.set_aside + self.progress.refused

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        told = self.progress
        return {
            "complete": self.complete,
            "found": told.found,
            "done": told.done,
            "before": told.before,
            "set_aside": told.set_aside,
            "refused": told.refused,
            "passed_over": told.passed_over,
            "reasons": self.set_aside,
            "per_second": round(told.per_second, 4),
            "seconds": round(self.seconds, 3),
            "rows": self.rows,
            "summary": str(self.summary),
            "provenance": self.provenance,
        }
