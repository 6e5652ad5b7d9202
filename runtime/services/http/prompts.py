"""What a person does to a slice, and what answers: the words that a draft and the desk share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.services.http.cuts import Box
from recallseg.runtime.services.http.limits import RefusedError

__all__ = ["CANNOT", "CancelledError", "Change", "Correcting", "Place", "Prompt", "Proposer"]

CANNOT = (
    "the bundle of this server's library has no graph that corrects: draw with the brush, or "
    "export a bundle with 'correct'."
)
Kind = Literal["click", "box", "scribble", "lasso"]
Point = tuple[float, float]


class CancelledError(RefusedError):
    """What was being done was ended by whoever asked for it."""

    def __init__(self) -> None:
        super().__init__(409, "this was cancelled; what was done until then stays.")


class Correcting(Protocol):
    """One image that is corrected, as ``segmenter.correct(image)`` gives it."""

    @property
    def result(self) -> Result: ...
    def click(self, structure: str, x: float, y: float, inside: bool = True) -> Result: ...
    def box(self, structure: str, x0: float, y0: float, x1: float, y1: float) -> Result: ...
    def scribble(
        self, structure: str, places: Iterable[Sequence[float]], inside: bool = True
    ) -> Result: ...
    def lasso(
        self, structure: str, places: Iterable[Sequence[float]], inside: bool = True
    ) -> Result: ...
    def draw(self, structure: str, mask: Any) -> Result: ...
    def undo(self) -> Result: ...
    def close(self) -> None: ...


class Proposer(Protocol):
    """What proposes and corrects masks of a slice; see :class:`Desk`."""

    @property
    def structures(self) -> tuple[str, ...]: ...
    @property
    def corrects(self) -> bool: ...
    def propose(self, image: NDArray[Any], acquisition: Acquisition) -> Result | None: ...
    def correct(self, image: NDArray[Any], acquisition: Acquisition) -> Correcting: ...
    def spread(
        self,
        structure: str,
        picture: Callable[[int], NDArray[Any]],
        count: int,
        right: Mapping[int, NDArray[np.bool_]],
    ) -> Iterator[tuple[int, NDArray[np.bool_]]]: ...


@dataclass(frozen=True)
class Place:
    """One slice: its axis, and its index along it."""

    axis: int
    index: int


@dataclass(frozen=True)
class Prompt:
    """What a person did to a slice.

    Attributes
    ----------
    points : (x, y) of pixels of the upright slice: one of a click, two corners of a box, those
        along a scribble, or around a lasso.
    inside : whether it marks the structure or what is not of it.
    """

    kind: Kind
    structure: str
    place: Place
    points: tuple[Point, ...]
    inside: bool = True


@dataclass(frozen=True)
class Change:
    """What a step changed of a structure's mask: where, or None where not a voxel did."""

    structure: str
    box: Box | None
