"""Precisions: what each is called, allowed and made from. The one table that everything asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from recallseg.engines.errors import InputError

__all__ = ["PRECISIONS", "Precision", "find_precision", "precisions_made"]

Maker = Literal["export", "floating", "native", "quantized"]


@dataclass(frozen=True)
class Precision:
    """A way to compute the graphs.

    Attributes
    ----------
    name : as users write it.
    size : bytes of a number that lives between two layers, for budgets.
    tolerance : largest relative error of any tensor against the golden ones.
    made_by : ``export`` writes it from the checkpoint; ``convert`` from graphs of another: in other
        ``floating`` types, by ``native`` operators, or ``quantized``.
    made_from : the precision of those graphs; empty for what ``export`` writes.
    native : whether it needs operators of our own.
    approximations : what its graphs leave out or put together, and an evaluation has to judge.
    """

    name: str
    size: int
    tolerance: float
    made_by: Maker
    made_from: str = ""
    native: bool = False
    approximations: tuple[str, ...] = ()


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        # Summation order and fused operators move the last bits; 30 layers of it stay under 3e-5.
        # The mask's scale applied twice moves memories by 7e-4 only: normalisations behind it
        # absorb it.
        Precision("fp32", 4, 2e-4, "export"),
        # The same by kernels of our own.
        Precision("fp32-native", 4, 2e-4, "native", "fp32", native=True),
        # 10 bits of mantissa: 5e-4 a rounding, tens of roundings in sequence.
        Precision("fp16", 2, 3e-2, "floating", "fp32"),
        # The same with the tanh form of GELU, 4e-4 from the other at most; cuBLASLt's fused
        # products where ONNX Runtime's CUDA provider has none.
        Precision("fp16-native", 2, 3e-2, "floating", "fp32", native=True),
        # 7 bits of mantissa: 4e-3 a rounding.
        Precision("bf16", 2, 1e-1, "floating", "fp32"),
        # Everything that is sensitive is kept in fp32, the rest is fp16.
        Precision("mixed", 2, 2e-2, "floating", "fp32"),
        # Quantised weights and activations: judged by Dice first, this catches what is broken.
        Precision("int8", 2, 3e-1, "quantized", "fp32"),
        Precision("int8-native", 2, 3e-1, "quantized", "fp32", native=True),
        # Memory tokens averaged 2x2. Likewise judged by Dice first.
        Precision("pooled", 4, 3e-1, "export", approximations=("pooled",)),
        Precision("int8-pooled", 2, 3e-1, "quantized", "pooled", approximations=("pooled",)),
    )
}
"""By name."""


def find_precision(name: str) -> Precision:
    """Return what a name stands for; InputError if there is no such precision."""
    if name not in PRECISIONS:
        raise InputError(f"there is no precision '{name}'; choose {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def precisions_made(by: Maker) -> tuple[str, ...]:
    """Return the names of the precisions that are made in one way."""
    return tuple(name for name, precision in PRECISIONS.items() if precision.made_by == by)
