"""``bench soak`` and ``bench compare`` as commands."""

from __future__ import annotations

from pathlib import Path
from tracemalloc import get_traced_memory, start, stop

import pytest
from support.bench_reports import make_report, make_run
from typer.testing import CliRunner

from recallseg.benchmarks.commands import bench
from recallseg.benchmarks.makers.load import Load, duration_series, process_series
from recallseg.benchmarks.schema import Report, TogetherRun
from recallseg.benchmarks.workload import fill_library
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError


def soak(target: Path, output: Path, *options: str, queries: int = 30) -> Report:
    arguments = [
        "soak", str(target), "--engine", "fake", "--queries", str(queries), "--k", "2",
                 "--threads", "1", "--query-size", "32", "--output", str(output), *options,
    ]  # fmt: skip
    found = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return Report.load(output)


def test_soak_of_a_bundle(fake_bundle: Bundle, tmp_path: Path) -> None:
    report = soak(fake_bundle.path, tmp_path, "--structures", "2")
    (run,) = report.soak
    assert (run.queries, run.warm_up, run.n, run.k) == (30, 5, 2, 2)
    assert len(run.total.samples) == 25
    assert run.series[0].memory == run.memory_start
    assert run.series[-1].memory == run.memory_end
    assert run.slowest_over_median >= 1.0
    assert "Memory over queries" in (tmp_path / "bench.html").read_text(encoding="utf-8")


def test_soak_of_a_library_takes_its_own_images(fake_bundle: Bundle, tmp_path: Path) -> None:
    fill_library(
        tmp_path / "library", fake_bundle, exemplars=3, structures=3, side=40,
        engine="fake", precision="fp32", threads=1,
    )  # fmt: skip
    report = soak(tmp_path / "library", tmp_path / "out", "--structures", "structure 2")
    assert report.soak[0].n == 1
    assert report.settings["queries_are"] == "the library's own images"


def test_too_few_queries_are_refused(fake_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than 10 queries"):
        soak(fake_bundle.path, tmp_path, queries=10)


def test_what_grows_is_told_and_what_fails_is_named() -> None:
    steady = {"memory": 100.0, "open files": 40.0, "threads": 20.0, "on the disk": 1.0}
    grown = {"memory": 104.0, "open files": 43.0, "threads": 22.0, "on the disk": 9.0}
    readings = [(float(n), grown if n > 50 else steady) for n in range(100)]
    run = TogetherRun(1.0, {}, (), process_series(readings), ())
    assert run.grew == ("memory", "open files")
    assert TogetherRun(1.0, {}, (), process_series(readings[:50]), ()).grew == ()
    load = Load()

    def act(number: int) -> None:
        if number == 2:
            raise ValueError("lost")
        if number == 4:
            load.over.set()

    load.begin("acts", act, 0.0)
    load.over.wait(60)
    load.end()
    assert load.counts == {"acts": 4}
    assert [text.split(": ")[1] for text in load.errors] == ["ValueError('lost')"]
    [series] = duration_series(load.spent)
    assert (series.name, len(series.values)) == ("acts", 4)


def test_what_is_kept_of_a_long_soak_is_not_kept_in_memory() -> None:
    """112 bytes for each thing done, once: a third of what grew in half an hour."""
    load, many = Load(), 20_000
    held: list[int] = []

    def act(number: int) -> None:
        if number in (many // 10, many):
            held.append(get_traced_memory()[0])
        if number == many:
            load.over.set()

    start()
    try:
        load.begin("acts", act, 0.0)
        load.over.wait(60)
        load.end()
    finally:
        stop()
    assert (held[1] - held[0]) / (0.9 * many) < 1, "bytes for each thing done"
    [series] = duration_series(load.spent)
    assert load.counts["acts"] == many + 1
    assert series.seconds == tuple(sorted(series.seconds))


@pytest.mark.slow
def test_services_together(tmp_path: Path) -> None:
    arguments = ["soak", "demo", "--minutes", "0.5", "--threads", "1", "--output", str(tmp_path)]
    found = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    (run,) = Report.load(tmp_path).together
    assert not run.errors, found.output
    assert min(run.counts.values()) > 0
    assert set(run.counts) == {one.name for one in run.latency}
    assert len(run.counts) == 9


def test_compare_exits_with_1_when_something_got_worse(tmp_path: Path) -> None:
    for name, ms in (("a", 100.0), ("b", 150.0)):
        (tmp_path / name).mkdir()
        make_report(make_run([ms] * 9)).save(tmp_path / name / "bench.json")
    found = CliRunner().invoke(bench, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.exit_code == 1
    assert (
        "WORSE   fake fp32 at 64 px, k = 4, n = 1, cpu: total 100.00 -> 150.00 ms" in found.stdout
    )
    found = CliRunner().invoke(bench, ["compare", str(tmp_path / "b"), str(tmp_path / "a")])
    assert found.exit_code == 0
    assert "0 worse, 2 better, 2 the same" in found.stdout
