"""Exemplars added on a GPU, and models that come and go: what once ended a process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from recallseg.benchmarks.subjects import RuntimeChoice, open_segmenter
from recallseg.benchmarks.workload import fill_library, query_images, structure_names
from recallseg.engines.bundle import Bundle

__all__ = ["measure_adding"]

ROUNDS = 6
EXEMPLARS = 8
SIDE = 512


def measure_adding(
    bundle: Bundle, choice: RuntimeChoice, *, seconds: float, step: Callable[[str], None]
) -> dict[str, Any]:
    """Fill a library, close its model, and ask once; again in new models as often as time allows.

    The process survives it or does not, which whoever started it learns; seconds are told for each
    round.

    Raises
    ------
    EngineUnavailableError
        If this machine has no such engine.
    """
    (image,) = query_images(1, SIDE)
    spent: list[float] = []
    begin = perf_counter()
    for number in range(ROUNDS):
        if spent and perf_counter() - begin > seconds:
            break
        step(f"round {number + 1} of {ROUNDS}")
        since = perf_counter()
        with TemporaryDirectory(prefix="recallseg-bench-") as folder:
            path = Path(folder, "library")
            fill_library(
                path, bundle, exemplars=EXEMPLARS, structures=1, side=SIDE,
                engine=choice.engine, precision=choice.precision, threads=choice.threads,
            )  # fmt: skip
            gc.collect()  # sessions go while their last work may be queued
            with open_segmenter(
                path, bundle, choice, k=1, structures=structure_names(1)
            ) as segmenter:
                segmenter.segment(image)
            del segmenter
            gc.collect()
        spent.append(round(perf_counter() - since, 3))
    return {"bundle": bundle.name, **choice.to_json(), "exemplars": EXEMPLARS, "rounds_s": spent}
