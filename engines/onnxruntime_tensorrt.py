"""ONNX Runtime with its TensorRT execution provider: explicit caches, no silent fall-back.

Not executed on a GPU yet. Differences to the engine ``tensorrt``: ONNX Runtime cuts the graph and
calls TensorRT on the parts, and its networks are weakly typed, so that ``mixed``, which lives from
what stays in fp32, is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from recallseg.engines.device import open_device
from recallseg.engines.digest import digest_json
from recallseg.engines.engine import Engine, EngineOptions, Tensor
from recallseg.engines.errors import (
    EngineRunError,
    EngineUnavailableError,
    InputError,
    VerificationError,
)
from recallseg.engines.paths import cache_folder
from recallseg.engines.proof import prove
from recallseg.engines.specs import GRAPHS, GraphSpec
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.verdicts import Verdicts, writing

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle

__all__ = ["OnnxRuntimeTensorRt", "provider_options", "tensorrt_provider"]

_PROVIDER = "TensorrtExecutionProvider"
PRECISIONS = ("fp32", "fp16", "bf16")


def provider_options(
    spec: GraphSpec, precision: str, profile: Profile, folder: Path, prefix: str
) -> dict[str, str]:
    """Return the provider's options for one graph.

    Parameters
    ----------
    spec, precision, profile : what to build.
    folder : of the engine cache. Graphs of equal names collide in a shared one, and nothing in it
        is renewed by an upgrade (PITFALLS 11): it has to be this graph's and version's alone.
    prefix : of the cached files' names.
    """
    shapes = {
        which: ",".join(
            f"{tensor.name}:{'x'.join(map(str, profile.shapes(tensor)[index]))}"
            for tensor in spec.inputs
            if any(isinstance(size, str) for size in tensor.shape)
        )
        for index, which in enumerate(("min", "opt", "max"))
    }
    options = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": prefix,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
    if precision != "fp32":
        options[f"trt_{precision}_enable"] = "True"
    if shapes["min"]:
        options.update({f"trt_profile_{which}_shapes": text for which, text in shapes.items()})
    return options


class OnnxRuntimeTensorRt(Engine):
    """A graph as an ONNX Runtime session on TensorRT's execution provider.

    Parameters
    ----------
    spec, path, options : as for every engine.
    precision, profile : what TensorRT builds.
    folder : of the engine cache; made if it is not there.

    Raises
    ------
    EngineUnavailableError
        If this ONNX Runtime has no such provider, or it cannot be loaded.
    EngineRunError
        If the graph is refused or any part of it would run elsewhere.
    """

    name: ClassVar[str] = "onnxruntime-tensorrt"
    variants: ClassVar[tuple[str, ...]] = ("tensorrt", "portable")

    def __init__(
        self,
        spec: GraphSpec,
        path: Path,
        options: EngineOptions | None = None,
        *,
        precision: str = "fp32",
        profile: Profile | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(spec, path, options)
        runtime = tensorrt_provider()
        folder = folder or cache_folder() / "onnxruntime-tensorrt" / "unnamed"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
        # A part of the graph on the CPU would be a silent fall-back (PITFALLS 10).
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = provider_options(spec, precision, profile or Profile(), folder, spec.name)
        try:
            self._session = runtime.InferenceSession(
                str(path), sess_options=settings, providers=[(_PROVIDER, chosen)]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineRunError(
                f"ONNX Runtime's TensorRT provider cannot take {path}: {error}"
            ) from error
        self.providers = list(self._session.get_providers())
        if self.providers[:1] != [_PROVIDER]:
            raise EngineUnavailableError(
                f"ONNX Runtime placed {path.name} on {self.providers}, not on {_PROVIDER}: "
                "TensorRT's or CUDA's libraries are missing or of another version. Install those "
                "that this onnxruntime-gpu was built with."
            )
        self.folder = folder

    @classmethod
    def load_all(
        cls,
        bundle: Bundle,
        precision: str,
        options: EngineOptions,
        graphs: tuple[str, ...],
        variants: tuple[str, ...] | None = None,
    ) -> dict[str, Engine]:
        """Make sessions of all five graphs, and use them only if they prove right on this GPU.

        Raises
        ------
        InputError
            For a precision that weakly typed networks cannot promise.
        VerificationError
            If they are wrong; with the tensor and its error.
        """
        if precision not in PRECISIONS:
            raise InputError(
                f"engine '{cls.name}' offers {', '.join(PRECISIONS)}, not '{precision}': ONNX "
                "Runtime leaves the types of single layers to TensorRT. Use engine tensorrt."
            )
        runtime, profile = tensorrt_provider(), Profile()
        device = str(open_device().facts)
        accepted = variants or cls.variants
        digests = {}
        for graph in GRAPHS:
            _, variant = bundle.graph_file(graph, accepted, precision)
            digests[graph] = bundle.graph_digest(graph, variant, precision)
        subject = digest_json([digests, runtime.__version__, precision, profile.to_json(), device])
        folder = cache_folder() / cls.name / subject[:32]
        # Beside the engines, so that whoever removes them removes what was said of them.
        record = Verdicts(folder / "state.json", subject)
        known = record.find(device, bundle.golden_digest)
        if known is not None and not known.passed:
            raise VerificationError(
                f"engine '{cls.name}' in {precision} was refused on {device}: {known.reason}. "
                f"Choose another precision, or remove {folder} and try again."
            )
        wanted = graphs if known is not None else GRAPHS
        engines: dict[str, Engine] = {
            graph: cls(
                bundle.specs[graph],
                bundle.graph_file(graph, accepted, precision)[0],
                options,
                precision=precision,
                profile=profile,
                folder=folder / graph,
            )
            for graph in wanted
        }
        if known is None:
            verdicts = prove(bundle, engines, precision, device, most=profile.k.most)
            wrong = next((verdict for verdict in verdicts.values() if not verdict.passed), None)
            record.record(wrong or verdicts["decode"])
            if wrong is not None:
                raise VerificationError(
                    f"engine '{cls.name}' in {precision} is not used on {device}: {wrong.reason}. "
                    "Choose another precision or engine."
                )
        return {graph: engines[graph] for graph in graphs}

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineRunError(
                f"ONNX Runtime failed in graph '{self.spec.name}': {error}"
            ) from error

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "providers": self.providers, "cache": str(self.folder)}


def tensorrt_provider() -> Any:
    """Return the module onnxruntime; EngineUnavailableError if it has no TensorRT provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailableError(
            "engine 'onnxruntime-tensorrt' needs the package onnxruntime-gpu, which is not "
            "installed: pip install 'recallseg[gpu]'."
        ) from error
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise EngineUnavailableError(
            f"this onnxruntime {onnxruntime.__version__} has no {_PROVIDER}; it has "
            f"{', '.join(onnxruntime.get_available_providers())}. Install onnxruntime-gpu instead "
            "of onnxruntime (not beside it): pip install 'recallseg[gpu]'."
        )
    return onnxruntime
