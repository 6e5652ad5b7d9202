"""Fuzz the readers: ``PYTHONPATH=tests python -m fuzz --count 12000 --output DIR``.

``--index I --format KIND`` writes that one file to DIR instead, to look into what it did. Kinds
``library``, ``bundle`` and ``index`` are made as strangers could (``artefacts``); ``tracing`` says
what they had opened.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

from fuzz.artefacts import KINDS, make, prepare
from fuzz.campaign import PIXELS, ROOM, Findings, damaged_file, run_campaign
from fuzz.mutations import FORMATS, good_files
from recallseg.commands.common import progress_bar


def main() -> int:
    """Run; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=12_000, help="files in all")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first file of each kind"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for one file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=(*FORMATS, *KINDS), help="only this one")
    parser.add_argument("--index", type=int, help="write this file, and read none")
    parser.add_argument("--output", type=Path, required=True, help="folder for fuzz.json")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    kinds = [chosen.format] if chosen.format else [*FORMATS, *KINDS]
    if chosen.index is not None and kinds[0] in KINDS:
        prepare(chosen.output)
        print(make(kinds[0], chosen.index, chosen.seed, chosen.output))
        return 0
    if chosen.index is not None:
        name, data = damaged_file(good_files(), kinds[0], chosen.index, chosen.seed)
        (chosen.output / name).write_bytes(data)
        print(chosen.output / name)
        return 0
    found, start = Findings(), perf_counter()
    each = chosen.count // len(kinds)
    with progress_bar("Fuzzing", each * len(kinds)) as step:
        for kind in kinds:
            run_campaign(
                *(kind, each, chosen.seed, found),
                first=chosen.first,
                seconds=chosen.seconds,
                progress=step,
            )
    report = {
        "seed": chosen.seed,
        "first": chosen.first,
        "files": each * len(kinds),
        "seconds": round(perf_counter() - start, 1),
        "limits": {"pixel_bytes": PIXELS, "room_bytes": ROOM},
        "counts": found.counts,
        "peak_resident_bytes": found.peak_bytes,
        "slowest": found.slowest,
        "findings": found.findings,
    }
    text = json.dumps(report, indent=1)
    (chosen.output / "fuzz.json").write_text(text, encoding="utf-8")
    print(text)
    return 1 if found.findings else 0


if __name__ == "__main__":
    sys.exit(main())
