"""Graph in, serialized plan out: parse, profile, target, build. Writes nothing to disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from recallseg.engines.errors import EngineRunError, EngineUnavailableError
from recallseg.engines.specs import GraphSpec
from recallseg.engines.tensorrt.flavour import Flavour, version_of
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.tensorrt.targets import Target

__all__ = ["BuildRequest", "Built", "build_plan"]

Report = Callable[[str], None]

_TYPES = {"float32": "FLOAT", "int32": "INT32", "bool": "BOOL"}
"""TensorRT's names of what specs say."""

_LAYER = re.compile(r"^Name: .*?, LayerType: (\w+)", re.MULTILINE)
_ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes", re.MULTILINE)
"""How TensorRT-RTX tells what it has made; TensorRT says the second too."""

_ORDER = frozenset(("signal", "wait"))
"""Layers that only keep streams in step."""

_ATTENTION_PARSER = (10, 14)
"""The first TensorRT whose parser takes the standard ``Attention`` operator."""


@dataclass(frozen=True)
class BuildRequest:
    """Everything that decides which plan comes out.

    Attributes
    ----------
    flavour : which TensorRT.
    precision : of the graph; only TF32 depends on it (see :func:`_configure`).
    profile, target : see there.
    strip_weights : leave the weights out of the plan; they are put back from the graph's file when
        it is loaded. Such a plan is small enough to ship one for every GPU.
    workspace_bytes : most scratch memory a kernel may take; None leaves it to TensorRT.
    """

    flavour: Flavour
    precision: str
    profile: Profile
    target: Target
    strip_weights: bool = False
    workspace_bytes: int | None = None


@dataclass(frozen=True)
class Built:
    """A serialized plan, and what was seen while it was made."""

    plan: bytes = field(repr=False)
    version: str
    seconds: float
    layers: int
    messages: tuple[str, ...]
    """Every message of parser and builder at severity warning or worse, in order."""
    kernels: int | None = None
    """Layers of the plan that do work, None if the builder does not tell them."""
    activation_bytes: int | None = None
    """What the plan works in with the profile's largest shapes, as the builder says."""


def build_plan(
    graph: Path, spec: GraphSpec, request: BuildRequest, report: Report = lambda step: None
) -> Built:
    """Build the plan of one graph.

    Parameters
    ----------
    graph : the ``.onnx`` file; its weights may lie beside it.
    spec : the tensors that it must have.
    request : what to build.
    report : is told each phase of the builder as it begins, and every warning.

    Raises
    ------
    EngineUnavailableError
        If TensorRT cannot be loaded, or the target needs a GPU and there is none.
    EngineRunError
        If the parser or the builder refuses; with all of their messages.
    """
    api = request.flavour.load()
    start = perf_counter()
    logger = _make_logger(api, report)
    try:
        builder = api.Builder(logger)
    except Exception as error:  # pybind: "factory function returned nullptr" without a driver
        raise _no_builder(request, logger.messages, error) from error
    network = builder.create_network(request.flavour.network_flags(api))
    _parse(api, network, graph, logger)
    _check_tensors(api, network, spec, graph)
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # or it tells no layers
    config.progress_monitor = monitor = _make_monitor(api, report)
    config.add_optimization_profile(_profile(builder, spec, request.profile))
    _configure(api, config, request)
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineRunError(
            f"{request.flavour.name} {api.__version__} cannot build graph '{spec.name}' for "
            f"{request.target}:{_lines(logger.messages)}{_hint(request, logger.messages)}"
        )
    return Built(
        bytes(memoryview(plan)),
        str(api.__version__),
        perf_counter() - start,
        int(network.num_layers),
        tuple(logger.messages),
        logger.kernels or None,
        logger.activation_bytes,
    )


def _make_logger(api: Any, report: Report) -> Any:
    """Return a logger that keeps what matters; TensorRT would print it on stdout otherwise."""

    class Logger(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.messages: list[str] = []
            self.kernels = 0
            self.activation_bytes: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity <= api.ILogger.WARNING:
                self.messages.append(message)
                report(message)
                return
            self.kernels += sum(kind not in _ORDER for kind in _LAYER.findall(message))
            if found := _ACTIVATIONS.search(message):
                self.activation_bytes = int(found[1])

    return Logger()


def _make_monitor(api: Any, report: Report) -> Any:
    """Return a monitor that reports phases, and lets an interruption out of the builder."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            try:
                report(phase)
            except KeyboardInterrupt:
                self.interrupted = True

        def step_complete(self, phase: str, step: int) -> bool:
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _parse(api: Any, network: Any, graph: Path, logger: Any) -> None:
    """Parse; the result is looked at, and every message of the parser is passed on."""
    parser = api.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if parsed and not errors:
        return
    messages = [
        f"{_call(error, 'node_operator')} '{_call(error, 'node_name')}': {error.desc()}"
        for error in errors
    ] or logger.messages
    hint = ""
    if any(_call(error, "node_operator") == "Attention" for error in errors) and (
        version_of(api) < _ATTENTION_PARSER
    ):
        hint = (
            " The operator Attention needs TensorRT 10.14: export the bundle with --variants "
            "portable,tensorrt, which spells it out."
        )
    raise EngineRunError(f"TensorRT's parser does not take {graph.name}:{_lines(messages)}{hint}")


def _call(error: Any, name: str) -> str:
    """Return a property of a parser error; versions before 10 have fewer of them."""
    method = getattr(error, name, None)
    return str(method()) if method else "?"


def _check_tensors(api: Any, network: Any, spec: GraphSpec, graph: Path) -> None:
    """Compare names, shapes and types with the spec: a plan is used by them, blindly."""
    for role, count, get, wanted in (
        ("inputs", network.num_inputs, network.get_input, spec.inputs),
        ("outputs", network.num_outputs, network.get_output, spec.outputs),
    ):
        found = {get(i).name: tuple(get(i).shape) for i in range(count)}
        expected = {
            tensor.name: tuple(-1 if isinstance(d, str) else d for d in tensor.shape)
            for tensor in wanted
        }
        # An output's size may be unknown to the parser (-1) where we know it.
        differs = set(found) != set(expected) or any(
            len(found[name]) != len(shape)
            or any(f not in (e, -1) for f, e in zip(found[name], shape, strict=True))
            for name, shape in expected.items()
        )
        types = {get(i).name: get(i).dtype for i in range(count)}
        odd = {
            tensor.name: str(types[tensor.name])
            for tensor in wanted
            if tensor.name in types
            and types[tensor.name] != getattr(api.DataType, _TYPES[tensor.dtype])
        }
        if odd:
            raise EngineRunError(
                f"{graph.name} has {role} that are not fp32: {odd}. Inputs and outputs stay as "
                "they are in every precision: make it with 'recallseg convert'."
            )
        if differs:
            raise EngineRunError(
                f"{graph.name} has the {role} {found}; graph '{spec.name}' needs {expected}."
            )


def _profile(builder: Any, spec: GraphSpec, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            made.set_shape(tensor.name, *profile.shapes(tensor))
    return made


def _configure(api: Any, config: Any, request: BuildRequest) -> None:
    flag = api.BuilderFlag
    # On by default, it rounds the factors of an fp32 product to 10 bits. What asks for fp32 gets
    # it; in the other precisions fp32 parts are there for their range, which TF32 has too.
    if request.precision == "fp32":
        config.clear_flag(flag.TF32)
    if request.strip_weights:
        config.set_flag(flag.STRIP_PLAN)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    names = request.target.names
    if request.flavour.is_rtx:
        config.num_compute_capabilities = len(request.target.capabilities)
        for index, capability in enumerate(request.target.capabilities):
            value = getattr(api.ComputeCapability, f"SM{capability}", None)
            if value is None or not config.set_compute_capability(value, index):
                raise EngineRunError(
                    f"TensorRT-RTX {api.__version__} knows no target sm{capability}."
                )
        return
    if "version" in names:
        config.set_flag(flag.VERSION_COMPATIBLE)
    for name, level in (
        ("ampere+", "AMPERE_PLUS"),
        ("same-capability", "SAME_COMPUTE_CAPABILITY"),
    ):
        if name in names:
            value = getattr(api.HardwareCompatibilityLevel, level, None)
            if value is None:
                raise EngineRunError(f"TensorRT {api.__version__} has no target '{name}'.")
            config.hardware_compatibility_level = value


def _no_builder(request: BuildRequest, messages: list[str], error: Exception) -> Exception:
    return EngineUnavailableError(
        f"{request.flavour.name} makes no builder here: {error}.{_lines(messages)}"
        f"\n{_driver_hint(request)}"
    )


def _hint(request: BuildRequest, messages: list[str]) -> str:
    text = " ".join(messages)
    if "sm75" in request.target.names and "not supported" in text:
        return "\nTuring (sm75) has no fp32 matrix product: build --precision fp16 for it."
    if "CUDA" in text or "Cuda" in text:
        return f"\n{_driver_hint(request)}"
    return ""


def _driver_hint(request: BuildRequest) -> str:
    if not request.flavour.is_rtx:
        return "TensorRT builds on the GPU that will run the plan: run this there, with its driver."
    if request.strip_weights:
        return "Stripping weights needs a GPU and its driver; build without it, or on the target."
    return "Is the GPU's driver installed and new enough?"


def _lines(messages: list[str]) -> str:
    return "".join(f"\n  {message}" for message in messages) or " no message was given"
