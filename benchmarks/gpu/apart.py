"""One piece of ``bench gpu`` in a process of its own, which may crash or hang for itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from recallseg.benchmarks.gpu import pieces
from recallseg.benchmarks.gpu.pieces import GpuPlan, Piece
from recallseg.benchmarks.gpu.running import measure_piece, write_outcome
from recallseg.engines.child import bound_process, python_command, python_environment

__all__ = ["in_a_process"]

LOGS = "logs"
_TOLD = 400  # characters of a log


def in_a_process(plan: GpuPlan) -> Callable[[Piece, Path, float, Callable[[str], None]], Any]:
    """Return what runs a piece of ``plan`` apart, for ``run_pieces``.

    What it prints goes to ``logs/PIECE.log`` beside its file.
    """

    def run(piece: Piece, file: Path, seconds: float, step: Callable[[str], None]) -> str:
        log = file.parent / LOGS / f"{piece.name}.log"
        log.parent.mkdir(exist_ok=True)
        question = {
            "parent": os.getpid(), "plan": plan.to_json(), "piece": piece.name, "file": str(file),
        }  # fmt: skip
        command = python_command(__name__, json.dumps(question))
        with (
            log.open("wb") as output,
            subprocess.Popen(  # noqa: S603  (this Python, this module)
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=python_environment(), start_new_session=True,
            ) as process,
        ):  # fmt: skip
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return f"it did not end within {seconds:.0f} s, and was stopped"
            finally:
                with suppress(ProcessLookupError):  # and whatever it started
                    os.killpg(process.pid, signal.SIGKILL)
        if status == 0:
            return ""
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-_TOLD:]
        return f"its process was ended by {how} ({LOGS}/{log.name}: {said or 'nothing was said'})"

    return run


def main() -> None:
    """Measure the piece that the command line names, and write its file."""
    question = json.loads(sys.argv[1])
    if not bound_process(question["parent"], None):
        return
    plan = GpuPlan.from_json(question["plan"])
    name, file = question["piece"], Path(question["file"])
    piece = next(piece for piece in pieces.pieces_of(plan) if piece.name == name)
    write_outcome(file, measure_piece(piece, lambda text: print(text, flush=True)))
    sys.stdout.flush()
    os._exit(0)  # a driver's destructors have nothing to say any more
