"""Packed arrays: those of nnInteractive's client both ways, and those that lie."""

from __future__ import annotations

import struct
from contextlib import suppress

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnInteractive.inference.remote.serialization import pack_array, unpack_array

from recallseg.engines.errors import InputError
from recallseg.runtime.services.http.packed import pack, unpack

MANY = 1 << 24


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "uint16", "float16", "float32", "int64"]
)
@pytest.mark.parametrize("codec", [blosc2.Codec.ZSTD, blosc2.Codec.LZ4])
@pytest.mark.parametrize("shape", [(1,), (1, 5, 6, 7), (3, 40, 41, 9)])
def test_both_ways_with_the_client(dtype: str, codec: blosc2.Codec, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    for each in (array, np.zeros_like(array)):
        read = unpack(pack_array(each, codec=codec), MANY)
        assert (read.dtype, read.shape) == (each.dtype, each.shape)
        assert (read == each).all()
        theirs = unpack_array(pack(each))
        assert theirs.dtype == each.dtype
        assert (theirs == each).all()


GOOD = pack_array(np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8))


def _changed(at: int, layout: str, value: int) -> bytes:
    data = bytearray(GOOD)
    struct.pack_into(layout, data, at, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        _changed(0, "<B", 0),  # magic
        _changed(4, "<B", 2),  # version
        _changed(6, "<B", 200),  # axes
        _changed(13, "<q", 2**62),  # an extent
        _changed(13, "<q", -6),
        _changed(13, "<q", 7),
        _changed(37, "<I", 2**32 - 1),  # chunks
        _changed(41, "<Q", 2**60),  # bytes of a chunk
        _changed(49, "<Q", 2**60),
        _changed(57 + 4, "<i", 2**30),  # the same in Blosc2's own header
        _changed(57 + 8, "<i", 0),
        _changed(57 + 12, "<i", 7),
        GOOD.replace(b"int16", b"objec"),
    ],
)
def test_what_lies_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        unpack(data, MANY)


def test_no_more_is_allocated_than_is_allowed() -> None:
    bomb = pack_array(np.zeros((1, 300, 300, 300), np.float32))
    assert len(bomb) < 1000
    with pytest.raises(InputError, match="at most"):
        unpack(bomb, MANY)


@given(st.data())
def test_whatever_is_changed_is_read_or_refused(data: st.DataObject) -> None:
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(InputError):
        unpack(bytes(changed), MANY)
