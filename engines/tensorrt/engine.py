"""A verified plan, ready to run: one graph on one GPU by TensorRT or TensorRT-RTX.

It never ran on a GPU (docs/device/status.md); everything short of one is tested with a stand-in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recallseg.engines.device import Device, DeviceTensor
from recallseg.engines.device.recording import beside
from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.durable import replace_file
from recallseg.engines.engine import Engine, EngineOptions
from recallseg.engines.errors import DeviceMemoryError, EngineRunError, PlanError
from recallseg.engines.reading import read_file
from recallseg.engines.specs import GraphSpec
from recallseg.engines.tensorrt.building import VARIANTS
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import Plan
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.verdicts import writing

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["TensorRt", "TensorRtRtx"]


_NO_MEMORY = re.compile(r"out ?of ?memory|cudaErrorMemoryAllocation", re.IGNORECASE)
_SCRATCH = "device_memory_size_v2"
"""Bytes that a context allocates when it is made; TensorRT before 10.1 does not say."""


class TensorRt(DeviceEngine):
    """One plan, queued on its stream.

    Parameters
    ----------
    spec : the graph's tensors.
    plan : from the cache; its bytes are checked here.
    device : the GPU; shared by the five engines.
    graph : the ``.onnx`` file, needed for a plan without weights only.

    Attributes
    ----------
    scratch_bytes : what the plan works in; 0 where TensorRT does not say.

    Raises
    ------
    EngineUnavailableError
        If TensorRT is not here.
    PlanError
        If the plan is damaged, or TensorRT does not take it.
    """

    name: ClassVar[str] = "tensorrt"
    variants: ClassVar[tuple[str, ...]] = VARIANTS

    def __init__(
        self,
        spec: GraphSpec,
        plan: Plan,
        device: Device,
        graph: Path | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        super().__init__(spec, graph, options, device=device)
        self.plan = plan
        self.profile = Profile.from_json(plan.key.profile)
        self._api = FLAVOURS[self.name].load()
        self._log: list[str] = []
        self._logger = _logger(self._api, self._log)
        with beside():
            self._take(graph)
        self._addresses: dict[str, int] = {}

    def _take(self, graph: Path | None) -> None:
        """Make of the plan what runs it; that takes memory of the device."""
        plan, spec, device = self.plan, self.spec, self.device
        device.enter()
        runtime = self._api.Runtime(self._logger)
        plan_bytes = plan.read()
        self._engine = runtime.deserialize_cuda_engine(plan_bytes)
        if self._engine is None:
            self._check_memory("its plan", len(plan_bytes))
            raise PlanError(
                f"{self.name} {self._api.__version__} does not take plan {plan.folder} "
                f"({plan.key.version}, {plan.key.target}): {self._said()}. Build it again on this "
                "machine: recallseg build --rebuild."
            )
        self._runtime = runtime  # has to live as long as its engines
        if plan.key.options.get("stripped"):
            self._put_weights_back(graph)
        self._check_tensors()
        self.scratch_bytes = scratch = int(getattr(self._engine, _SCRATCH, 0))
        device.require(scratch, f"What graph '{spec.name}' works in, with {self.name},")
        self._context = self._make_context()
        if self._context is None:
            self._check_memory("its scratch memory", scratch)
            raise EngineRunError(
                f"graph '{spec.name}': {self.name} makes no execution context: {self._said()}."
            )

    @classmethod
    def load_all(
        cls,
        bundle: Bundle,
        precision: str,
        options: EngineOptions,
        graphs: tuple[str, ...],
        variants: tuple[str, ...] | None = None,
    ) -> dict[str, Engine]:
        """Load plans that were verified on this GPU; verify them first if they were not yet."""
        from recallseg.engines.tensorrt.loading import Plans

        return Plans(cls, bundle, precision, options).load(graphs)

    @classmethod
    def require_library(cls) -> None:
        FLAVOURS[cls.name].load()

    def _make_context(self) -> Any:
        return self._engine.create_execution_context()

    def _check_memory(self, what: str, nbytes: int) -> None:
        """Raise DeviceMemoryError if that is what TensorRT complains of."""
        self.device.probe()
        if _NO_MEMORY.search(self._said()):
            raise DeviceMemoryError(
                f"graph '{self.spec.name}': the GPU has no room for {what}, "
                f"{nbytes / 2**20:.0f} MiB; {self.device.free_memory() / 2**20:.0f} MiB are free: "
                f"{self._said()}. Close other programs that use the GPU, or build with a smaller "
                "--max-k or --max-n; 'recallseg doctor --budget' says what is needed."
            )

    def _put_weights_back(self, graph: Path | None) -> None:
        if graph is None:
            raise EngineRunError(
                f"plan {self.plan.folder} has no weights, and no graph was given to take them from."
            )
        refitter = self._api.Refitter(self._engine, self._logger)
        parser = self._api.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise PlanError(
                f"the weights of {graph} do not fit plan {self.plan.folder}: {self._said()}."
            )

    def _check_tensors(self) -> None:
        count = int(self._engine.num_io_tensors)
        found = {str(self._engine.get_tensor_name(index)) for index in range(count)}
        wanted = {tensor.name for tensor in (*self.spec.inputs, *self.spec.outputs)}
        if found != wanted:
            raise PlanError(
                f"plan {self.plan.folder} has the tensors {sorted(found)}; graph "
                f"'{self.spec.name}' needs {sorted(wanted)}. Build it again."
            )

    def _enqueue(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        self._check_profile(inputs)
        context = self._context
        self.device.enter()
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tensor.shape):
                raise EngineRunError(
                    f"graph '{self.spec.name}': {self.name} does not take shape {tensor.shape} "
                    f"for '{name}': {self._said()}."
                )
        for name, tensor in (*inputs.items(), *outputs.items()):
            if self._addresses.get(name) != tensor.address:
                if not context.set_tensor_address(name, tensor.address):
                    raise EngineRunError(
                        f"graph '{self.spec.name}': {self.name} does not take address "
                        f"{tensor.address:#x} for '{name}': {self._said()}."
                    )
                self._addresses[name] = tensor.address
        if not context.execute_async_v3(self.stream.handle):
            self.device.probe()  # says so if the device is lost
            raise EngineRunError(f"graph '{self.spec.name}': {self.name} failed: {self._said()}.")

    def _check_profile(self, inputs: Mapping[str, DeviceTensor]) -> None:
        for tensor in self.spec.inputs:
            for size, symbol in zip(inputs[tensor.name].shape, tensor.shape, strict=True):
                if isinstance(symbol, str) and size not in getattr(self.profile, symbol):
                    raise EngineRunError(
                        f"graph '{self.spec.name}': {symbol} = {size} was asked for, the plan was "
                        f"built for {self.profile}. Ask for less, or build again with "
                        f"--max-{symbol} {size}."
                    )

    def layers(self) -> str:
        """Return what TensorRT made of the graph, as its inspector's JSON: is attention fused?"""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._api.LayerInformationFormat.JSON))

    def _said(self) -> str:
        return "; ".join(self._log[-4:]) or "no message was given"

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "version": str(self._api.__version__),
            "device": str(self.device.facts),
            "cuda_graph": self.options.cuda_graphs,
            "plan": self.plan.sha256,
            "precision": self.plan.key.precision,
            "target": self.plan.key.target,
            "profile": self.profile.to_json(),
        }


class TensorRtRtx(TensorRt):
    """The same with TensorRT-RTX, which compiles kernels on the device when they are first used.

    It does so at the first call of every set of shapes, and keeps what it compiled beside the plan
    (where that folder can be written), so that the next process does not compile it again.
    """

    name: ClassVar[str] = "tensorrt-rtx"

    def _make_context(self) -> Any:
        """Make a context that takes its kernels from the runtime cache, if there is one."""
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        settings = self._engine.create_runtime_config()
        # By default it compiles in the background and uses other kernels meanwhile: those would be
        # proven and recorded, and these would run.
        settings.dynamic_shapes_kernel_specialization_strategy = (
            self._api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._kernels = settings.create_runtime_cache()
        path = self._kernel_file()
        # The cache checks device, driver and version itself; refused, it fills itself anew.
        self.kernels_found = path.is_file() and bool(self._kernels.deserialize(read_file(path)))
        settings.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(settings)

    def _enqueue(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        super()._enqueue(inputs, outputs)
        shapes = tuple(tensor.shape for tensor in inputs.values())
        if shapes not in self._shapes:
            self._shapes.add(shapes)
            self._keep_kernels()

    def _keep_kernels(self) -> None:
        """Write the runtime cache, if it holds what the file does not.

        A folder that is read-only, as one that was shipped, stays as it is.
        """
        path = self._kernel_file()
        found = bytes(memoryview(self._kernels.serialize()))
        if os.access(path.parent, os.W_OK) and not (path.is_file() and read_file(path) == found):
            with writing(path):
                replace_file(path, found)

    def _kernel_file(self) -> Path:
        device = self.device.facts
        name = "".join(c if c.isalnum() else "-" for c in str(device))
        return self.plan.folder / f"runtime-{name}"

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "kernels_found": self.kernels_found}


def _logger(api: Any, messages: list[str]) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= api.ILogger.WARNING:
                messages.append(message)
                del messages[:-50]

    return Logger()
