"""Turns an annotated image into what a library stores: embedding, memories, object pointers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg import __version__
from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition, Features
from recallseg.engines.engine import EngineOptions
from recallseg.engines.pixels import open_pixels
from recallseg.engines.registry import load_engines
from recallseg.runtime.library.encoding import Encoded, Origin
from recallseg.runtime.model.preprocess import Intensity, prepare_image, prepare_mask

__all__ = ["BundleEncoder"]


class BundleEncoder:
    """Runs ``embed``, ``encode`` and ``memorize`` of one bundle, for one thread at a time.

    Parameters
    ----------
    bundle : whose graphs to run.
    intensity : the library's rule from pixel values to 0..1.
    engine, precision, threads : see :func:`recallseg.engines.registry.load_engines`, which also
        states what is raised.
    """

    def __init__(
        self,
        bundle: Bundle,
        intensity: Intensity,
        *,
        engine: str = "onnxruntime-cpu",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        self._bundle = bundle
        self._intensity = intensity
        self._pixels = open_pixels()
        self._composition = Composition(
            load_engines(
                bundle,
                engine,
                precision,
                options=EngineOptions(threads),
                graphs=("embed", "encode", "memorize"),
            )
        )
        digests = self._composition.graph_digests
        self._origin = Origin(engine, precision, digests, __version__)
        g = bundle.geometry
        self._embed_image = np.zeros((1, 3, g.embed_size, g.embed_size), np.float32)
        self._encode_image = np.zeros((1, 3, g.image_size, g.image_size), np.float32)
        self._embedding = np.zeros((1, g.embedding_dim), np.float32)
        self._features = Features.allocate(g)

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        """Encode an image HxW or HxWx3 (RGB) and a boolean HxW mask for each structure.

        Returns
        -------
        Encoded
            Arrays of its own, none a view of this encoder's buffers.
        """
        self._prepare(image, "embed", "encode")
        embedding = self._embed()
        self._composition.encode(self._encode_image, self._features)
        memories: dict[str, NDArray[np.float32]] = {}
        pointers: dict[str, NDArray[np.float32]] = {}
        names = list(masks)
        most = self._bundle.geometry.max_n
        for start in range(0, len(names), most):
            group = names[start : start + most]
            tokens, vectors = self._memorize([masks[name] for name in group])
            memories.update(zip(group, tokens, strict=True))
            pointers.update(zip(group, vectors, strict=True))
        return Encoded(embedding, memories, pointers, self._origin)

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return the embedding, D of unit length, of an image HxW or HxWx3."""
        self._prepare(image, "embed")
        return self._embed()

    def _prepare(self, image: NDArray[Any], *graphs: str) -> None:
        inputs = {"embed": self._embed_image, "encode": self._encode_image}
        targets = [(inputs[name], self._bundle.normalisation[name]) for name in graphs]
        prepare_image(image, self._intensity, self._pixels, *targets)

    def _embed(self) -> NDArray[np.float32]:
        self._composition.embed(self._embed_image, self._embedding)
        embedding: NDArray[np.float32] = self._embedding[0].copy()
        return embedding

    def _memorize(
        self, masks: list[NDArray[np.bool_]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        g = self._bundle.geometry
        n = len(masks)
        inputs = np.zeros((n, 1, g.image_size, g.image_size), np.float32)
        for plane, mask in zip(inputs[:, 0], masks, strict=True):
            prepare_mask(mask, plane)
        tokens = np.zeros((n, g.tokens, g.memory_dim), np.float32)
        pointers = np.zeros((n, g.channels), np.float32)
        self._composition.memorize(self._features, inputs, tokens, pointers)
        return tokens, pointers
