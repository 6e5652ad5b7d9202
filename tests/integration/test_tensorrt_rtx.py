"""Real plans by TensorRT-RTX, which builds without a GPU; running them carries the mark gpu."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.builder import BuildRequest, build_plan
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.tensorrt.targets import Target

RTX = FLAVOURS["tensorrt-rtx"]
MALFORMED = 32  # EngineInvalidityDiagnostics.MALFORMED_ENGINE


@pytest.fixture(scope="module")
def api() -> Any:
    for module in RTX.modules:
        pytest.importorskip(module, reason="TensorRT-RTX is not installed: recallseg[tensorrt-rtx]")
    return importlib.import_module(RTX.modules[-1])


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


def request_for(*targets: str, **more: Any) -> BuildRequest:
    return BuildRequest(RTX, "fp32", Profile(), Target.parse(targets or None, RTX), **more)


def test_every_graph_builds_and_only_known_messages_come(
    api: Any, demo: Bundle, tmp_path: Path
) -> None:
    items = list(build_bundle(demo, request_for(), cache=PlanCache(tmp_path)))
    assert [item.graph for item in items] == list(GRAPHS)
    runtime = api.Runtime(make_logger(api))
    for item in items:
        plan = item.plan.read()
        assert len(plan) > 1_000_000
        assert item.plan.made["layers"] > 100
        # memorize's mask head never uses the skips; nothing else is remarkable.
        for message in item.plan.made["messages"]:
            assert item.graph == "memorize"
            assert "skip" in message
        # The whole verdict needs a driver; that the header is one of this version does not.
        assert not runtime.get_engine_validity(plan)[1] & MALFORMED
        assert runtime.get_engine_validity(b"x" + plan[1:])[1] & MALFORMED


def test_turing_without_fp32_products_is_explained(api: Any, demo: Bundle) -> None:
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    with pytest.raises(EngineRunError, match=r"FP32 GEMM is not supported[\s\S]*--precision fp16"):
        build_plan(path, demo.specs["embed"], request_for("sm75"))


def test_a_damaged_graph_is_refused_with_the_parsers_words(
    api: Any, demo: Bundle, tmp_path: Path
) -> None:
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    broken = tmp_path / "embed.onnx"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(EngineRunError, match=r"parser does not take embed\.onnx"):
        build_plan(broken, demo.specs["embed"], request_for())


def test_another_graph_than_the_spec_says_is_refused(api: Any, demo: Bundle) -> None:
    path, _ = demo.graph_file("decode", ("portable",), "fp32")
    with pytest.raises(EngineRunError, match="has the inputs"):
        build_plan(path, demo.specs["embed"], request_for())


def make_logger(api: Any) -> Any:
    class Quiet(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    return Quiet()
