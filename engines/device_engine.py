"""What engines on a GPU have in common: tensors that lie there already, staging, CUDA graphs."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from recallseg.engines.device import Device, DeviceTensor, Graph, Stream, open_device
from recallseg.engines.device.recording import beside, give_back, recording
from recallseg.engines.engine import AnyTensor, Engine, EngineOptions, Tensor
from recallseg.engines.errors import DeviceLostError, EngineRunError
from recallseg.engines.specs import GraphSpec

__all__ = ["Binding", "DeviceEngine", "binding_key"]

MOST_BINDINGS = 32
"""Sets of shapes and addresses that an engine keeps something for; the oldest goes first."""

Binding = tuple[tuple[str, int, tuple[int, ...]], ...]
"""Name, address and shape of every tensor of a call."""


def binding_key(*tensors: Mapping[str, DeviceTensor]) -> Binding:
    """Return what tells two calls apart that are not bound alike."""
    return tuple((name, t.address, t.shape) for group in tensors for name, t in group.items())


class DeviceEngine(Engine):
    """A graph on a GPU. A backend overrides :meth:`_enqueue`.

    Parameters
    ----------
    spec, path, options : as for every engine; ``options`` may name the stream.
    device : None takes that of the options, or opens the first GPU.
    """

    place: ClassVar[Literal["host", "device"]] = "device"

    def __init__(
        self,
        spec: GraphSpec,
        path: Path | None = None,
        options: EngineOptions | None = None,
        *,
        device: Device | None = None,
    ) -> None:
        super().__init__(spec, path, options)
        self.device = device or self.options.device or open_device()
        self.stream = self.options.streams.get(spec.name, self.device.stream)
        self._staged: dict[str, DeviceTensor] = {}
        self._recorded: OrderedDict[Binding, Graph] = OrderedDict()
        # What it holds frees memory of the device when it goes.
        let_go = partial(_let_go, self.device, self.stream, self.__dict__)
        weakref.finalize(self, give_back, let_go).atexit = False

    @classmethod
    @abstractmethod
    def require_library(cls) -> None:
        """Raise EngineUnavailableError, with what to install, if its library is not here."""

    def run(self, inputs: Mapping[str, AnyTensor], outputs: Mapping[str, AnyTensor]) -> None:
        """Queue the graph on tensors of the device, without a copy and without waiting.

        Tensors of the host are taken as well, all of them or none; they are copied there and back,
        and the call waits for the end.

        Raises
        ------
        EngineRunError
            As every engine does, or if some tensors lie here and some there.
        DeviceLostError, DeviceMemoryError
        """
        self._check(inputs, outputs)
        tensors: tuple[Any, Any] = (inputs, outputs)
        there = [isinstance(t, DeviceTensor) for t in (*inputs.values(), *outputs.values())]
        if all(there):
            self._start(*tensors)
        elif not any(there):
            self._execute(*tensors)
        else:
            raise EngineRunError(
                f"graph '{self.spec.name}': some tensors lie on the GPU and some on the CPU. Pass "
                "all of them there, or all of them here."
            )

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        placed = {name: self._stage(name, array) for name, array in inputs.items()}
        results = {name: self._stage(name, array) for name, array in outputs.items()}
        for name, array in inputs.items():
            self.stream.copy_in(placed[name], array)
        self._start(placed, results)
        for name, array in outputs.items():
            self.stream.copy_out(array, results[name])
        self.stream.synchronize()

    def _stage(self, name: str, array: Tensor) -> DeviceTensor:
        """Return room for a tensor of the host; allocated anew only when it has to grow."""
        held = self._staged.get(name)
        if held is None or held.nbytes < array.nbytes:
            held = self._staged[name] = self.device.tensor(array.shape, array.dtype)
        return held.reshape(*array.shape)

    def _start(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        """Queue the graph or its recording.

        The first call of a binding is run as it is, since backends allocate and choose kernels
        then, and recorded right after it: what a backend remembers of shapes is still that call's.
        Every later one is replayed.
        """
        if not self.options.cuda_graphs:
            with beside():  # a backend may allocate, or wait
                self._enqueue(inputs, outputs)
            return
        key = binding_key(inputs, outputs)
        graph = self._recorded.get(key)
        if graph is not None:
            graph.launch(self.stream)
            return
        with recording():
            self._enqueue(inputs, outputs)
            with self.stream.capture() as made:
                self._enqueue(inputs, outputs)
        self._recorded[key] = made[0]
        if len(self._recorded) > MOST_BINDINGS:
            self._recorded.popitem(last=False)

    @abstractmethod
    def _enqueue(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        """Queue the graph on ``self.stream`` with tensors that have been checked."""


def _let_go(device: Device, stream: Stream, held: dict[str, Any]) -> None:
    """Wait for an engine's stream, and then drop all that it held.

    It must not go while its work is queued: callbacks on the stream would own what it held, and
    CUDA lets nothing be freed there. A lost device has nothing left to do.
    """
    with suppress(DeviceLostError):
        device.enter()
        if stream.owned:
            stream.synchronize()
        else:  # its owner may have ended it since, and then its handle is nobody's
            device.synchronize()
    held.clear()
