"""Reports to test with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recallseg.benchmarks.schema import (
    BundleFacts,
    ColdStart,
    Distribution,
    Energy,
    Memory,
    Quality,
    Ratio,
    Report,
    RetrievalRun,
    Run,
    SoakPoint,
    SoakRun,
    SoakSeries,
    TogetherRun,
)

__all__ = ["make_full", "make_report", "make_retrieval", "make_run", "make_soak", "make_together"]

HEAD: dict[str, Any] = {
    "created": "2000-01-01T00:00:00+00:00",
    "machine": {"processor": "P", "usable_cores": 2, "cores": 2, "memory_bytes": 2**30},
    "conditions": {"affinity": [0, 1], "other_cpu_share": None, "load_average_start": [0.1, 0.2]},
    "versions": {"numpy": "2"},
}


def make_run(
    total: Sequence[float],
    *,
    subject: str = "fake fp32",
    role: str = "runtime",
    k: int = 4,
    **more: Any,
) -> Run:
    """Return a run whose ``attend`` takes half of the time."""
    stages = {
        "attend": Distribution.of([value / 2 for value in total]),
        "total": Distribution.of(total),
    }
    values: Mapping[str, Any] = {
        "subject": subject, "role": role, "engine": "fake", "precision": "fp32",
        "variant": "portable", "device": "cpu", "cuda_graph": None, "threads": 2, "k": k, "n": 1,
        "image_size": 64, "rounds": tuple(range(len(total))), "stages": stages, "throughput": 10.0,
        "memory": Memory(resident_peak=100 * 2**20, workspace=2**20), **more,
    }  # fmt: skip
    return Run(**values)


def make_report(*runs: Run, **more: Any) -> Report:
    """Return a latency report."""
    bundle = BundleFacts("b", "1" * 64, "s", "d", "random", "RANDOM <weights>", 64, 28)
    values: dict[str, Any] = {**HEAD, "settings": {"threads": 2}, "bundle": bundle, **more}
    return Report(kind="latency", runs=runs, **values)


def make_full() -> Report:
    """Return a latency report with every optional field set, as a GPU's may have."""
    run = make_run(
        [100.0, 104.0, 102.0],
        device="NVIDIA H100",
        cuda_graph=True,
        memory=Memory(100 * 2**20, 0, 2**20, 2**30, 0),
        cold_start=ColdStart(0.3, 1.2, 1.4),
        energy=Energy(2.5, "RAPL, 1 package"),
        quality=Quality(1e-6, 2e-6, 0.999, 3e-7, 0.91),
        remarks=("a remark",),
    )
    slow = make_run([300.0, 310.0, 305.0], subject="torch-cached", role="baseline", memory=None)
    ratio = Ratio("fake fp32", "torch-cached", 4, 1, "total", 2.99, 2.9, 3.1, 3)
    return make_report(run, slow, ratios=(ratio,), remarks=("busy",))


def make_retrieval(p99: float = 2.0, recall: float = 0.995) -> Report:
    """Return a retrieval report of one million."""
    spent = Distribution.of([1.0, 1.1, p99])
    run = RetrievalRun(
        1_000_000, 384, 16, "graph", 3, recall, spent, spent, 10**9, 2 * 10**9, 9.0, 99.0, 0.2, None
    )
    return Report(kind="retrieval", settings={}, retrieval=(run,), **HEAD)


def make_soak(end: int = 101) -> Report:
    """Return a soak report."""
    series = (SoakPoint(5, 100 * 2**20), SoakPoint(50, end * 2**20))
    run = SoakRun(
        "fake fp32", "fake", "fp32", "cpu", 2, 4, 1, 64, 50, 5, 100 * 2**20, end * 2**20,
        end / 100 - 1, 1.5, Distribution.of([10.0] * 44 + [15.0]), series,
    )  # fmt: skip
    return Report(kind="soak", settings={}, soak=(run,), **HEAD)


def make_together(late: float = 1005.0, errors: tuple[str, ...] = ()) -> Report:
    """Return a soak report of services together."""
    seconds = tuple(map(float, range(8)))
    memory = SoakSeries("memory", "MiB", 1000.0, late, 1030.0, seconds, (1000.0,) * 8)
    disk = SoakSeries("on the disk", "MiB", 5.0, 9.0, None, seconds, (5.0,) * 8)
    spent = SoakSeries("queries", "ms", 40.0, 41.0, 60.0, seconds, (40.0,) * 8)
    run = TogetherRun(30.0, {"queries": 900}, errors, (memory, disk), (spent,))
    return Report(kind="soak", settings={}, together=(run,), **HEAD)
