"""The graphs as data: geometry, tensor names, dtypes and shapes.

Everything that depends on an image size, a channel count or k is derived here from a bundle's
:class:`Geometry`; no other module spells such a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from recallseg.engines.errors import BundleError, EngineRunError

if TYPE_CHECKING:
    from recallseg.engines.device.memory import DeviceTensor

__all__ = [
    "GRAPHS",
    "MOST_POINTS",
    "OPTIONAL_GRAPHS",
    "Geometry",
    "GraphSpec",
    "TensorSpec",
    "graph_specs",
]

GRAPHS = ("embed", "encode", "memorize", "attend", "decode")
"""What every bundle has, in the order in which a new exemplar and a query meet them."""

OPTIONAL_GRAPHS = ("correct",)
"""What a bundle may have beside them; :attr:`.Bundle.specs` says whether it does."""

MOST_POINTS = 32
"""Points that one call of ``correct`` takes, corners of a box included."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one graph input or output.

    ``shape`` mixes fixed sizes and the symbols ``"n"`` (structures), ``"k"`` (recalled memories),
    ``"p"`` (points).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, **symbols: int) -> tuple[int, ...]:
        """Return the shape with its symbols replaced, e.g. ``spec.resolve(n=3, k=4)``."""
        return tuple(symbols[d] if isinstance(d, str) else d for d in self.shape)

    def bind(
        self, array: np.ndarray[Any, Any] | DeviceTensor, symbols: dict[str, int], graph: str
    ) -> None:
        """Check ``array`` against this spec and record what its symbols stand for.

        Parameters
        ----------
        array : the tensor that is about to be read or written.
        symbols : values seen so far for ``n``, ``k`` and ``p``; completed in place.
        graph : name of the graph, for the message.

        Raises
        ------
        EngineRunError
            On another dtype or shape, a symbol with two values, or memory that is not C-contiguous.
        """
        expected = "x".join(str(d) for d in self.shape)
        if array.dtype != np.dtype(self.dtype) or len(array.shape) != len(self.shape):
            raise EngineRunError(
                f"graph '{graph}': tensor '{self.name}' must be {self.dtype} of shape {expected}, "
                f"got {array.dtype} of shape {array.shape}. Convert it before the call."
            )
        for size, wanted in zip(array.shape, self.shape, strict=True):
            value = symbols.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            if size != value or size == 0:
                known = ", ".join(f"{name}={number}" for name, number in symbols.items())
                raise EngineRunError(
                    f"graph '{graph}': tensor '{self.name}' must have shape {expected}"
                    f"{f' with {known}' if known else ''} and no empty axis, got {array.shape}."
                )
        if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
            raise EngineRunError(
                f"graph '{graph}': tensor '{self.name}' is not C-contiguous (strides "
                f"{array.strides}). Pass numpy.ascontiguousarray(tensor)."
            )


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Geometry:
    """Every size that a bundle's graphs depend on.

    Attributes
    ----------
    image_size : S, side in pixels of the square that SAM 2 sees.
    embed_size : E, side in pixels of the square that the embedder sees.
    embedding_dim : D, length of an embedding.
    channels : C, channels of the stride-16 features and length of an object pointer.
    feature_size : h = w, side of the stride-16 feature map.
    skip0_channels, skip1_channels : channels of the stride-4 and stride-8 features.
    memory_dim : channels of one memory token (64 in SAM 2).
    tokens : T, memory tokens of one exemplar and one structure; 0 makes it one for each place of
        the feature map, as in SAM 2.
    memory_grid : rows and columns over which rotary encoding spreads the last tokens of a memory;
        those before them have no place. (0, 0) makes it the feature map's.
    max_k, max_n : most recalled memories and most structures that one call takes.
    """

    image_size: int
    embed_size: int
    embedding_dim: int
    channels: int
    feature_size: int
    skip0_channels: int
    skip1_channels: int
    memory_dim: int
    tokens: int = 0
    memory_grid: tuple[int, int] = (0, 0)
    max_k: int = 32
    max_n: int = 16

    def __post_init__(self) -> None:
        if self.memory_grid == (0, 0):
            object.__setattr__(self, "memory_grid", (self.feature_size, self.feature_size))
        if self.tokens == 0:
            object.__setattr__(self, "tokens", self.places)

    @property
    def places(self) -> int:
        """Places of the stride-16 feature map."""
        return self.feature_size * self.feature_size

    @property
    def stride(self) -> int:
        """Pixels of the image for one place of the feature map, along a side."""
        return self.image_size // self.feature_size

    @property
    def memory_is_a_map(self) -> bool:
        """Whether a memory has one token for each place of the feature map, in its order."""
        size = self.feature_size
        return self.tokens == self.places and self.memory_grid == (size, size)

    def at(self, image_size: int) -> Geometry:
        """Return the geometry of the same networks for images of another size in pixels."""
        size = image_size // self.stride
        if not self.memory_is_a_map:
            return replace(self, image_size=image_size, feature_size=size)
        return replace(self, image_size=image_size, feature_size=size, tokens=0, memory_grid=(0, 0))

    @property
    def logit_size(self) -> int:
        """Side of the square of mask logits, a quarter of the image."""
        return self.image_size // 4

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return {**asdict(self), "memory_grid": list(self.memory_grid)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Rebuild from a manifest; BundleError when a field is missing, unknown or not positive.

        A manifest of format 1 has neither ``tokens`` nor ``memory_grid``: it is of a SAM 2.
        """
        sizes = {name: value for name, value in data.items() if name != "memory_grid"}
        try:
            grid: dict[str, Any] = {n: tuple(v) for n, v in data.items() if n == "memory_grid"}
            geometry = cls(**sizes, **grid)
        except TypeError as error:
            raise BundleError(
                f"the manifest's geometry is incomplete or unknown: {error}."
            ) from error
        sides = [(name, side) for name, value in grid.items() for side in value]
        for name, value in (*sizes.items(), *sides):
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise BundleError(
                    f"the manifest's geometry has {name}={value!r}; expected a positive integer."
                )
        if len(geometry.memory_grid) != 2 or prod(geometry.memory_grid) > geometry.tokens:
            raise BundleError(
                f"the manifest's geometry has memories of {geometry.tokens} tokens on a grid of "
                f"{list(geometry.memory_grid)}; expected two sides that hold at most the tokens."
            )
        return geometry


def graph_specs(
    geometry: Geometry, *, object_pointers: bool = True, optional: Sequence[str] = ()
) -> dict[str, GraphSpec]:
    """Return the specs of all :data:`GRAPHS`, and of those ``optional`` ones, by name.

    Without object pointers, ``attend`` takes features and memories only; ``memorize`` still gives
    pointers, so that a library does not depend on the choice.
    """
    g = geometry
    s, h, c, t, m = g.image_size, g.feature_size, g.channels, g.tokens, g.memory_dim

    def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, dtype, shape)

    features = tensor("features", 1, c, h, h)
    skip0 = tensor("skip0", 1, g.skip0_channels, 4 * h, 4 * h)
    skip1 = tensor("skip1", 1, g.skip1_channels, 2 * h, 2 * h)
    conditioned = tensor("conditioned", "n", c, h, h)
    pointers = (tensor("pointers", "n", "k", c), tensor("pointer_time", "n", "k"))
    specs = (
        GraphSpec(
            "embed",
            (tensor("image", 1, 3, g.embed_size, g.embed_size),),
            (tensor("embedding", 1, g.embedding_dim),),
        ),
        GraphSpec("encode", (tensor("image", 1, 3, s, s),), (features, skip0, skip1)),
        GraphSpec(
            "memorize",
            (features, skip0, skip1, tensor("masks", "n", 1, s, s)),
            (tensor("memories", "n", t, m), tensor("pointers", "n", c)),
        ),
        GraphSpec(
            "attend",
            (features, tensor("memories", "n", "k", t, m), *(pointers if object_pointers else ())),
            (conditioned,),
        ),
        GraphSpec(
            "decode",
            (conditioned, skip0, skip1),
            (
                tensor("logits", "n", g.logit_size, g.logit_size),
                tensor("iou", "n"),
                tensor("object_score", "n"),
            ),
        ),
    )
    one = tuple(tensor(t.name, 1, *t.shape[1:]) for t in (conditioned, *specs[-1].outputs))
    correct = GraphSpec(  # one structure: points x, y in pixels of SxS, and the mask before
        "correct",
        (
            one[0],
            skip0,
            skip1,
            tensor("points", 1, "p", 2),
            tensor("point_labels", 1, "p", dtype="int32"),
            tensor("prior", 1, 1, g.logit_size, g.logit_size),
            tensor("has_prior", 1, dtype="bool"),
        ),
        one[1:],
    )
    chosen = [spec for spec in (correct,) if spec.name in optional]
    return {spec.name: spec for spec in (*specs, *chosen)}
