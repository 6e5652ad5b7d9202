"""Inject faults into everything that writes: ``PYTHONPATH=tests python -m faults --output DIR``.

Every call of an operation to the system below its folder is made to fail, once in each way that it
can. ``--only add`` takes the operations of that name, ``--kind list`` those calls, ``--every 7``
one point in seven. What was tried is written down in DIR, and the same command goes on where one
was ended, by whoever or by ``--seconds-each``. ``--cuts`` cuts the power in the life of a library
instead, in so many images of the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from faults.shim import CALLS, build


def main() -> int:
    """Run; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", action="append", help="operations of this name, or that have it")
    parser.add_argument("--kind", action="append", choices=CALLS, help="calls of this kind")
    parser.add_argument("--every", type=int, default=1, help="one point in so many")
    parser.add_argument("--seconds-each", type=float, default=math.inf, help="for an operation")
    parser.add_argument("--cuts", type=int, help="cut the power so often")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and order of points")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for points.jsonl, faults.json"
    )
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    if "faults_shim" not in os.environ.get("LD_PRELOAD", ""):
        made = build(chosen.output)
        with tempfile.TemporaryDirectory(prefix="recallseg-own-") as own:
            environment = {
                **os.environ,
                "LD_PRELOAD": str(made),
                "RECALLSEG_STATE": f"{own}/state",
                "RECALLSEG_CACHE": f"{own}/cache",
                "COLUMNS": "300",
            }
            command = [sys.executable, "-m", "faults", *sys.argv[1:]]
            return subprocess.run(command, env=environment, check=False).returncode
    if chosen.cuts:
        return _cut(chosen.cuts, chosen.seed, chosen.output)
    from faults.campaign import run_operation
    from faults.operation import chosen as among
    from faults.operations import OPERATIONS
    from faults.record import Record, code_digest

    start = perf_counter()
    record = Record(chosen.output / "points.jsonl", code_digest())
    for name in among(chosen.only, [*OPERATIONS]):
        operation = OPERATIONS[name]
        began = perf_counter()
        with tempfile.TemporaryDirectory(prefix="recallseg-faults-", dir=_memory()) as work:
            run_operation(
                *(operation, Path(work), record),
                kinds=chosen.kind or [*CALLS],
                every=chosen.every,
                seed=chosen.seed,
                seconds=chosen.seconds_each,
                progress=lambda text: print(text, flush=True),
            )
        told = record.report()[name]
        seconds = perf_counter() - began
        print(f"{name}: {told['points']} points, {told['left']} left, ", end="")
        print(f"{dict(told['counts'])} in {seconds:.1f} s", flush=True)
    record.close()
    report = record.report()
    counts: Counter[str] = Counter()
    for one in report.values():
        counts.update(one["counts"])
    whole = {
        "seed": chosen.seed,
        "every": chosen.every,
        "seconds": round(perf_counter() - start, 1),
        "points": sum(one["points"] for one in report.values()),
        "left": sum(one["left"] for one in report.values()),
        "counts": counts,
        "operations": report,
    }
    (chosen.output / "faults.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    bad = sum(len(one["violations"]) for one in report.values())
    print(
        f"{counts['cases']} of {whole['points']} points, {counts['fired']} faults injected, "
        f"{bad} violations"
    )
    return 1 if bad else 0


def _cut(cuts: int, seed: int, output: Path) -> int:
    from faults.operations import LIFE, library_state
    from faults.power import cut_everywhere, record

    counts: Counter[str] = Counter()
    found, start = [], perf_counter()
    with tempfile.TemporaryDirectory(prefix="recallseg-faults-", dir=_memory()) as work:
        root, base, log = Path(work, "root"), Path(work, "base"), Path(work, "log")
        root.mkdir()
        base.mkdir()
        states = record(root, log, LIFE, library_state)
        logs = [log.with_suffix(f".{number}") for number in range(len(LIFE))]
        for counted, said in cut_everywhere(
            base, root, logs, states, library_state, cuts=cuts, seed=seed
        ):
            counts.update(counted)
            if said:
                found.append(said)
                print(said, flush=True)
    seconds = round(perf_counter() - start, 1)
    report = {"seed": seed, "seconds": seconds, "counts": counts, "violations": found}
    (output / "power.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{sum(counts.values())} images of the disk after a power cut, {len(found)} violations")
    return 1 if found else 0


def _memory() -> str | None:
    """Where there is a file system in memory, that: syncing a disk is not what is tested."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
