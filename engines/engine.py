"""What an engine is: one graph made ready to run, with every check in one place.

A backend subclasses :class:`Engine` and overrides :meth:`Engine._execute` only; names, dtypes,
shapes and contiguity are checked here, so that all backends refuse the same mistakes with the same
words and a C++ or CUDA backend never sees a bad pointer. Backends on a GPU subclass
:class:`recallseg.engines.device_engine.DeviceEngine` instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device.memory import DeviceTensor
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.device import Device, Stream

__all__ = ["AnyTensor", "Engine", "EngineOptions", "Tensor"]

Tensor = NDArray[np.float32]
AnyTensor = Union[Tensor, DeviceTensor]


@dataclass(frozen=True)
class EngineOptions:
    """What a caller may ask of any engine.

    Attributes
    ----------
    threads : intra-operator threads on a CPU; None means one per core that this process may use.
    device : the GPU to run on; None opens the first one. Engines on the CPU pass over it and what
        follows.
    streams : on which stream a graph is queued, by its name; the device's own for those not named.
    cuda_graphs : record what a graph queues, and replay it whenever shapes and addresses are as
        before.
    """

    threads: int | None = None
    device: Device | None = None
    streams: Mapping[str, Stream] = field(default_factory=dict)
    cuda_graphs: bool = False


class Engine(ABC):
    """One graph, ready to run on one device. Not safe for two threads at a time."""

    name: ClassVar[str]
    """The engine's public name, e.g. ``onnxruntime-cpu``."""
    variants: ClassVar[tuple[str, ...]]
    """Graph variants that this engine accepts, best first."""
    place: ClassVar[Literal["host", "device"]] = "host"
    """Where the tensors lie that it takes without a copy."""
    graph_digest: str = ""
    """Digest of the graph that was loaded, see :meth:`Bundle.graph_digest`; "" outside a bundle."""

    def __init__(
        self, spec: GraphSpec, path: Path | None = None, options: EngineOptions | None = None
    ) -> None:
        self.spec = spec
        self.path = path
        self.options = options or EngineOptions()

    @classmethod
    def load_all(
        cls,
        bundle: Bundle,
        precision: str,
        options: EngineOptions,
        graphs: tuple[str, ...],
        variants: tuple[str, ...] | None = None,
    ) -> dict[str, Engine]:
        """Make graphs of a bundle ready to run; a backend that compiles them overrides this.

        Parameters and errors are those of :func:`recallseg.engines.registry.load_engines`.
        """
        engines: dict[str, Engine] = {}
        for graph in graphs:
            path, variant = bundle.graph_file(graph, variants or cls.variants, precision)
            engines[graph] = cls(bundle.specs[graph], path, options)
            engines[graph].graph_digest = bundle.graph_digest(graph, variant, precision)
        return engines

    def run(self, inputs: Mapping[str, AnyTensor], outputs: Mapping[str, AnyTensor]) -> None:
        """Run the graph from caller-owned inputs into caller-owned outputs, and wait for the end.

        Parameters
        ----------
        inputs, outputs : exactly the tensors of ``self.spec``, by name, C-contiguous.

        Raises
        ------
        EngineRunError
            On missing or unknown tensors, wrong dtype or shape, tensors on a device that this
            engine does not run on, or a failure of the backend.
        """
        self._check(inputs, outputs)
        if any(isinstance(t, DeviceTensor) for t in (*inputs.values(), *outputs.values())):
            raise EngineRunError(
                f"graph '{self.spec.name}': engine '{self.name}' runs on the CPU and got tensors "
                "that lie on a GPU. Copy them to the CPU first, or use an engine on the GPU."
            )
        tensors: tuple[Any, Any] = (inputs, outputs)
        self._execute(*tensors)

    def allocate_outputs(self, **symbols: int) -> dict[str, Tensor]:
        """Return new output tensors, e.g. ``engine.allocate_outputs(n=2)``."""
        return {
            spec.name: np.empty(spec.resolve(**symbols), spec.dtype) for spec in self.spec.outputs
        }

    @abstractmethod
    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run with tensors that have been checked."""

    def _check(self, inputs: Mapping[str, AnyTensor], outputs: Mapping[str, AnyTensor]) -> None:
        symbols: dict[str, int] = {}
        self._bind("input", self.spec.inputs, inputs, symbols)
        self._bind("output", self.spec.outputs, outputs, symbols)

    def _bind(
        self,
        role: str,
        specs: tuple[TensorSpec, ...],
        tensors: Mapping[str, AnyTensor],
        symbols: dict[str, int],
    ) -> None:
        expected = [spec.name for spec in specs]
        if set(tensors) != set(expected):
            raise EngineRunError(
                f"graph '{self.spec.name}': {role}s must be {', '.join(expected)}; got "
                f"{', '.join(sorted(tensors)) or 'none'}."
            )
        for spec in specs:
            spec.bind(tensors[spec.name], symbols, self.spec.name)

    def describe(self) -> dict[str, Any]:
        """What this engine really runs on, read back from the backend, for reports."""
        return {"engine": self.name}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.name!r})"
