"""``bench latency`` from end to end with the fake engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_bundle import make_fake_bundle
from typer.testing import CliRunner

from recallseg.benchmarks.commands import bench
from recallseg.benchmarks.facts import busy_remarks
from recallseg.benchmarks.latency import LatencyPlan, run_latency
from recallseg.benchmarks.schema import Report
from recallseg.benchmarks.subjects import RuntimeChoice
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError

STAGES = {"prepare", "embed", "search", "encode", "gather", "attend", "decode", "finish", "total"}
FAKE = RuntimeChoice("fake", "fp32", 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, fake_bundle: Bundle) -> Path:
    output = tmp_path_factory.mktemp("latency")
    arguments = [
        "latency", str(fake_bundle.path), "--engine", "fake", "--k", "1,2", "--queries", "3",
                 "--structures", "2", "--query-size", "32", "--threads", "1", "--dice", "fp32=0.9",
                 "--output", str(output),
    ]  # fmt: skip
    found = CliRunner().invoke(bench, arguments)
    assert found.exit_code == 0, found.output
    assert "k=1 " in found.stdout
    assert "RANDOM WEIGHTS" in found.stderr
    return output


def test_every_combination_is_measured(measured: Path) -> None:
    report = Report.load(measured)
    assert [(run.k, run.n) for run in report.runs] == [(1, 2), (2, 2)]
    for run in report.runs:
        assert set(run.stages) == STAGES
        assert all(len(spent.samples) == 3 for spent in run.stages.values())
        parts = sum(spent.mean for stage, spent in run.stages.items() if stage != "total")
        assert 0 < parts <= run.total.mean
        assert run.throughput == pytest.approx(1e3 / run.total.mean, rel=1e-3)
        assert (run.variant, run.device, run.threads) == ("portable", "cpu", 1)


def test_memory_and_cold_start_come_from_a_new_process(measured: Path) -> None:
    for run in Report.load(measured).runs:
        assert run.memory is not None
        assert run.memory.resident_peak is None or run.memory.resident_peak > 10 << 20
        assert run.memory.workspace is not None
        assert run.memory.workspace > 0
        assert run.cold_start is not None
        assert (
            0 < run.cold_start.imported_s < run.cold_start.ready_s < run.cold_start.first_result_s
        )


def test_quality_stands_beside_speed(measured: Path) -> None:
    quality = Report.load(measured).runs[0].quality
    assert quality.golden_error == 0.0
    assert quality.golden_dice == 1.0
    assert quality.logit_difference == 0.0
    assert quality.dice == 0.9
    assert quality.parity_error is None  # the fake bundle's manifest states none


def test_report_says_where_and_how(measured: Path) -> None:
    report = Report.load(measured)
    assert report.bundle is not None
    assert report.bundle.source == "random"
    assert report.machine["usable_cores"] >= 1
    assert {"affinity", "vector_units", "other_cpu_share"} <= set(report.conditions)
    assert report.settings["queries"] == 3
    assert "numpy" in report.versions


def test_page_is_there_and_self_contained(measured: Path) -> None:
    page = (measured / "bench.html").read_text(encoding="utf-8")
    assert "RANDOM WEIGHTS" in page
    assert "<script" not in page
    assert "://" not in page


def test_numbers_of_structures_are_compared(fake_bundle: Bundle, tmp_path: Path) -> None:
    arguments = [
        "latency", str(fake_bundle.path), "--engine", "fake", "--k", "1", "--structures", "1,3",
        "--queries", "2", "--query-size", "32", "--threads", "1", "--output", str(tmp_path),
    ]  # fmt: skip
    found = CliRunner().invoke(bench, arguments)
    assert found.exit_code == 0, found.output
    assert [(run.k, run.n) for run in Report.load(tmp_path).runs] == [(1, 1), (1, 3)]
    assert "times as long for 3 structures as for 1 at k=1" in found.stdout


def test_json_on_stdout(fake_bundle: Bundle, tmp_path: Path) -> None:
    arguments = [
        "latency", str(fake_bundle.path), "--engine", "fake", "--k", "1", "--queries", "1",
                 "--query-size", "32", "--threads", "1", "--output", str(tmp_path),
        "--json",
    ]  # fmt: skip
    found = CliRunner().invoke(bench, arguments)
    assert found.exit_code == 0, found.output
    assert Report.from_json(json.loads(found.stdout)) == Report.load(tmp_path)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LatencyPlan((FAKE,), (99,), (1,)), "at most k = 32 and 16 structures, asked for 99 and 1"),
        (LatencyPlan((FAKE,), (1,), (17,)), "asked for 1 and 17"),
        (LatencyPlan((FAKE,), (1,), (1,), baselines=("jax",)), "no baseline 'jax'"),
        (LatencyPlan((FAKE,), (1,), (1,), baselines=("portable",)), "nothing to compare"),
    ],
)
def test_impossible_plans_are_refused(plan: LatencyPlan, message: str, fake_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=message):
        run_latency(fake_bundle, plan)


def test_baselines_on_other_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from recallseg.benchmarks.torch_baseline import _check_weights, _source
    from recallseg.export.checkpoints import load_dinov2

    bundle = make_fake_bundle(tmp_path / "b", source="pretrained")
    with pytest.raises(InputError, match="--sam2 SRC"):
        _source(bundle, "sam2")
    with pytest.raises(InputError, match=r"A comparison needs equal weights.*--dinov2 SRC"):
        _check_weights(bundle, "dinov2", load_dinov2("random:demo"))


def test_a_busy_machine_is_named() -> None:
    assert not busy_remarks({"other_cpu_share": 0.01})
    assert not busy_remarks({"other_cpu_share": None})
    assert "37%" in busy_remarks({"other_cpu_share": 0.37})[0]


@pytest.mark.parametrize(
    "options",
    [["--k", "0"], ["--k", "x"], ["--dice", "fp32"], ["--dice", "fp32=2"], ["--precision", "a,,b"]],
)
def test_wrong_calls_are_usage_errors(options: list[str], tmp_path: Path) -> None:
    found = CliRunner().invoke(bench, ["latency", "b", "--output", str(tmp_path), *options])
    assert found.exit_code == 2
