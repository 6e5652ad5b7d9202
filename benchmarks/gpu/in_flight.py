"""Frames per second with several queries in flight, and whether they are the same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from recallseg.benchmarks.schema import Distribution
from recallseg.benchmarks.subjects import RuntimeChoice, open_segmenter
from recallseg.benchmarks.workload import SPARE, fill_library, query_images, structure_names
from recallseg.engines.bundle import Bundle
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["IN_FLIGHT", "measure_in_flight"]

IN_FLIGHT = (1, 2, 4)
IMAGES = 8  # different ones, over and over
SIDE = 512


def measure_in_flight(
    bundle: Bundle,
    choice: RuntimeChoice,
    ns: Sequence[int],
    *,
    k: int,
    queries: int,
    seconds: float,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """Return frames per second, and milliseconds from handing in to the result.

    Each number in flight of :data:`IN_FLIGHT`, at every number of structures, is asked ``queries``,
    or as many as ``seconds`` allow. ``differing`` are the results that are not, bit by bit, what
    one after the other gives; there should be none.

    Raises
    ------
    EngineUnavailableError
        If this machine has no such engine.
    """
    images = query_images(IMAGES, SIDE)
    runs = []
    with TemporaryDirectory(prefix="recallseg-bench-") as folder:
        path = Path(folder, "library")
        fill_library(
            path, bundle, exemplars=k + SPARE, structures=max(ns), side=SIDE,
            engine=choice.engine, precision=choice.precision, threads=choice.threads,
        )  # fmt: skip
        for n in ns:
            with open_segmenter(
                path, bundle, choice, k=k, structures=structure_names(n)
            ) as segmenter:
                segmenter.warm_up()
                expected = [segmenter.segment(image) for image in images]
                for in_flight in IN_FLIGHT:
                    step(f"n = {n}, {in_flight} in flight")
                    found = _fly(segmenter, images, expected, in_flight, queries, seconds)
                    runs.append({"n": n, "in_flight": in_flight, **found})
    return {
        "bundle": bundle.name,
        "image_size": bundle.geometry.image_size,
        "k": k,
        **choice.to_json(),
        "runs": runs,
    }


def _fly(
    segmenter: Segmenter,
    images: Sequence[Any],
    expected: Sequence[Result],
    in_flight: int,
    queries: int,
    seconds: float,
) -> dict[str, Any]:
    flying: deque[tuple[int, float, Future[Result]]] = deque()
    took: list[float] = []
    differing = 0

    def land() -> None:
        nonlocal differing
        which, since, promise = flying.popleft()
        result = promise.result()
        took.append((perf_counter() - since) * 1e3)
        differing += not _alike(result, expected[which])

    for number in range(2 * in_flight):  # every one of them takes its memory once
        segmenter.segment_async(images[number % IMAGES]).result()
    device = segmenter.device
    allocations = device.allocations if device else 0
    begin = perf_counter()
    for number in range(queries):
        if perf_counter() - begin > seconds and number >= in_flight:
            break
        if len(flying) == in_flight:
            land()
        which = number % IMAGES
        flying.append((which, perf_counter(), segmenter.segment_async(images[which])))
    while flying:
        land()
    elapsed = perf_counter() - begin
    return {
        "frames_per_second": round(len(took) / elapsed, 2),
        "latency_ms": asdict(Distribution.of(took)),
        "differing": differing,
        "allocations": device.allocations - allocations if device else 0,
    }


def _alike(found: Result, expected: Result) -> bool:
    return found.scores == expected.scores and np.array_equal(found.label_map, expected.label_map)
