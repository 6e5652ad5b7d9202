"""Optimization profiles: for how many structures and memories a plan is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.engines.specs import MOST_POINTS, Geometry, TensorSpec

__all__ = ["Profile", "Range"]


@dataclass(frozen=True)
class Range:
    """Least, usual and most; kernels are chosen for the usual one."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise InputError(
                f"a range must rise from 1: got {self.least}, {self.usual}, {self.most}."
            )

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"{self.least}..{self.usual}..{self.most}"


@dataclass(frozen=True)
class Profile:
    """Ranges of ``n`` (structures) and ``k`` (recalled memories).

    A dynamic k, and not a bank padded to the largest one: padding without a mask is wrong
    (pitfall 3), a mask ends the fusion of attention.
    """

    n: Range = Range(1, 1, 4)
    k: Range = Range(1, 4, 16)

    @property
    def p(self) -> Range:
        """Points of a correction: alike in every plan, since the graph takes no more."""
        return Range(1, 2, MOST_POINTS)

    def check(self, geometry: Geometry) -> None:
        """Raise InputError when the graphs were not exported for that many."""
        for symbol, most in (("n", geometry.max_n), ("k", geometry.max_k)):
            asked: Range = getattr(self, symbol)
            if asked.most > most:
                raise InputError(
                    f"the profile asks for {symbol} up to {asked.most}; the bundle's graphs take "
                    f"{symbol} up to {most}. Ask for less, or export with larger limits."
                )

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Return a tensor's least, usual and most shape."""
        return tuple(
            tensor.resolve(
                **{symbol: getattr(getattr(self, symbol), which) for symbol in ("n", "k", "p")}
            )
            for which in ("least", "usual", "most")
        )

    def to_json(self) -> dict[str, list[int]]:
        """Return the ranges for a plan's record."""
        return {
            "n": [self.n.least, self.n.usual, self.n.most],
            "k": [self.k.least, self.k.usual, self.k.most],
        }

    @classmethod
    def from_json(cls, data: Any) -> Profile:
        """Rebuild from a plan's record; KeyError, TypeError or InputError when it is not one."""
        return cls(Range(*data["n"]), Range(*data["k"]))

    def __str__(self) -> str:
        return f"n {self.n}, k {self.k}"
