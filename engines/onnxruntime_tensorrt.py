"""ONNX Runtime with its TensorRT execution provider: explicit caches, no silent fall-back.

Differences to the engine ``tensorrt``: ONNX Runtime cuts the graph and calls TensorRT on the parts,
and its networks are weakly typed, so that ``mixed``, which lives from what stays in fp32, is not
offered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from recallseg.engines.engine import EngineOptions
from recallseg.engines.onnxruntime_gpu import OnnxRuntimeGpu
from recallseg.engines.specs import GraphSpec
from recallseg.engines.tensorrt.profile import Profile

__all__ = ["OnnxRuntimeTensorRt", "provider_options"]


def provider_options(
    spec: GraphSpec, precision: str, profile: Profile, folder: Path, prefix: str
) -> dict[str, str]:
    """Return the provider's options for one graph.

    Parameters
    ----------
    spec, precision, profile : what to build.
    folder : of the engine cache. Graphs of equal names collide in a shared one, and nothing in it
        is renewed by an upgrade (pitfall 11): it has to be this graph's and version's alone.
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


class OnnxRuntimeTensorRt(OnnxRuntimeGpu):
    """A graph as a session on TensorRT's provider; see :class:`OnnxRuntimeGpu`."""

    name: ClassVar[str] = "onnxruntime-tensorrt"
    variants: ClassVar[tuple[str, ...]] = ("tensorrt", "portable")
    provider: ClassVar[str] = "TensorrtExecutionProvider"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    most: ClassVar[int] = Profile().k.most

    def _provider_options(self, precision: str) -> dict[str, str]:
        options = provider_options(self.spec, precision, Profile(), self.folder, self.spec.name)
        options["device_id"] = str(self.device.ordinal)
        options["user_compute_stream"] = str(self.stream.handle)
        return options

    def _configure(self, settings: Any, *, proving: bool) -> None:
        # A part of the graph on the CPU would be a silent fall-back (pitfall 10).
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")

    @classmethod
    def _settings(cls, options: EngineOptions) -> list[Any]:
        return [*super()._settings(options), Profile().to_json()]
