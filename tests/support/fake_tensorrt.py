"""A stand-in for TensorRT's Python API: plans hold the graph, and ONNX Runtime executes it.

It keeps to the parts of the API that RecallSeg uses and refuses what the real one refuses, so that
everything but the GPU is exercised: profiles, addresses, shapes, plans of another version. Its
"device memory" is host memory, see :class:`HostGpu`.
"""

from __future__ import annotations

import ctypes
import enum
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from recallseg.engines.device import Device, DeviceFacts
from support.fake_driver import FakeDriver

__all__ = ["HostGpu", "make_tensorrt"]

MAGIC = b"standin!"


class HostGpu:
    """A device in the host's memory, and what it says it is."""

    facts = DeviceFacts("Stand-in", 87, "12.6")
    driver: FakeDriver
    """Of the device that was opened last: plans are queued there."""

    @classmethod
    def open(cls, **facts: Any) -> Device:
        cls.driver = FakeDriver(**facts)
        device = Device(cls.driver)
        device.facts = cls.facts
        return device


class Values:
    """A set of names that the API makes an enumeration of."""

    def __init__(self, *names: str) -> None:
        for index, name in enumerate(names):
            setattr(self, name, index)


class Severity(enum.IntEnum):
    ERROR = 1
    WARNING = 2


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        dims = value.type.tensor_type.shape.dim
        self.dtype = value.type.tensor_type.elem_type
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model: onnx.ModelProto | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.model.graph.node))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class Complaint:
    def __init__(self, node: onnx.NodeProto | None, text: str) -> None:
        self._node, self._text = node, text

    def desc(self) -> str:
        return self._text

    def node_operator(self) -> str:
        return self._node.op_type if self._node else "?"

    def node_name(self) -> str:
        return self._node.name if self._node else "?"


class Parser:
    refuses = frozenset({"Attention", "RoiAlign"})

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network
        self._errors: list[Complaint] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Complaint:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        try:
            model = onnx.load(path)
        except Exception as error:
            self._errors.append(Complaint(None, f"not a model: {error}"))
            return False
        for node in model.graph.node:
            if node.op_type in self.refuses:
                self._errors.append(Complaint(node, "no importer registered for op"))
        self._network.model = model
        self._network.inputs = [Tensor(value) for value in model.graph.input]
        self._network.outputs = [Tensor(value) for value in model.graph.output]
        return not self._errors


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = list(shapes)


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[Profile] = []
        self.progress_monitor: Any = None
        self.hardware_compatibility_level: Any = None
        self.limits: dict[int, int] = {}
        self.num_compute_capabilities = 0
        self.capabilities: dict[int, str] = {}

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        self.limits[pool] = size

    def set_compute_capability(self, value: str, index: int) -> bool:
        self.capabilities[index] = value
        return True


class Context:
    def __init__(self, engine: Engine, cache: RuntimeCache | None = None) -> None:
        self._engine, self._cache = engine, cache
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._last: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self._engine.header["profile"].get(name)
        if limits is not None:
            least, _, most = limits
            if any(not low <= s <= high for low, s, high in zip(least, shape, most, strict=True)):
                return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        if self._cache is not None:
            self._cache.compiled.add(str(shapes))
        if HostGpu.driver._capturing == stream and shapes != self._last:
            return False  # shapes have to be settled by a run before they are recorded
        self._last = shapes
        # As kernels are: run now, or recorded with these shapes and addresses.
        HostGpu.driver._queue(stream, lambda: self._execute(shapes, addresses), "execute")
        return True

    def _execute(self, shapes: dict[str, Any], addresses: dict[str, int]) -> None:
        session = self._engine.session
        inputs = {}
        for value in session.get_inputs():
            shape = shapes[value.name]
            dtype = np.dtype(_TYPES[value.type])
            source = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(
                addresses[value.name]
            )
            inputs[value.name] = np.frombuffer(source, dtype).reshape(shape).copy()
        found = session.run(None, inputs)
        for value, array in zip(session.get_outputs(), found, strict=True):
            made = self._engine.spoil(value.name, np.ascontiguousarray(array), inputs)
            ctypes.memmove(addresses[value.name], made.ctypes.data, made.nbytes)


_TYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(bool)": "bool"}


class Engine:
    def __init__(self, header: dict[str, Any], model: bytes, spoil: Any) -> None:
        self.header, self.spoil = header, spoil
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

        self.names = [v.name for v in (*self.session.get_inputs(), *self.session.get_outputs())]

    num_io_tensors = property(lambda self: len(self.names))
    device_memory_size_v2 = 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        assert config is None or config.cache is not None
        if config is not None:
            assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"
        return Context(self, None if config is None else config.cache)


class RuntimeCache:
    """Holds the shapes that kernels were compiled for."""

    kernels = b"kernels of " + HostGpu.facts.name.encode()

    def __init__(self) -> None:
        self.compiled: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        made, *shapes = blob.split(b"\n")
        if made != self.kernels:
            return False
        self.compiled = {shape.decode() for shape in shapes}
        return True

    def serialize(self) -> bytes:
        return b"\n".join([self.kernels, *(s.encode() for s in sorted(self.compiled))])


class RuntimeConfig:
    def __init__(self) -> None:
        self.cache: RuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        self.cache = cache


def make_tensorrt(version: str = "10.3.0") -> Any:
    """Return a module that behaves like ``tensorrt`` of that version.

    Attributes for the tests: ``made`` (the networks and configurations that were built) and
    ``spoil``, a function (tensor's name, array, inputs) -> array through which every output goes;
    ``tamper``, a function that changes a model before it becomes a plan.
    """
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    module.made = []
    module.spoil = lambda name, array, inputs: array
    module.tamper = lambda model: None
    module.fail_build = module.fail_load = ""
    module.ComputeCapability = type(
        "ComputeCapability", (), {f"SM{number}": f"SM{number}" for number in (75, 80, 86, 87, 89)}
    )
    module.DynamicShapesKernelSpecializationStrategy = type("Strategy", (), {"EAGER": "EAGER"})
    names = ["TF32", "STRIP_PLAN", "VERSION_COMPATIBLE", "REFIT"]
    module.BuilderFlag = type("BuilderFlag", (), {name: name for name in names})
    if int(version.split(".")[0]) < 11:
        module.NetworkDefinitionCreationFlag = Values("EXPLICIT_BATCH", "STRONGLY_TYPED")
    module.MemoryPoolType = Values("WORKSPACE")
    module.ProfilingVerbosity = Values("LAYER_NAMES_ONLY", "DETAILED")
    module.HardwareCompatibilityLevel = Values("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
    module.OnnxParser = Parser
    kinds = ("FLOAT", "INT32", "BOOL")
    module.DataType = type("DataType", (), {k: getattr(onnx.TensorProto, k) for k in kinds})

    class Logger:
        ERROR, WARNING = Severity.ERROR, Severity.WARNING

    class Monitor:
        pass

    module.ILogger, module.IProgressMonitor = Logger, Monitor

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            module.made.append((network, config))
            config.progress_monitor.phase_start("Building engine", None, 1)
            if not config.progress_monitor.step_complete("Building engine", 0):
                return None
            if module.fail_build:
                self._logger.log(Severity.ERROR, module.fail_build)
                return None
            assert network.model is not None
            module.tamper(network.model)
            header = {"version": version, "profile": config.profiles[0].shapes}
            text = json.dumps(header).encode()
            model = network.model.SerializeToString()
            return MAGIC + len(text).to_bytes(4, "little") + text + model

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if module.fail_load:
                self._logger.log(Severity.ERROR, module.fail_load)
                return None
            if plan[:8] != MAGIC:
                self._logger.log(Severity.ERROR, "not a plan")
                return None
            size = int.from_bytes(plan[8:12], "little")
            header = json.loads(plan[12 : 12 + size])
            if header["version"] != version:
                self._logger.log(Severity.ERROR, "plan was made by another version")
                return None
            return Engine(header, bytes(plan[12 + size :]), lambda *args: module.spoil(*args))

    module.Builder, module.Runtime = Builder, Runtime
    return module


def small_graph(path: Path) -> Path:
    """Write a graph that no spec of ours has, and return its path."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [result])), path)
    return path
