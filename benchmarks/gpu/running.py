"""Pieces of ``bench gpu``, over several calls: each leaves a file, and is lost alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from recallseg.benchmarks.gpu.pieces import Piece, Step
from recallseg.engines.durable import replace_file
from recallseg.engines.errors import EngineUnavailableError, InputError, RecallSegError

__all__ = ["Outcome", "here", "measure_piece", "run_pieces", "write_outcome"]

SCHEMA = "recallseg-gpu-piece/1"
CUT_OFF = "the process ended while this was measured; remove {file} to measure it again"
LEAST_SECONDS = 30.0
"""With less of a call's time left no piece is begun."""


@dataclass(frozen=True)
class Outcome:
    """A piece that was done, or why not.

    ``state`` is ``measured``; ``empty`` where this machine cannot run it; ``failed`` where it
    should have run. ``reason`` says why, ``found`` holds the figures.
    """

    piece: str
    state: str
    reason: str = ""
    found: Any = None


Run = Callable[[Piece, Path, float, Step], str]
"""Measures a piece, within seconds, and writes its file; returns why it has not, or nothing."""


def measure_piece(piece: Piece, step: Step) -> Outcome:
    """Measure a piece; what it raises becomes its outcome."""
    try:
        piece.check()
        return Outcome(piece.name, "measured", found=piece.measure(step))
    except EngineUnavailableError as error:
        return Outcome(piece.name, "empty", str(error))
    except RecallSegError as error:
        return Outcome(piece.name, "failed", str(error))
    except Exception as error:  # of PyTorch, say, which may be out of memory at k = 16
        return Outcome(piece.name, "failed", f"{type(error).__name__}: {error}")


def here(piece: Piece, file: Path, seconds: float, step: Step) -> str:
    """Measure a piece in this process, which nothing ends."""
    write_outcome(file, measure_piece(piece, step))
    return ""


def run_pieces(
    pieces: Sequence[Piece], output: Path, *, minutes: float, step: Step, run: Run = here
) -> list[Outcome]:
    """Do the pieces that have no file yet, until so many minutes have passed.

    Every piece is written as soon as it is done. One that ends its process, or does not end in its
    own time, has failed, and the next ones are done all the same; one that this call has no time
    for any more is left. The first one is begun in any case. A piece that a call was killed in is
    known by its file, and not tried for ever.

    Returns
    -------
    outcomes : of all pieces that have a file now, in order.

    Raises
    ------
    InputError
        If a file is not what this wrote.
    """
    output.mkdir(parents=True, exist_ok=True)
    until = monotonic() + 60.0 * minutes
    outcomes = []
    begun = False
    for piece in pieces:
        file = output / f"{piece.name}.json"
        if file.is_file():
            outcomes.append(_read(file))
            continue
        left = until - monotonic()
        if begun and left < LEAST_SECONDS:
            continue
        try:
            piece.check()
        except EngineUnavailableError as error:
            outcomes.append(Outcome(piece.name, "empty", str(error)))
            write_outcome(file, outcomes[-1])
            continue
        begun = True
        step(piece.name)
        write_outcome(file, Outcome(piece.name, "failed", CUT_OFF.format(file=file.name)))
        own = 60.0 * piece.minutes
        since = monotonic()
        try:
            why = run(piece, file, max(LEAST_SECONDS, min(own, left)), step)
        except BaseException:
            file.unlink()  # interrupted: it was no failure of the piece
            raise
        if why and left < own and monotonic() - since >= left - 1.0:
            file.unlink()  # the call's time was up, not the piece's
            continue
        if why:
            write_outcome(file, Outcome(piece.name, "failed", f"{why}."))
        outcomes.append(_read(file))
    return outcomes


def write_outcome(file: Path, outcome: Outcome) -> None:
    """Write a piece's file."""
    told = {"schema": SCHEMA, **asdict(outcome)}
    replace_file(file, json.dumps(told, indent=1, allow_nan=False).encode())


def _read(file: Path) -> Outcome:
    try:
        told = json.loads(file.read_bytes())
        if told.pop("schema") != SCHEMA:
            raise ValueError(f"it does not say that it is {SCHEMA}")
        return Outcome(**told)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{file} is no piece of 'bench gpu': {error}. Remove it to measure it again."
        ) from error
