"""Native operators for ONNX Runtime: where they are, and what to say where not.

They are built where there is a compiler (docs/contribute/native-kernels.md) and nothing stands in
for them: a graph that has them needs them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from recallseg.engines.digest import digest_file
from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.reading import read_file

__all__ = [
    "ATTENTION",
    "DOMAIN",
    "HALF_LINEAR",
    "LINEAR",
    "QUANTIZED_ATTENTION",
    "STRIPE",
    "describe_operators",
    "needs_operators",
    "operators_digest",
    "operators_library",
    "require_operators",
]

DOMAIN = "recallseg"
"""Of the operators' names."""

ATTENTION = "Attention"
"""Attention in fp32; inputs, output, ``num_heads`` and ``scale`` are those of
``com.microsoft::MultiHeadAttention`` with three inputs."""

QUANTIZED_ATTENTION = "QuantizedAttention"
"""The same with 8-bit products."""

LINEAR = "Linear"
"""``...xW`` input, ``PxWx16`` weights, ``Px16`` bias -> ``...xN``: weights and bias in P stripes of
:data:`STRIPE` columns, the last one filled up with 0. Attributes ``columns`` = N and
``activation``: 0 none, 1 GELU, 2 ReLU."""

STRIPE = 16

HALF_LINEAR = "HalfLinear"
"""For CUDA, in fp16: ``...xW`` input, ``WxN`` weights, ``N`` bias -> ``...xN``; ``activation`` as
for :data:`LINEAR`, GELU in its tanh form."""

# A node's field 7, its domain, as it is written to a file: onnx itself is not a runtime dependency.
_MARK = b"\x3a" + bytes([len(DOMAIN)]) + DOMAIN.encode()
_LIBRARY = Path(__file__).with_name("_operators.so")
_HOW = "install recallseg with '-C wheel.cmake=true' (docs/contribute/native-kernels.md)"


def operators_library() -> Path | None:
    """Return the library that sessions are to register, or None where it was not built."""
    return _LIBRARY if _LIBRARY.is_file() else None


def operators_digest() -> str | None:
    """Return the SHA-256 of the library, or None where it was not built."""
    library = operators_library()
    if library is None:
        return None
    found = library.stat()
    return _digest(library, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4)
def _digest(library: Path, size: int, changed: int) -> str:
    """Digest a file once, as long as it has one size and time; it is asked for with each result."""
    return digest_file(library)


def require_operators(what: str) -> Path:
    """Return the library.

    Parameters
    ----------
    what : needs it; for the message.

    Raises
    ------
    EngineUnavailableError
        If it was not built.
    """
    library = operators_library()
    if library is None:
        raise EngineUnavailableError(
            f"{what} needs recallseg's native operators for ONNX Runtime, which were not built: "
            f"{_HOW}, or choose another precision."
        )
    return library


def needs_operators(graph: Path) -> bool:
    """Whether a graph's file has one of the operators."""
    return _MARK in read_file(graph)


def describe_operators() -> str:
    """Say whether the operators are here, and for which vector units.

    Raises
    ------
    EngineUnavailableError
        If the library is there and cannot be loaded.
    """
    library = operators_library()
    if library is None:
        return f"not built: for the precisions fp32-native, fp16-native and int8-native, {_HOW}"
    try:
        level = ctypes.CDLL(str(library)).recallseg_operators_level
    except (OSError, AttributeError) as error:
        raise EngineUnavailableError(
            f"the native operators cannot be loaded: {error}. Build them anew on this machine "
            "(docs/contribute/native-kernels.md)."
        ) from error
    level.restype = ctypes.c_char_p
    return f"native (vector units: {level().decode()})"
