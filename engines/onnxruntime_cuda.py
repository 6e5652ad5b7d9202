"""ONNX Runtime with its CUDA execution provider: its own kernels, no plans to build.

Graphs of variant ``ort-cuda`` are made for it (:mod:`recallseg.export.ort_cuda`); where a bundle
has none, the portable ones serve, or TensorRT's. Those of ``ort-cpu`` do not: their cross-attention
has 256-wide keys and 64-wide values, for which ONNX Runtime 1.31's ``MultiHeadAttention`` is wrong
on CUDA in fp32 (relative error 0.8 to 1 from 128 keys on) and has no fast kernel in fp16.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from recallseg.engines.device import DeviceTensor
from recallseg.engines.device.recording import beside, recording
from recallseg.engines.device_engine import MOST_BINDINGS, binding_key
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineRunError
from recallseg.engines.onnxruntime_gpu import OnnxRuntimeGpu, Sessions
from recallseg.engines.reading import read_text
from recallseg.engines.verdicts import Verdict

__all__ = ["OnnxRuntimeCuda", "work_on_the_cpu"]

SHAPE_BYTES = 4096
"""What a node on the CPU may touch: ONNX Runtime computes shapes there, a few integers at a time,
and that is all that may run there."""


AS_IT_IS = -1
"""Of ``gpu_graph_id``: a run that is neither recorded nor replayed."""

ATTENTION = {"attend": "1"}
"""Provider option ``sdpa_kernel`` by graph, 1 being flash attention: for one head 256 wide it is
half as fast again as cuDNN's, which is the default (296 and 188 TFLOP/s at 65,600 keys on an H100).
Heads elsewhere are narrow. In fp32 there is neither."""


class TracedSessions(Sessions):
    """Sessions that are looked at while they are proven.

    A provider may leave nodes to the CPU, and ONNX Runtime's switch against that counts the shape
    computations, which belong there. So the nodes of the golden run are looked at.
    """

    def prove(self) -> dict[str, Verdict]:
        engines: Mapping[str, Any] = self.make(self.graphs, proving=True)
        verdicts = self.judge(engines)
        found = [(node, graph) for graph in engines for node in engines[graph].finish_trace()]
        if not all(verdict.passed for verdict in verdicts.values()):
            return verdicts
        if found:
            node, graph = found[0]
            reason = f"{len(found)} nodes ran on the CPU, first {node} of graph '{graph}'"
            return {**verdicts, graph: replace(verdicts[graph], passed=False, reason=reason)}
        return super().prove() if self.options.cuda_graphs else verdicts


class OnnxRuntimeCuda(OnnxRuntimeGpu):
    """A graph as a session on the CUDA provider; see :class:`OnnxRuntimeGpu`."""

    name: ClassVar[str] = "onnxruntime-cuda"
    variants: ClassVar[tuple[str, ...]] = ("ort-cuda", "portable", "tensorrt")
    provider: ClassVar[str] = "CUDAExecutionProvider"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "fp16-native", "bf16", "mixed")
    most: ClassVar[int] = 16
    sessions: ClassVar[type[Sessions]] = TracedSessions

    def _provider_options(self, precision: str) -> dict[str, str]:
        attention = ATTENTION.get(self.spec.name) if precision != "fp32" else None
        return {
            **({"sdpa_kernel": attention} if attention else {}),
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.stream.handle),
            "arena_extend_strategy": "kSameAsRequested",
            # As fast as an exhaustive search on the few convolutions there are, and loads faster.
            "cudnn_conv_algo_search": "HEURISTIC",
            # Sums of fp16 in fp32; a mean of squares in fp16 has 10 bits.
            "enable_skip_layer_norm_strict_mode": "1",
            # fp32 has to mean fp32; its products would be rounded to 10 bits otherwise.
            "use_tf32": "0",
            # Also where nothing is recorded (_bind_all): without it ONNX Runtime gives pinned
            # memory back in a callback on the stream (CudaStream::CleanUpOnRunEnd), which owns the
            # allocator too. Where it is the last owner the allocator frees its memory there, and
            # CUDA lets a callback call nothing: cudaFreeHost, error 800 (not permitted; those of
            # recording are 900 to 908) ended the process, on an H100 while exemplars were added.
            "enable_cuda_graph": "1",
        }

    @classmethod
    def _settings(cls, options: EngineOptions) -> list[Any]:
        return [*super()._settings(options), ATTENTION]

    def _configure(self, settings: Any, *, proving: bool) -> None:
        if proving:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(self.folder / "trace")

    def finish_trace(self) -> list[str]:
        """End the profile of a session made for the proof; return what ran on the CPU.

        Raises
        ------
        EngineRunError
            If ONNX Runtime left no profile to read.
        """
        path = Path(self._session.end_profiling())
        try:
            events = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise EngineRunError(
                f"ONNX Runtime's profile {path} cannot be read: {error}. Where graph "
                f"'{self.spec.name}' ran cannot be told."
            ) from error
        finally:
            path.unlink(missing_ok=True)
        return work_on_the_cpu(events)

    def _start(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        # ONNX Runtime records and replays itself; the first call of a binding runs as often as that
        # takes.
        known = not self.options.cuda_graphs or binding_key(inputs, outputs) in self._bindings
        with beside() if known else recording():
            self._enqueue(inputs, outputs)

    def _bind_all(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> tuple[Any, Any]:
        binding, run = super()._bind_all(inputs, outputs)
        number = AS_IT_IS
        if self.options.cuda_graphs:
            # A recording is valid for its shapes and addresses only: each binding has its own.
            # ONNX Runtime forgets none, so that those beyond the limit run as they are.
            self._recordings += 1
            number = self._recordings if self._recordings <= MOST_BINDINGS else AS_IT_IS
        run.add_run_config_entry("gpu_graph_id", str(number))
        return binding, run

    _recordings = 0


def work_on_the_cpu(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the nodes of an ONNX Runtime profile that did more than shapes on the CPU.

    Parameters
    ----------
    events : of the profile; kernels are those of category ``Node`` that name a ``provider``.
    """
    found: dict[str, None] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and facts.get("provider") == "CPUExecutionProvider":
            touched = max(int(facts.get(f"{part}_size", 0)) for part in ("activation", "output"))
            if touched > SHAPE_BYTES:
                found[f"{facts.get('op_name', '?')} ({event['name']})"] = None
    return list(found)
