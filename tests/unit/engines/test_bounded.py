"""Verification of graphs that are legal and merely enormous."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines import bounded
from recallseg.engines.bounded import verify_bounded
from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import (
    BundleError,
    DeadlineError,
    EngineRunError,
    HostMemoryError,
    InputError,
)
from recallseg.engines.graph_check import check_graph
from recallseg.engines.paths import SHIPPED

ENGINE = "onnxruntime-cpu"


def multiplications(side: int, count: int) -> Callable[[onnx.GraphProto], list[onnx.NodeProto]]:
    """Matrices of side x side, made of an image, multiplied with each other ``count`` times."""

    def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
        for name, values in (
            ("column", [side, 1]),
            ("row", [1, side]),
            ("result", [1, width]),
            ("zero", [0]),
            ("side", [side]),
            ("width", [width]),
            ("all", [-1]),
        ):
            graph.initializer.append(
                helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            )
        made = [
            helper.make_node("Reshape", [graph.input[0].name, "all"], ["flat"]),
            helper.make_node("Slice", ["flat", "zero", "side"], ["part"]),
            helper.make_node("Reshape", ["part", "column"], ["a"]),
            helper.make_node("Reshape", ["part", "row"], ["b"]),
            helper.make_node("MatMul", ["a", "b"], ["m0"]),
        ]
        for i in range(count):
            made.append(helper.make_node("MatMul", [f"m{i}", "m0"], [f"m{i + 1}"]))
        return [
            *made,
            helper.make_node("Reshape", [f"m{count}", "all"], ["long"]),
            helper.make_node("Slice", ["long", "zero", "width"], ["first"]),
            helper.make_node("Reshape", ["first", "result"], [graph.output[0].name]),
        ]

    return nodes


def altered(folder: Path, nodes: Callable[[onnx.GraphProto], list[onnx.NodeProto]]) -> Bundle:
    """The shipped bundle with another graph for embeddings, and the manifest that goes with it."""
    shutil.copytree(SHIPPED / "demo", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["graphs"].items():
        if not name.endswith("/embed"):
            continue
        old = onnx.load(folder / entry["file"])
        new = helper.make_graph([], "g", list(old.graph.input), list(old.graph.output))
        new.node.extend(nodes(new))
        made = helper.make_model(new, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (folder / entry["file"]).write_bytes(made.SerializeToString())
        entry["sha256"] = digest_file(folder / entry["file"])
        entry.pop("data", None)
        check_graph(folder / entry["file"])  # nothing in it is against the rules
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_the_shipped_bundle_passes_within_the_limits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = verify_bounded(Bundle.open("demo"), ENGINE, "fp32")
    assert found.passed
    assert (found.engine, found.precision, len(found.checks)) == (ENGINE, "fp32", 14)


def test_a_graph_without_end_is_ended(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = altered(tmp_path / "slow", multiplications(4000, 200))  # 128 GFLOP each
    start = monotonic()
    with pytest.raises(DeadlineError, match=r"within 5 s.*--most-seconds"):
        verify_bounded(bundle, ENGINE, "fp32", most_seconds=5)
    assert monotonic() - start < 300  # the whole would take hours
    done = CliRunner().invoke(app, ["verify", str(bundle.path), "--most-seconds", "3"])
    assert done.exit_code == 1
    assert "not verified within 3 s" in done.output


def test_a_graph_that_wants_all_memory_gets_none(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = altered(tmp_path / "large", multiplications(20_000, 1))  # 1.6 GB each
    with pytest.raises(HostMemoryError, match=r"more than 1 GiB of memory.*--most-memory"):
        verify_bounded(bundle, ENGINE, "fp32", most_memory=2**30)
    done = CliRunner().invoke(app, ["verify", str(bundle.path), "--most-memory", "700M"])
    assert done.exit_code == 1
    assert "need more than 0.684 GiB of memory" in done.output


def test_a_crash_is_told(monkeypatch: pytest.MonkeyPatch, fake_bundle: Bundle) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(bounded, "python_command", lambda *_: [sys.executable, "-c", crash])
    with pytest.raises(EngineRunError, match="ended by SIGSEGV"):
        verify_bounded(fake_bundle, "fake", "fp32")
    monkeypatch.setattr(bounded, "python_command", lambda *_: [sys.executable, "-c", ""])
    with pytest.raises(EngineRunError, match="without an answer"):
        verify_bounded(fake_bundle, "fake", "fp32")


def test_errors_are_those_of_this_process(tmp_path: Path, fake_bundle: Bundle) -> None:
    bundle = Bundle.open(shutil.copytree(fake_bundle.path, tmp_path / "bundle"))
    bundle.golden_file.write_bytes(b"damaged")
    with pytest.raises(BundleError):
        verify_bounded(bundle, "fake", "fp32")


def test_limits_that_are_none_are_refused(fake_bundle: Bundle) -> None:
    for seconds, memory in ((0, None), (-1, None), (float("nan"), None), (1, 0), (1, -5)):
        with pytest.raises(InputError, match="above 0"):
            verify_bounded(fake_bundle, "fake", "fp32", most_seconds=seconds, most_memory=memory)
    with pytest.raises(InputError, match="driver of a GPU"):
        verify_bounded(fake_bundle, "tensorrt", "fp32", most_memory=2**30)
    done = CliRunner().invoke(app, ["verify", str(fake_bundle.path), "--most-memory", "lots"])
    assert "--most-memory must be a size" in done.output


def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_bundle: Bundle
) -> None:
    for module in ("json", "ctypes", "resource", "recallseg", "numpy"):
        (tmp_path / f"{module}.py").write_text("open('was-run', 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert verify_bounded(fake_bundle, "fake", "fp32").passed
    assert not os.path.lexists("was-run")
