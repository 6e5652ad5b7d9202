"""What ONNX Runtime's two providers for NVIDIA GPUs have in common.

A session's tensors are bound to addresses on the device and its work goes to our stream; nothing is
copied and nobody waits. A provider is used only after it has reproduced the bundle's golden tensors
on this very GPU. What ran where: docs/device/status.md; everything short of a GPU is tested with a
stand-in.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recallseg.engines import defaults
from recallseg.engines.device import DeviceTensor, open_device
from recallseg.engines.device.recording import beside
from recallseg.engines.device_engine import MOST_BINDINGS, Binding, DeviceEngine, binding_key
from recallseg.engines.digest import digest_json
from recallseg.engines.engine import Engine, EngineOptions
from recallseg.engines.errors import (
    DeviceMemoryError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
)
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.operators import require_operators
from recallseg.engines.paths import cache_folder
from recallseg.engines.proof import Candidate
from recallseg.engines.session_log import configure_session_log
from recallseg.engines.specs import GraphSpec
from recallseg.engines.verdicts import Verdicts, refuse_foreign, writing

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["OnnxRuntimeGpu", "Sessions", "load_provider"]

_NO_MEMORY = re.compile(r"out of memory|failed to allocate memory|ALLOC_FAILED", re.IGNORECASE)


class Sessions(Candidate):
    """A bundle's graphs as sessions, and one record of all five beside what was compiled.

    Those of a proof are not used: they hold memory for the largest k.

    Parameters
    ----------
    kind, variants : what makes them, of which graph variants.
    bundle, precision, options : see :class:`Candidate`; the first GPU if there is no device.
    """

    def __init__(
        self,
        kind: type[OnnxRuntimeGpu],
        bundle: Bundle,
        precision: str,
        options: EngineOptions,
        variants: tuple[str, ...],
    ) -> None:
        version = load_provider(kind.provider, kind.name).__version__
        options = replace(options, device=options.device or open_device())
        super().__init__(kind.name, bundle, precision, options)
        self._kind, self._variants = kind, variants
        self.graphs = bundle.graphs_for(variants, precision)
        self._files = {
            graph: bundle.graph_file(graph, variants, precision) for graph in self.graphs
        }
        self._digests = {
            graph: bundle.graph_digest(graph, variant, precision)
            for graph, (_, variant) in self._files.items()
        }
        subject = digest_json(
            [self._digests, version, precision, kind._settings(options), self.device]
        )
        root = cache_folder() / kind.name
        with writing(root):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_foreign(root, subject[:32])
        self._folder = root / subject[:32]
        # Whoever removes what was compiled removes what was said of it.
        self.records = {self.graphs: Verdicts(self._folder / "state.json", subject)}
        self.most = kind.most
        self.again = f"remove {self._folder} and try again"

    def make(
        self, graphs: tuple[str, ...], *, proving: bool = False
    ) -> Mapping[str, OnnxRuntimeGpu]:
        made = {}
        for graph in graphs:
            if graph not in self._files:  # says which there are
                self.bundle.graph_file(graph, self._variants, self.precision)
            made[graph] = self._kind(
                self.bundle.specs[graph],
                self._files[graph][0],
                self.options,
                precision=self.precision,
                folder=self._folder / graph,
                proving=proving,
            )
            made[graph].graph_digest = self._digests[graph]
        return made


class OnnxRuntimeGpu(DeviceEngine):
    """A graph as an ONNX Runtime session on a GPU.

    Parameters
    ----------
    spec, path, options : as for every engine.
    precision : of the graph.
    folder : where the provider may keep what it compiled; made if it is not there.
    proving : made for the proof only.

    Raises
    ------
    EngineUnavailableError
        If this ONNX Runtime has no such provider, or it cannot be loaded.
    EngineRunError
        If the graph is refused.
    """

    provider: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    most: ClassVar[int]
    """The largest k that the proof asks for."""
    sessions: ClassVar[type[Sessions]] = Sessions
    """How they are proven."""

    def __init__(
        self,
        spec: GraphSpec,
        path: Path,
        options: EngineOptions | None = None,
        *,
        precision: str = defaults.PRECISION,
        folder: Path | None = None,
        proving: bool = False,
    ) -> None:
        super().__init__(spec, path, options)
        self.folder = folder or cache_folder() / self.name / "unnamed"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._runtime = load_provider(self.provider, self.name)
        settings = self._runtime.SessionOptions()
        configure_session_log(settings)
        # The default logger writes to standard error at every load and first run: "No registered
        # plugin EP device found" (a way of loading providers that is not used here) and
        # "[cudnn_frontend] Error: No execution plans support the graph" (of one way of several that
        # it tries). What fails in earnest is raised as well.
        self._runtime.set_default_logger_severity(4)
        if precision.endswith("native"):
            library = require_operators(f"graph '{spec.name}' in {precision}")
            settings.register_custom_ops_library(str(library))
        self._configure(settings, proving=proving)
        self.device.enter()
        if not self.device.primary:
            raise EngineUnavailableError(
                "ONNX Runtime works in the GPU's primary context, and this device is in another. "
                "Make the primary one current before open_device (with PyCUDA: "
                "pycuda.autoprimaryctx in the place of pycuda.autoinit)."
            )
        try:
            with beside():
                self._session = self._runtime.InferenceSession(
                    str(path),
                    sess_options=settings,
                    providers=[(self.provider, self._provider_options(precision))],
                    # It would try again on the CPU, and say so on the standard output only.
                    enable_fallback=False,
                )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise self._explained(error, f"with {self.provider} cannot take {path}") from error
        self.providers = list(self._session.get_providers())
        if self.providers[:1] != [self.provider]:
            raise EngineUnavailableError(
                f"ONNX Runtime placed {path.name} on {self.providers}, not on {self.provider}: "
                "libraries of CUDA, cuDNN or TensorRT are missing or of another version. Install "
                "those that this onnxruntime-gpu was built with (docs/device/gpu.md)."
            )
        self._bindings: OrderedDict[Binding, tuple[Any, Any]] = OrderedDict()

    @classmethod
    def require_library(cls) -> None:
        load_provider(cls.provider, cls.name)

    @abstractmethod
    def _provider_options(self, precision: str) -> dict[str, str]:
        """Return what the provider is told."""

    def _configure(self, settings: Any, *, proving: bool) -> None:
        """Set what the session is told."""

    @classmethod
    def _settings(cls, options: EngineOptions) -> list[Any]:
        """Whatever beside graphs, versions and the device decides about the numbers."""
        return [options.cuda_graphs]

    @classmethod
    def load_all(
        cls,
        bundle: Bundle,
        precision: str,
        options: EngineOptions,
        graphs: tuple[str, ...],
        variants: tuple[str, ...] | None = None,
    ) -> dict[str, Engine]:
        """Make sessions, and use them only if all five graphs prove right on this GPU.

        Raises
        ------
        InputError
            For a precision that this provider does not offer.
        VerificationError
            If they are wrong; with the tensor and its error.
        """
        if precision not in cls.precisions:
            raise InputError(
                f"engine '{cls.name}' offers {', '.join(cls.precisions)}, not '{precision}'."
            )
        return cls.sessions(cls, bundle, precision, options, variants or cls.variants).load(graphs)

    def _enqueue(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        key = binding_key(inputs, outputs)
        bound = self._bindings.get(key)
        if bound is None:
            bound = self._bindings[key] = self._bind_all(inputs, outputs)
            if len(self._bindings) > MOST_BINDINGS:
                self._bindings.popitem(last=False)
        self.device.enter()
        try:
            self._session.run_with_iobinding(*bound)
        except Exception as error:
            raise self._explained(error, f"failed in graph '{self.spec.name}'") from error

    def _explained(self, error: Exception, what: str) -> EngineRunError:
        """Return what to raise for an exception of ONNX Runtime; DeviceLostError if that is why."""
        self.device.probe()
        if _NO_MEMORY.search(str(error)):
            free = self.device.free_memory()
            return DeviceMemoryError(
                f"ONNX Runtime {what}: {error}. {free / 2**20:.0f} MiB of "
                f"{self.device.facts.memory / 2**20:.0f} MiB are free. Close other programs that "
                "use the GPU, or ask for a smaller k, fewer structures or a lower precision; "
                "'recallseg doctor --budget' says what is needed."
            )
        return EngineRunError(f"ONNX Runtime {what}: {error}")

    def _bind_all(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> tuple[Any, Any]:
        """Return ONNX Runtime's binding and the options of its runs."""
        binding = self._session.io_binding()
        ordinal = self.device.ordinal
        for name, t in inputs.items():
            binding.bind_input(name, "cuda", ordinal, t.dtype, t.shape, t.address)
        for name, t in outputs.items():
            binding.bind_output(name, "cuda", ordinal, t.dtype, t.shape, t.address)
        run = self._runtime.RunOptions()
        # The order on the stream is all that is needed: whoever reads the results waits.
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return binding, run

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "providers": self.providers,
            "device": str(self.device.facts),
            "cuda_graph": self.options.cuda_graphs,
            "cache": str(self.folder),
        }


def load_provider(provider: str, engine: str) -> Any:
    """Return the module onnxruntime; EngineUnavailableError if it lacks this provider."""
    onnxruntime = import_onnxruntime(wanted_by=f"engine '{engine}'", extra="gpu")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineUnavailableError(
            f"this onnxruntime {onnxruntime.__version__} has no {provider}; it has "
            f"{', '.join(available)}. Install onnxruntime-gpu instead of onnxruntime (not beside "
            "it): pip install 'recallseg[gpu]'; on a Jetson, NVIDIA's wheel for its JetPack."
        )
    return onnxruntime
