"""An archive is segmented by one worker, which works in this process, so that faults reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
from support.fake_bundle import make_fake_bundle
from support.inside import HereCrew, HereDecoder
from support.pictures import disc

from faults.operation import Operation, command
from recallseg.runtime.library import Library
from recallseg.runtime.services.archive import running, worker
from recallseg.runtime.services.outputs import record_file

__all__ = ["ARCHIVE_OPERATIONS"]

_ARCHIVE = command(
    *("archive", "{root}/library", "{root}/new", "--output", "{root}/archived"),
    *("--workers", "1", "--engine", "fake", "--k", "1", "--retry"),
)


def _with_pictures(root: Path) -> None:
    running._crew = lambda setup, *_: HereCrew(setup)
    worker.IsolatedDecoder = HereDecoder  # type: ignore[misc]
    bundle = make_fake_bundle(root / "bundle")
    with Library.create(root / "library", bundle, engine="fake") as library:
        for position in (0.0, 1.0):
            example = disc(position)
            library.add(example.image, example.masks)
    (root / "new").mkdir()
    for number in range(2):
        cv2.imwrite(str(root / "new" / f"q{number}.png"), disc(0.35 + 0.1 * number).image)


def _archived(root: Path) -> Any:
    """Outputs with a record and a whole mask, and what the summary says became of each input."""
    out = root / "archived"
    done = []
    for number in range(2):
        base = out / f"q{number}"
        if record_file(base).exists():
            if cv2.imread(str(base.with_name(f"{base.name}.mask.png"))) is None:
                raise AssertionError(f"{base} has a record and no mask")
            done.append(base.name)
    table = out / "summary.parquet"
    rows = pq.read_table(table).to_pylist() if table.exists() else []
    return done, sorted((Path(row["input"]).name, row["outcome"]) for row in rows)


def _on_the_way(state: Any, after: Any) -> bool:
    """What the summary calls done is; what it does not is tried again by the same call."""
    done, rows = state
    told = {f"{name}.png" for name in done}
    return set(done) <= set(after[0]) and all(
        outcome != "done" or name in told for name, outcome in rows
    )


ARCHIVE_OPERATIONS = (Operation("archive", _with_pictures, _ARCHIVE, _archived, _on_the_way),)
