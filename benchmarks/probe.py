"""Cold start and memory of the runtime, measured in a new process that does nothing else.

Run as ``python -m recallseg.benchmarks.probe JSON``; prints one JSON object. The clock starts in
the parent, before the interpreter does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import time
from typing import Any

from recallseg.engines.errors import EngineRunError

__all__ = ["probe"]

QUERIES = 8
"""Enough to see memory that grows with every query; a long run is the soak test's."""
TIMEOUT_S = 1800


def probe(
    library: Path,
    bundle: Path,
    choice: dict[str, Any],
    *,
    k: int,
    structures: Sequence[str],
    side: int,
    queries: int = QUERIES,
) -> dict[str, Any]:
    """Start a process, let it answer queries, return what it measured.

    Parameters
    ----------
    library, bundle : folders.
    choice : fields of :class:`recallseg.benchmarks.subjects.RuntimeChoice`.
    k, structures : as for the segmenter; ``side`` of the images in pixels.

    Returns
    -------
    dict
        ``imported_s``, ``ready_s``, ``first_result_s``; ``resident_peak``, ``resident_growth`` and
        ``workspace`` in bytes.

    Raises
    ------
    EngineRunError
        If the process fails; the message holds its last line.
    """
    task = {
        "started": time(),
        "library": str(library),
        "bundle": str(bundle),
        "choice": choice,
        "k": k,
        "structures": list(structures),
        "side": side,
        "queries": queries,
    }
    command = [sys.executable, "-m", "recallseg.benchmarks.probe", json.dumps(task)]
    done = subprocess.run(  # noqa: S603  (this interpreter, this module)
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EngineRunError(
            f"the process that measures cold start and memory ended with status "
            f"{done.returncode}: {last}. Is there memory for a second copy of the engines?"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Do the task of :func:`probe` in this process."""
    from recallseg.benchmarks.resident import resident_bytes, resident_peak
    from recallseg.benchmarks.subjects import RuntimeChoice, open_segmenter
    from recallseg.benchmarks.workload import query_images
    from recallseg.engines.bundle import Bundle

    imported = time()
    segmenter = open_segmenter(
        Path(task["library"]),
        Bundle.open(task["bundle"]),
        RuntimeChoice(**task["choice"]),
        k=task["k"],
        structures=task["structures"],
    )
    ready = time()
    images = query_images(2, task["side"])
    drawn = time() - ready  # the images are the benchmark's, not the runtime's
    segmenter.segment(images[0])
    first = time() - drawn
    segmenter.segment(images[1])
    before = resident_bytes()
    for number in range(2, task["queries"]):
        segmenter.segment(images[number % 2])
    after = resident_bytes()
    return {
        "imported_s": round(imported - task["started"], 4),
        "ready_s": round(ready - task["started"], 4),
        "first_result_s": round(first - task["started"], 4),
        "resident_peak": resident_peak(),
        "resident_growth": None if before is None or after is None else after - before,
        "workspace": segmenter.model.nbytes,
    }


if __name__ == "__main__":
    json.dump(main(json.loads(sys.argv[1])), sys.stdout)
