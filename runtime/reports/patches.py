"""DINOv2's patch features: an inner tensor of the graph ``embed``, which gives one for an image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.graph_check import find_outputs, with_output
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu, usable_cores
from recallseg.engines.pixels import open_pixels
from recallseg.engines.reading import read_file
from recallseg.runtime.model.preprocess import prepare_image

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.runtime.model.preprocess import Intensity

__all__ = ["PatchFeatures"]

_NORMALISATIONS = ("LayerNormalization", "SkipLayerNormalization")
_BEFORE = (1, 5, 0)
"""Tokens before the patches': the class token, four registers, or none."""


class PatchFeatures:
    """Makes patch features: those of the last normalisation, as DINOv2's own code gives them.

    Parameters
    ----------
    bundle : whose ``embed`` in fp32 is run, by ONNX Runtime on the CPU whatever engine segments.
    intensity : the rule from pixel values to 0..1.
    threads : of the CPU; None for all.

    Raises
    ------
    InputError
        If the graph has no such tensor.
    BundleError, EngineUnavailableError
    """

    def __init__(self, bundle: Bundle, intensity: Intensity, threads: int | None = None) -> None:
        path, _ = bundle.graph_file("embed", OnnxRuntimeCpu.variants, "fp32")
        self._intensity, self._pixels = intensity, open_pixels()
        self._normalisation = bundle.normalisation["embed"]
        size = bundle.geometry.embed_size
        self._image = np.zeros((1, 3, size, size), np.float32)
        found = find_outputs(path, _NORMALISATIONS)
        if not found:
            raise InputError(
                f"the graph {path.name} of bundle {bundle.name} does not show its patches, so the "
                "baseline 'match' cannot be made of it. Leave it out."
            )
        self._name = found[-1]
        onnxruntime = import_onnxruntime(wanted_by="baseline 'match'")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads or usable_cores()
        settings.log_severity_level = 3
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        self._session = onnxruntime.InferenceSession(
            with_output(read_file(path), self._name), settings, providers=["CPUExecutionProvider"]
        )

    def __call__(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return features of an image HxW or HxWx3: rows x columns x D, each of unit length."""
        prepare_image(image, self._intensity, self._pixels, (self._image, self._normalisation))
        (tokens,) = self._session.run([self._name], {"image": self._image})
        tokens = np.asarray(tokens, np.float32).reshape(-1, tokens.shape[-1])
        for before in _BEFORE:
            side = math.isqrt(max(0, len(tokens) - before))
            if side and side * side == len(tokens) - before:
                patches = tokens[before:].reshape(side, side, -1)
                length = np.linalg.norm(patches, axis=2, keepdims=True)
                features: NDArray[np.float32] = patches / np.maximum(length, 1e-12)
                return features
        raise InputError(f"{len(tokens)} tokens of 'embed' are no square of patches.")
