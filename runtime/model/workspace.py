"""Every large buffer that a query touches, allocated once, its size known in advance."""

from __future__ import annotations

from math import prod

import numpy as np

from recallseg.engines.bundle import MemorySemantics
from recallseg.engines.composition import Features, Prediction, Recall
from recallseg.engines.pixels import open_pixels
from recallseg.engines.specs import Geometry

__all__ = ["Workspace"]


class Workspace:
    """Buffers for one query at a time with up to n structures and k memories each.

    Parameters
    ----------
    geometry, memory : of the bundle.
    n, k : structures and most recalled memories of each.

    Attributes
    ----------
    group : most structures that one call of ``attend`` and ``decode`` takes.
    """

    def __init__(self, geometry: Geometry, memory: MemorySemantics, *, n: int, k: int) -> None:
        g = geometry
        self.geometry = g
        self.n, self.k = n, k
        self.embed_image = np.zeros((1, 3, g.embed_size, g.embed_size), np.float32)  # normalised
        self.encode_image = np.zeros((1, 3, g.image_size, g.image_size), np.float32)  # normalised
        self.embedding = np.zeros((1, g.embedding_dim), np.float32)
        self.features = Features.allocate(g)  # 1xCxhxw and the two skips
        self.group = min(n, g.max_n)
        self.recall = Recall.allocate(g, self.group, k, memory)  # nxkxTx64, nxkxC, nxk
        self.prediction = Prediction.allocate(g, self.group)  # nxCxhxw, nx(S/4)x(S/4), n, n
        self.logits = np.zeros((n, g.logit_size, g.logit_size), np.float32)  # of all structures
        self.pixels = open_pixels()  # may hold buffers on the query's grid

    @staticmethod
    def required_bytes(geometry: Geometry, *, n: int, k: int) -> int:
        """Return the bytes that a workspace will take, before any is taken.

        Without native kernels two buffers on the query's own grid (8 bytes a pixel) come with the
        first query.
        """
        g = geometry
        group = min(n, g.max_n)
        s, h, c = g.image_size, g.feature_size, g.channels
        elements = (
            3 * g.embed_size**2
            + 3 * s**2
            + g.embedding_dim
            + h**2 * (c + 16 * g.skip0_channels + 4 * g.skip1_channels)
            + group * k * (g.tokens * g.memory_dim + c + 1)
            + group * (h**2 * c + g.logit_size**2 + 2)
            + n * g.logit_size**2
        )
        return 4 * elements

    @property
    def nbytes(self) -> int:
        """Bytes in use now."""
        arrays = (
            self.embed_image,
            self.encode_image,
            self.embedding,
            *vars(self.features).values(),
            *vars(self.recall).values(),
            *vars(self.prediction).values(),
            self.logits,
        )
        held: int = sum(array.nbytes for array in arrays)
        return held + self.pixels.nbytes

    def recall_for(self, n: int, k: int) -> Recall:
        """Return contiguous views of the recall buffers for a call with n structures, k memories.

        The views share memory with those of any other (n, k): fill, attend, then ask again.
        """
        full = self.recall
        return Recall(
            *(
                array.reshape(-1)[: n * k * prod(array.shape[2:])].reshape(n, k, *array.shape[2:])
                for array in (full.memories, full.pointers, full.pointer_time)
            )
        )

    def prediction_for(self, n: int) -> Prediction:
        """Return views of the first n rows of the prediction buffers."""
        return Prediction(**{name: array[:n] for name, array in vars(self.prediction).items()})
