"""``bench compare``: what is named, what is noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.bench_reports import make_report, make_retrieval, make_run, make_soak

from recallseg.benchmarks.compare import compare
from recallseg.benchmarks.schema import Memory
from recallseg.engines.errors import InputError


def noisy(centre: float, seed: int, spread: float = 0.02) -> list[float]:
    return list(centre * np.random.default_rng(seed).lognormal(0, spread, 30))


def test_a_slower_stage_is_named_worst_first() -> None:
    before = make_report(make_run(noisy(100, 1)), make_run(noisy(50, 2), k=1))
    after = make_report(make_run(noisy(120, 3)), make_run(noisy(80, 4), k=1))
    found = compare(before, after)
    assert [("k = 1" in change.what) for change in found.worse] == [True, True, False, False]
    assert {change.figure for change in found.worse} == {"total", "attend"}
    assert found.worse[0].ratio == pytest.approx(1.6, abs=0.05)
    assert found.worse[0].low > 1.5
    assert not found.better


def test_noise_is_not_named() -> None:
    before, after = (
        make_report(make_run(noisy(100, 1, 0.3))),
        make_report(make_run(noisy(100, 2, 0.3))),
    )
    found = compare(before, after)
    assert not found.worse
    assert not found.better
    assert found.same == 4


def test_a_certain_change_within_the_margin_is_not_named() -> None:
    before, after = make_report(make_run([100.0] * 9)), make_report(make_run([103.0] * 9))
    assert not compare(before, after).worse
    assert compare(before, after, margin=0.02).worse


def test_a_faster_run_is_better() -> None:
    found = compare(make_report(make_run(noisy(100, 1))), make_report(make_run(noisy(50, 2))))
    assert {change.figure for change in found.better} == {"total", "attend"}
    assert not found.worse


def test_more_memory_is_worse() -> None:
    run = make_run([100.0] * 9)
    larger = replace(run, memory=Memory(resident_peak=200 * 2**20, workspace=2**20))
    (change,) = compare(make_report(run), make_report(larger)).worse
    assert (change.figure, change.unit, change.ratio) == ("resident peak", "bytes", 2.0)


def test_baselines_are_not_judged_but_tell_of_the_machine() -> None:
    def report(baseline: float):  # type: ignore[no-untyped-def]
        own = make_run([100.0] * 9)
        return make_report(own, make_run([baseline] * 9, subject="torch-cached", role="baseline"))

    found = compare(report(300), report(400))
    assert not found.worse
    assert any("machine itself changed: torch-cached" in remark for remark in found.remarks)


def test_recall_lost_and_slower_search() -> None:
    found = compare(make_retrieval(recall=0.995), make_retrieval(recall=0.98))
    assert [change.figure for change in found.worse] == ["recall"]
    assert not compare(make_retrieval(recall=0.98), make_retrieval(recall=0.995)).worse


def test_soak_with_more_memory() -> None:
    (change,) = compare(make_soak(101), make_soak(120)).worse
    assert change.figure == "memory"


def test_doubts_and_missing_runs_are_told() -> None:
    before = make_report(make_run([100.0] * 9), make_run([100.0] * 9, k=1))
    after = make_report(make_run([100.0] * 9), remarks=("The machine was busy",))
    after = replace(after, machine={**after.machine, "processor": "Q"})
    found = compare(before, after)
    assert any("k = 1" in gone and "only in A" in gone for gone in found.missing)
    assert any("differ in processor: P and Q" in remark for remark in found.remarks)
    assert "B: The machine was busy" in found.remarks


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(InputError, match="nothing in common"):
        compare(make_report(make_run([1.0], k=1)), make_report(make_run([1.0], k=2)))
    with pytest.raises(InputError, match="kind 'latency'"):
        compare(make_report(make_run([1.0])), make_soak())
