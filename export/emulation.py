"""What another precision does to a graph, seen on a CPU that computes in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from recallseg.engines.engine import Engine, EngineOptions, Tensor
from recallseg.engines.errors import EngineRunError
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.onnxruntime_cpu import usable_cores
from recallseg.engines.specs import GraphSpec
from recallseg.export.precision import emulate
from recallseg.export.reading import read_graph

__all__ = ["EmulatedEngine"]


class EmulatedEngine(Engine):
    """Executes a graph of any precision with its roundings, by :func:`..precision.emulate`.

    It tells what the types do, not what a GPU's kernels do: their sums may be in other orders and
    types, which is why every built engine is verified as well. Slow: nothing is optimized.
    """

    name: ClassVar[str] = "emulated"
    variants: ClassVar[tuple[str, ...]] = ("tensorrt", "portable")

    def __init__(
        self, spec: GraphSpec, path: Path | None = None, options: EngineOptions | None = None
    ) -> None:
        super().__init__(spec, path, options)
        if path is None:
            raise EngineRunError(f"graph '{spec.name}': emulation needs a .onnx file, got none.")
        onnxruntime = import_onnxruntime(wanted_by="the emulation of a precision", extra="export")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.options.threads or usable_cores()
        settings.log_severity_level = 3
        # A cast to fp16 and back is what is wanted here, and nothing to be optimized away.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session: Any = onnxruntime.InferenceSession(
            emulate(read_graph(path)).SerializeToString(),
            settings,
            providers=["CPUExecutionProvider"],
        )

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        names = list(outputs)
        for name, value in zip(names, self._session.run(names, dict(inputs)), strict=True):
            outputs[name][...] = value
