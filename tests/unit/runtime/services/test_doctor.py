"""The doctor: what is here, what is missing, and nothing heavy imported on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recallseg.engines.paths import cache_folder
from recallseg.runtime.reports.machine import describe_machine, package_versions
from recallseg.runtime.services import doctor


def test_machine() -> None:
    machine = describe_machine()
    assert machine["processor"]
    assert 1 <= machine["usable_cores"] <= machine["cores"]
    assert machine["memory_bytes"] is None or machine["memory_bytes"] > 2**28
    assert package_versions()["numpy"]


def test_healthy_with_an_engine() -> None:
    pytest.importorskip("onnxruntime")
    diagnosis = doctor.diagnose(self_test=False)
    states = {engine.name: engine for engine in diagnosis.engines}
    assert states["onnxruntime-cpu"].available
    assert states["onnxruntime-cpu"].detail.startswith("onnxruntime ")
    assert not states["tensorrt"].available
    assert diagnosis.healthy
    json.dumps(diagnosis.to_json(), allow_nan=False)


def test_not_healthy_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert diagnosis.self_tests == ()
    state = next(e for e in diagnosis.engines if e.name == "onnxruntime-cpu")
    assert "recallseg[cpu]" in state.detail


def test_a_failed_self_test_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(doctor, "shipped_bundles", lambda: ("gone",))
    diagnosis = doctor.diagnose()
    assert not diagnosis.healthy
    assert "no bundle at 'gone'" in diagnosis.self_tests[0].detail


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys; from recallseg.runtime.services.doctor import diagnose; "
        "diagnose(self_test=False); "
        "print([m for m in ('torch', 'transformers', 'tensorrt') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RECALLSEG_CACHE")
    assert cache_folder().name == "recallseg"
