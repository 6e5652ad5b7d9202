"""The engines in the order of the method, as functions of tensors and nothing else.

The export's end-to-end gate, the verification of built engines and the runtime's segmenter all call
this one piece, so what was proven at export is what runs at the scanner. Every tensor belongs to
the caller; nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import MemorySemantics
from recallseg.engines.engine import AnyTensor, Engine, Tensor
from recallseg.engines.specs import Geometry, GraphSpec, graph_specs

__all__ = ["Composition", "Features", "Prediction", "Prompts", "Recall"]


@dataclass(frozen=True)
class Features:
    """What ``encode`` makes of one image: ``features`` 1xCxhxw, ``skip0`` and ``skip1``."""

    features: Tensor
    skip0: Tensor
    skip1: Tensor

    @classmethod
    def allocate(cls, geometry: Geometry) -> Features:
        """Return new buffers for one image."""
        encode = graph_specs(geometry)["encode"]
        return cls(**{spec.name: np.zeros(spec.resolve(), np.float32) for spec in encode.outputs})


@dataclass(frozen=True)
class Recall:
    """What was recalled for n structures with k memories each.

    ``memories`` nxkxTx64, ``pointers`` nxkxC, ``pointer_time`` nxk.
    """

    memories: Tensor
    pointers: Tensor
    pointer_time: Tensor

    @classmethod
    def allocate(cls, geometry: Geometry, n: int, k: int, semantics: MemorySemantics) -> Recall:
        """Return new buffers whose time codes already hold the bundle's constant."""
        g = geometry
        return cls(
            np.zeros((n, k, g.tokens, g.memory_dim), np.float32),
            np.zeros((n, k, g.channels), np.float32),
            np.full((n, k), semantics.pointer_time, np.float32),
        )


@dataclass(frozen=True)
class Prediction:
    """What comes out for n structures.

    ``conditioned`` nxCxhxw, ``logits`` nx(S/4)x(S/4), ``iou`` n, ``object_score`` n.
    """

    conditioned: Tensor
    logits: Tensor
    iou: Tensor
    object_score: Tensor

    @classmethod
    def allocate(cls, geometry: Geometry, n: int) -> Prediction:
        """Return new buffers for n structures."""
        specs = graph_specs(geometry)
        outputs = specs["attend"].outputs + specs["decode"].outputs
        return cls(**{spec.name: np.zeros(spec.resolve(n=n), np.float32) for spec in outputs})


@dataclass(frozen=True)
class Prompts:
    """What a person said of one structure; at least one point, which may be none (label -1).

    ``points`` 1xpx2 (x and y in pixels of SxS, whose centres are at whole numbers),
    ``point_labels`` 1xp int32 (1 inside, 0 outside, 2 and 3 corners of a box, -1 none), ``prior``
    1x1x(S/4)x(S/4) logits of the mask before, ``has_prior`` 1 bool.
    """

    points: Tensor
    point_labels: NDArray[np.int32]
    prior: Tensor
    has_prior: NDArray[np.bool_]


class Composition:
    """Engines as one model.

    Parameters
    ----------
    engines : by graph name; a missing one fails with KeyError when it is first needed, so that an
        annotation station may load ``embed``, ``encode`` and ``memorize`` only.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines

    def embed(self, image: Tensor, embedding: Tensor) -> None:
        """``image`` 1x3xExE, normalised -> ``embedding`` 1xD of unit length."""
        self.run("embed", {"image": image, "embedding": embedding})

    def encode(self, image: Tensor, out: Features) -> None:
        """``image`` 1x3xSxS, normalised -> features."""
        self.run("encode", {"image": image, **vars(out)})

    def memorize(self, image: Features, masks: Tensor, memories: Tensor, pointers: Tensor) -> None:
        """Features and ``masks`` nx1xSxS (0 or 1) -> ``memories`` nxTx64, ``pointers`` nxC."""
        tensors = {"masks": masks, "memories": memories, "pointers": pointers}
        self.run("memorize", {**vars(image), **tensors})

    def attend(self, image: Features, recall: Recall, out: Prediction) -> None:
        """Condition the query's features on what was recalled: fills ``out.conditioned``."""
        tensors = {**vars(recall), "features": image.features, "conditioned": out.conditioned}
        self.run("attend", tensors)

    def decode(self, image: Features, out: Prediction) -> None:
        """Conditioned features -> logits, IoU estimate and object score, all in ``out``."""
        self.run("decode", {**vars(image), **vars(out)})

    def correct(self, image: Features, prompts: Prompts, out: Prediction) -> None:
        """As :meth:`decode`, of one structure, with what a person said of it."""
        self.run("correct", {**vars(image), **vars(prompts), **vars(out)})

    def run(self, graph: str, tensors: Mapping[str, AnyTensor]) -> None:
        """Run a graph on its inputs and outputs, which may lie on a device; others are ignored."""
        engine = self.engines[graph]
        spec: GraphSpec = engine.spec
        engine.run(
            {tensor.name: tensors[tensor.name] for tensor in spec.inputs},
            {tensor.name: tensors[tensor.name] for tensor in spec.outputs},
        )
