"""``bench soak``: many queries in one process. Does memory grow, and how slow is the slowest?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from recallseg.benchmarks.facts import bundle_facts, head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.resident import held_bytes
from recallseg.benchmarks.schema import Distribution, Report, SoakPoint, SoakRun
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.benchmarks.workload import DESCRIPTION, query_images
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["run_soak"]

IMAGES = 16
POINTS = 200
"""Readings of memory over a run; each is a small file read."""
WARM_UP_SHARE, LEAST_WARM_UP = 0.02, 5
"""Queries before anything counts: allocators reach their steady state within a few."""


def run_soak(
    library: Path,
    choice: RuntimeChoice,
    *,
    k: int,
    structures: Sequence[str] | None,
    queries: int,
    side: int = 512,
    step: Callable[[str], None] = lambda what: None,
) -> Report:
    """Answer many queries.

    Parameters
    ----------
    library : folder; its own images are the queries if they were kept, drawn ones otherwise.
    choice : engine, precision, threads.
    k, structures : as for the segmenter.
    queries : how many.
    side : of drawn images in pixels.
    step : told how many are done.

    Raises
    ------
    InputError
        If there are too few queries to see anything.
    EngineUnavailableError
        If this system does not tell what memory a process holds.
    """
    warm_up = max(LEAST_WARM_UP, int(queries * WARM_UP_SHARE))
    if queries <= 2 * warm_up:
        raise InputError(f"a soak test needs more than {2 * LEAST_WARM_UP} queries, got {queries}.")
    conditions, watch = describe_conditions(), Watch()
    with Library.open(library) as opened:
        bundle = opened.bundle
        images, source = _images(opened, side)
        segmenter = Segmenter(
            opened, k=k, structures=structures,
            engine=choice.engine, precision=choice.precision, threads=choice.threads,
        )  # fmt: skip
        every = max(1, (queries - warm_up) // POINTS)
        spent: list[float] = []
        series: list[SoakPoint] = []
        for number in range(queries):
            if number >= warm_up and (number - warm_up) % every == 0:
                series.append(SoakPoint(number, _held()))
                step(f"{number} of {queries} queries")
            start = perf_counter()
            segmenter.segment(images[number % len(images)])
            if number >= warm_up:
                spent.append((perf_counter() - start) * 1e3)
        series.append(SoakPoint(queries, _held()))
    total = Distribution.of(spent)
    first, last = series[0].memory, series[-1].memory
    conditions |= watch.stop()
    run = SoakRun(
        subject=choice.name,
        engine=choice.engine,
        precision=choice.precision,
        device="cpu",
        threads=choice.threads,
        k=k,
        n=len(segmenter.structures),
        image_size=bundle.geometry.image_size,
        queries=queries,
        warm_up=warm_up,
        memory_start=first,
        memory_end=last,
        growth=round((last - first) / first, 5),
        slowest_over_median=round(total.most / total.p50, 3),
        total=total,
        series=tuple(series),
    )
    return Report(
        kind="soak",
        **head(conditions),
        settings={"queries": queries, "warm_up": warm_up, "queries_are": source},
        bundle=bundle_facts(bundle),
        soak=(run,),
    )


def _images(library: Library, side: int) -> tuple[list[NDArray[Any]], str]:
    if library.keeps_sources and len(library):
        keys = [exemplar.key for exemplar, _ in zip(library, range(IMAGES), strict=False)]
        return [library.source(key)[0] for key in keys], "the library's own images"
    return [*query_images(IMAGES, side)], DESCRIPTION


def _held() -> int:
    found = held_bytes()
    if found is None:
        raise EngineUnavailableError(
            "this system does not tell how much memory a process holds (there is no "
            "/proc/self/status), so a soak test cannot be made here."
        )
    return found
