"""What needs a GPU: plans that run, are proven, and whose attention is fused. Run with -m gpu."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.device import open_device
from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.builder import BuildRequest
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.engine import TensorRt
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.tensorrt.targets import Target
from recallseg.engines.verification import verify_engines

pytestmark = pytest.mark.gpu

FUSED = re.compile(r"mha|attention|flash", re.IGNORECASE)


@pytest.fixture
def bundle(converted_demo: Bundle) -> Bundle:
    return converted_demo


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "mixed"])
@pytest.mark.parametrize("name", FLAVOURS)
def test_plans_are_proven_on_this_gpu(
    name: str,
    precision: str,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path))
    flavour = FLAVOURS[name]
    try:
        flavour.load()
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    capability = f"sm{open_device().facts.capability}"
    target = Target.parse((capability,) if flavour.is_rtx else None, flavour)
    request = BuildRequest(flavour, precision, Profile(), target)
    built = {item.graph: item.plan for item in build_bundle(bundle, request, graphs=GRAPHS)}
    engines = load_engines(bundle, name, precision)
    assert verify_engines(bundle, engines, precision).passed
    for graph, plan in built.items():  # what the builder said without this GPU
        engine = engines[graph]
        assert isinstance(engine, TensorRt)
        said = plan.made["activation_bytes"]
        if said and engine.scratch_bytes:
            assert engine.scratch_bytes == pytest.approx(said, rel=0.1), graph
    attend = engines["attend"]
    assert isinstance(attend, TensorRt)
    if precision in ("fp16", "bf16"):
        assert FUSED.search(attend.layers()), "memory attention was not fused"
