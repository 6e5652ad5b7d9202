"""A stand-in for ONNX Runtime's GPU providers: real sessions on the CPU over a device's memory.

Sessions claim the provider that they were asked for; tensors bound to ``cuda`` addresses are those
of :class:`~recallseg.engines.device.fake.FakeDriver`, which lie in the host's memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import onnxruntime
import pytest

from recallseg.engines import onnxruntime_gpu
from recallseg.engines.operators import operators_digest
from support.fake_tensorrt import HostGpu

__all__ = ["FakeSession", "install"]

REAL = onnxruntime.InferenceSession
CPU = "CPUExecutionProvider"
MOST_KEPT = 24
_kept: dict[object, Any] = {}


def real(path: str, settings: Any) -> Any:
    """A real session on the CPU, once for a file: to make one takes longer than a test's runs."""
    if settings.enable_profiling:
        return REAL(path, settings, providers=[CPU])
    found = os.stat(path)
    file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    key = (os.getpid(), path, *file, settings.intra_op_num_threads, operators_digest())
    if key not in _kept:
        if len(_kept) == MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = REAL(path, settings, providers=[CPU])
    return _kept[key]


class FakeSession:
    """What the provider is asked for is kept in ``made``; the other attributes inject errors."""

    made: list[tuple[str, dict[str, str], Any]]
    runs: list[tuple[str, dict[str, str]]]
    providers: list[str] | None
    """What the session says it has; None is what was asked for."""
    factor: float
    """Multiplies what ``embed`` gives."""
    astray: str
    """Operator that runs on the CPU."""
    failure: str
    """What a run fails with."""
    meanwhile: Callable[[], object]
    """Is done while a run is recorded."""

    def __new__(cls, path: str, sess_options: Any, providers: Any, **flags: Any) -> Any:
        if providers == [CPU]:
            return real(path, sess_options)
        return super().__new__(cls)

    def __init__(
        self, path: str, sess_options: Any, providers: Any, *, enable_fallback: bool
    ) -> None:
        assert not enable_fallback
        ((self.provider, options),) = providers
        self.graph = Path(path).stem.rpartition(".")[2]  # VARIANT.PRECISION.GRAPH
        self.made.append((self.graph, options, sess_options))
        self.stream = int(options["user_compute_stream"])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        settings.enable_profiling = sess_options.enable_profiling
        settings.profile_file_prefix = sess_options.profile_file_prefix
        self.real = real(path, settings)
        self.recorded: set[str] = set()

    def get_providers(self) -> list[str]:
        return [self.provider, CPU] if self.providers is None else self.providers

    def io_binding(self) -> Binding:
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        entries = {}
        for key in ("disable_synchronize_execution_providers", "gpu_graph_id"):
            with suppress(RuntimeError):  # what ONNX Runtime raises for a key that was not set
                entries[key] = options.get_run_config_entry(key)
        self.runs.append((self.graph, entries))
        if self.failure:
            raise RuntimeError(self.failure)
        number = entries.get("gpu_graph_id", "-1")
        if number != "-1" and number not in self.recorded:
            self._record(number)
        HostGpu.driver._queue(self.stream, lambda: self._execute(binding), "run")

    def _record(self, number: str) -> None:
        driver = HostGpu.driver
        driver.recording, driver._spoilt = (self.stream, get_ident()), False
        try:
            type(self).meanwhile()
        finally:
            driver.recording = None
        if driver._spoilt:
            raise RuntimeError("CUDA failure 901: operation failed due to a previous error")
        self.recorded.add(number)

    def _execute(self, binding: Binding) -> None:
        self.real.run_with_iobinding(binding.real)
        if self.graph == "embed" and self.factor != 1.0:
            binding.real.get_outputs()[0].numpy()[:] *= self.factor

    def end_profiling(self) -> str:
        path = Path(self.real.end_profiling())
        events = json.loads(path.read_text())
        for event in events:
            facts = event.get("args", {})
            if "provider" in facts and facts["op_name"] != self.astray:
                facts["provider"] = self.provider
        path.write_text(json.dumps(events))
        return str(path)


class Binding:
    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, kind: str, ordinal: int, *rest: Any) -> None:
        assert (kind, ordinal) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, *rest)

    def bind_output(self, name: str, kind: str, ordinal: int, *rest: Any) -> None:
        assert (kind, ordinal) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0, *rest)


def install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> type[FakeSession]:
    """Put it in ONNX Runtime's place, on a stand-in GPU; return a class of its own to look at."""

    class Session(FakeSession):
        made, runs, providers, factor, astray, failure = [], [], None, 1.0, "", ""
        meanwhile = staticmethod(lambda: None)

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime_gpu, "open_device", HostGpu.open)
    monkeypatch.setenv("RECALLSEG_CACHE", str(cache))
    return Session
