"""In which order the tokens of a square map lie in memory, and tables from one order to another.

A map is cut into squares whose side is 2 to the number of poolings to come; squares lie row by row,
and inside of one the tokens follow the Z-curve. So the four tokens that a pooling takes together
are neighbours at every stage, a pooled map is in the order of the next stage by itself, and windows
as large as the square need no partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import ExportError

__all__ = ["Order", "Windows"]

Integers = NDArray[np.int64]


def _along(y: Integers, x: Integers, square: int, across: int) -> Integers:
    """Place of (y, x) on a map of ``across`` squares a row."""
    inside = np.zeros_like(y)
    for bit in range(square.bit_length() - 1):
        inside |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return ((y // square) * across + x // square) * square**2 + inside


def _grid(side: int) -> tuple[Integers, Integers]:
    """Coordinates y and x of a map, row by row."""
    y, x = np.divmod(np.arange(side * side, dtype=np.int64), side)
    return y, x


@dataclass(frozen=True)
class Windows:
    """A partition into windows, as row numbers in memory.

    ``rows`` is (windows)x(tokens of a window), -1 for padding. ``back`` gives for every place in
    memory (after pooling, if there is one) its row in the windows' output.
    """

    rows: Integers
    back: Integers


@dataclass(frozen=True)
class Order:
    """Of a map of ``side`` x ``side`` tokens in squares of ``square``, a power of 2.

    Raises
    ------
    ExportError
        If squares do not fill the map.
    """

    side: int
    square: int

    def __post_init__(self) -> None:
        if self.side % self.square:
            raise ExportError(
                f"a feature map of side {self.side} cannot be pooled down {self.square} times: "
                "choose an image size that is a multiple of 32 (and of 2 to the poolings)."
            )

    @cached_property
    def place(self) -> Integers:
        """For every token row by row, where it lies in memory."""
        return _along(*_grid(self.side), self.square, self.side // self.square)

    @cached_property
    def token(self) -> Integers:
        """For every place in memory, the token's number row by row."""
        return np.argsort(self.place)

    def pooled(self) -> Order:
        """Return the order of the map after a pooling by 2."""
        return Order(self.side // 2, self.square // 2)

    def windows(self, window: int, *, pooled: bool) -> Windows:
        """Partition into windows of side ``window``; ``pooled`` : the output is pooled by 2.

        Raises
        ------
        ExportError
            If windows of an odd side should be pooled.
        """
        if pooled and (window % 2 or self.square < 2):
            raise ExportError(f"windows of side {window} cannot be pooled by 2.")
        count = -(-self.side // window)
        y, x = _grid(count * window)
        across = -(-count * window // self.square)
        key = _along(y, x, self.square, across)
        of_window = _along(y // window * window, x // window * window, self.square, across)
        ranked = np.lexsort((key, of_window))
        y, x = y[ranked], x[ranked]
        inside = (y < self.side) & (x < self.side)
        place = _along(y, x, self.square, self.side // self.square)
        rows = np.where(inside, place, -1).reshape(count**2, window**2)
        target = self
        if pooled:
            target, y, x = self.pooled(), y[::4] // 2, x[::4] // 2
            inside = (y < target.side) & (x < target.side)
        back = np.empty(target.side**2, np.int64)
        found = _along(y[inside], x[inside], target.square, target.side // target.square)
        back[found] = np.flatnonzero(inside)
        return Windows(rows, back)
