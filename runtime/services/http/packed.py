"""Arrays as nnInteractive's clients pack them (``NNIA``, version 1), both ways.

A magic number, version, codec, number of axes, dtype by name, shape; then chunks, each with its
length before and after compression, compressed by Blosc2. Source: ``nninteractive-client`` 2.6.

What comes from a client is looked at before Blosc2 gets it: what a chunk's own header says has to
agree with what is around it, with the array's shape, and with the few codecs and filters that
clients use. Nothing is allocated before that.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["pack", "unpack"]

_MAGIC, _VERSION = b"NNIA", 1
_ZSTD = 1
_CHUNK = 1 << 30  # bytes of one chunk; Blosc2 counts in 32 bits
_DTYPES = frozenset(
    [
        *("bool", "float16", "float32", "float64"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    ]
)
_MOST_AXES = 8
_HEADER = 32  # bytes of a Blosc2 chunk's own, extended header
_FORMATS = {"blosclz": 0, "lz4": 1, "zlib": 3, "zstd": 4}  # of the three upper bits of its flags
_FILTERS = range(5)  # none, shuffle, bit shuffle, delta, truncated precision
_EXTENDED = 0b101  # both shuffle bits: the header goes on for 16 bytes with the filters
_LAZY = 0x8  # of the second flags: the data lies elsewhere


def pack(array: NDArray[Any]) -> bytes:
    """Return an array as bytes; compressed quickly, as a mask compresses best."""
    import blosc2

    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode()
    parts = [
        struct.pack("<4sBBBB", _MAGIC, _VERSION, _ZSTD, array.ndim, len(name)),
        name,
        struct.pack(f"<{array.ndim}q", *array.shape),
        struct.pack("<I", -(-array.nbytes // _CHUNK)),
    ]
    raw = array.reshape(-1).view(np.uint8)
    for start in range(0, array.nbytes, _CHUNK):
        part = raw[start : start + _CHUNK]
        chunk = blosc2.compress2(
            part,
            typesize=array.dtype.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            filters=[blosc2.Filter.NOFILTER],
            nthreads=1,
        )
        parts += [struct.pack("<QQ", len(part), len(chunk)), chunk]
    return b"".join(parts)


def unpack(data: bytes | memoryview, most_bytes: int) -> NDArray[Any]:
    """Return the array that a client packed.

    Parameters
    ----------
    data : as it was sent.
    most_bytes : that the array may take.

    Raises
    ------
    InputError
        If it is not one whole packed array, or takes more.
    """
    import blosc2

    dtype, shape, offset = _header(data)
    size = math.prod(shape) * dtype.itemsize
    if size > most_bytes:
        raise InputError(
            f"the packed array is {'x'.join(map(str, shape))} {dtype.name}, {size} bytes, and this "
            f"server takes {most_bytes} at most. Crop or resample it, or raise the limit."
        )
    (count,) = _take("<I", data, offset, "the number of chunks")
    offset += 4
    chunks: list[tuple[memoryview, int]] = []
    view, total = memoryview(data), 0
    for number in range(count):
        plain, packed = _take("<QQ", data, offset, f"chunk {number + 1} of {count}")
        offset += 16
        if packed > len(data) - offset:
            raise InputError(
                f"chunk {number + 1} of the packed array is said to be {packed} bytes, and "
                f"{len(data) - offset} follow: the request was cut short."
            )
        chunk = view[offset : offset + packed]
        _check_chunk(chunk, plain, dtype.itemsize, number)
        chunks.append((chunk, plain))
        offset += packed
        total += plain
        if total > size:
            break
    if total != size or offset != len(data):
        raise InputError(
            f"the packed array of shape {'x'.join(map(str, shape))} {dtype.name} takes {size} "
            f"bytes; its chunks say {total}, and {len(data) - offset} bytes are left over."
        )
    flat = np.empty(math.prod(shape), dtype)
    out, at = flat.view(np.uint8), 0
    for chunk, plain in chunks:
        try:
            blosc2.decompress2(chunk, dst=out[at : at + plain], nthreads=1)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"a chunk of the packed array is damaged: {error}.") from error
        at += plain
    return flat.reshape(shape)


def _header(data: bytes | memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return dtype, shape, and where the chunks begin."""
    magic, version, codec, axes, length = _take("<4sBBBB", data, 0, "the head")
    if magic != _MAGIC or version != _VERSION or codec not in (1, 2):
        raise InputError(
            f"this is no packed array of a version that is known: magic {magic!r}, version "
            f"{version}, codec {codec}; expected {_MAGIC!r}, {_VERSION}, 1 or 2."
        )
    name = bytes(data[8 : 8 + length]).decode("ascii", "replace")
    if name not in _DTYPES:
        raise InputError(
            f"the packed array's dtype is '{name:.40}'; expected one of "
            f"{', '.join(sorted(_DTYPES))}."
        )
    if axes > _MOST_AXES:
        raise InputError(f"the packed array has {axes} axes; expected {_MOST_AXES} at most.")
    shape = _take(f"<{axes}q", data, 8 + length, "the shape")
    if any(extent < 0 for extent in shape):
        raise InputError(f"the packed array's shape is {list(shape)}: no extent is below 0.")
    return np.dtype(name), shape, 8 + length + 8 * axes


def _check_chunk(chunk: memoryview, plain: int, itemsize: int, number: int) -> None:
    """Raise InputError unless Blosc2's own header says what is said around it."""
    where = f"chunk {number + 1} of the packed array"
    if len(chunk) < _HEADER:
        raise InputError(f"{where} is {len(chunk)} bytes: too few for a Blosc2 chunk.")
    version, _, flags, typesize, size, block, packed = struct.unpack_from("<BBBBiii", chunk)
    if size != plain or packed != len(chunk) or plain % itemsize or plain > _CHUNK:
        raise InputError(
            f"{where} is said to hold {plain} bytes in {len(chunk)}, its own header says {size} in "
            f"{packed}."
        )
    filters, more = chunk[16:22], chunk[31]
    if (
        version not in (4, 5)
        or flags & _EXTENDED != _EXTENDED
        or flags >> 5 not in _FORMATS.values()
        or any(one not in _FILTERS for one in filters)
        or more & _LAZY
        or not typesize
        or not 0 < block <= max(size, 1)
    ):
        raise InputError(f"{where} is not compressed as clients of nnInteractive do it.")


def _take(layout: str, data: bytes | memoryview, offset: int, what: str) -> tuple[Any, ...]:
    if offset + struct.calcsize(layout) > len(data):
        raise InputError(f"the packed array ends before {what}: the request was cut short.")
    return struct.unpack_from(layout, data, offset)
