"""``bench.json``: round trip, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.bench_reports import make_full, make_retrieval, make_soak, make_together

from recallseg.benchmarks.schema import VERSION, Distribution, Report
from recallseg.engines.errors import InputError


@pytest.mark.parametrize(
    "report", [make_full(), make_retrieval(), make_soak(), make_together()], ids=lambda r: r.kind
)
def test_round_trip(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "bench.json")
    assert Report.load(tmp_path) == report
    assert Report.load(tmp_path / "bench.json") == report


def test_distribution_summarises_and_keeps_the_order() -> None:
    found = Distribution.of([3.0, 1.0, 2.0])
    assert (found.p50, found.least, found.most, found.mean) == (2.0, 1.0, 3.0, 2.0)
    assert found.samples == (3.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="other"), "no benchmark"),
        (lambda data: data.update(version=VERSION + 1), f"version {VERSION + 1}"),
        (lambda data: data.update(speed=1), "unknown field 'speed'"),
        (lambda data: data.pop("machine"), "missing field 'machine'"),
        (lambda data: data["runs"][0].update(k="four"), r"runs\[0\].k: expected int"),
        (lambda data: data["runs"][0].update(k=True), r"runs\[0\].k: expected int"),
        (lambda data: data["runs"][0]["stages"]["total"].pop("p50"), "missing field 'p50'"),
        (lambda data: data.update(runs={}), "runs: expected a list"),
        (lambda data: data.update(bundle=[]), "bundle: expected an object"),
    ],
)
def test_other_contents_are_refused(change: object, message: str, tmp_path: Path) -> None:
    data = make_full().to_json()
    data = json.loads(json.dumps(data))
    change(data)  # type: ignore[operator]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        Report.load(file)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark at"):
        Report.load(tmp_path)
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Report.load(tmp_path)
