"""Whether RecallSeg can run here, on what, and if not, what is missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from recallseg.engines.bundle import Bundle
from recallseg.engines.device import open_device
from recallseg.engines.errors import RecallSegError
from recallseg.engines.fake import FakeEngine
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.onnxruntime_cuda import OnnxRuntimeCuda
from recallseg.engines.onnxruntime_gpu import load_provider
from recallseg.engines.onnxruntime_tensorrt import OnnxRuntimeTensorRt
from recallseg.engines.operators import describe_operators
from recallseg.engines.paths import cache_folder, shipped_bundles
from recallseg.engines.pixels import open_pixels
from recallseg.engines.registry import ENGINES, engine_class, load_engines
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.engines.verification import verify_engines
from recallseg.runtime.reports.machine import describe_machine, package_versions

__all__ = ["Diagnosis", "EngineState", "SelfTest", "diagnose"]

_PROVIDERS = {kind.name: kind.provider for kind in (OnnxRuntimeCuda, OnnxRuntimeTensorRt)}
"""Engines of ONNX Runtime that need a GPU, and the provider of each."""


SCHEMA = "recallseg-diagnosis/1"


@dataclass(frozen=True)
class EngineState:
    """Whether an engine can run here; ``detail`` says which version, or what is missing."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """A shipped bundle's golden tensors, reproduced by one engine: passed, and how long it took."""

    bundle: str
    engine: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``recallseg doctor`` says."""

    machine: dict[str, Any]
    packages: dict[str, str]
    engines: tuple[EngineState, ...]
    bundles: tuple[str, ...]
    cache: str
    pixels: str
    operators: str
    self_tests: tuple[SelfTest, ...]

    @property
    def healthy(self) -> bool:
        """Whether a real engine (not the fake one) can run, and every self test passed."""
        runnable = any(
            engine.available and engine.name != FakeEngine.name for engine in self.engines
        )
        return runnable and all(test.passed for test in self.self_tests)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"schema": SCHEMA, **asdict(self), "healthy": self.healthy}


def diagnose(*, self_test: bool = True) -> Diagnosis:
    """Look at machine, packages, engines and shipped bundles; import neither torch nor TensorRT.

    Parameters
    ----------
    self_test : run each shipped bundle's golden case through each engine that is available.
    """
    engines = tuple(_state(name) for name in ENGINES)
    # What runs compiled plans is verified when they are built or loaded, not here.
    runnable = [e.name for e in engines if e.available and e.name == OnnxRuntimeCpu.name]
    bundles = shipped_bundles()
    tests = (
        tuple(_test(bundle, name) for bundle in bundles for name in runnable) if self_test else ()
    )
    return Diagnosis(
        describe_machine(),
        package_versions(),
        engines,
        bundles,
        str(cache_folder()),
        _pixels(),
        _operators(),
        tests,
    )


def _state(name: str) -> EngineState:
    try:
        engine_class(name)
    except RecallSegError as error:
        return EngineState(name, False, str(error))
    if name in (*FLAVOURS, *_PROVIDERS):
        return _gpu_state(name)
    if name == OnnxRuntimeCpu.name:
        try:
            module = import_onnxruntime(wanted_by=f"engine '{name}'")
        except (RecallSegError, MemoryError) as error:
            return EngineState(name, False, str(error))
        return EngineState(name, True, f"onnxruntime {module.__version__}")
    return EngineState(name, True, "for tests: no networks, no meaning")


def _pixels() -> str:
    """Which implementation touches pixels here, or why none can."""
    try:
        found = open_pixels()
    except RecallSegError as error:
        return str(error)
    return f"{found.name} ({found.detail})"


def _operators() -> str:
    """Whether the native operators for ONNX Runtime are here."""
    try:
        return describe_operators()
    except RecallSegError as error:
        return str(error)


def _gpu_state(name: str) -> EngineState:
    """Whether the library and a GPU are here, and how many plans were built."""
    try:
        if name in FLAVOURS:
            library = f"{name} {FLAVOURS[name].load().__version__}"
        else:
            library = f"onnxruntime {load_provider(_PROVIDERS[name], name).__version__}"
        device = open_device().facts
        plans = sum(plan.key.engine == name for plan in PlanCache().entries())
    except RecallSegError as error:
        return EngineState(name, False, str(error))
    built = f", {plans} plans in the cache" if name in FLAVOURS else ""
    return EngineState(name, True, f"{library} on {device}{built}; not tested by doctor")


def _test(name: str, engine: str) -> SelfTest:
    start = perf_counter()
    try:
        bundle = Bundle.open(name)
        checks = verify_engines(bundle, load_engines(bundle, engine), "fp32").checks
        worst = max(checks, key=lambda check: check.error / check.tolerance)
        passed, detail = True, f"largest error {worst.error:.1e} ({worst.tensor})"
    except RecallSegError as error:
        passed, detail = False, str(error)
    return SelfTest(name, engine, passed, detail, perf_counter() - start)
