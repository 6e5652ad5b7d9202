"""The CRC of OpenIGTLink's bodies: CRC-64 of ECMA-182, from 0, most significant bit first.

A frame has hundreds of thousands of bytes. It is cut into lanes that go through the table side by
side; then lanes are joined two by two, since a CRC is linear: that of A and B is that of A, moved
on over as many zero bytes as B has, plus that of B.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc64"]

POLYNOMIAL = 0x42F0E1EBA9EA3693
LANE = 5  # log2 of a lane's bytes


def crc64(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC of some bytes."""
    values = np.frombuffer(data, np.uint8)
    if not len(values):
        return 0
    count = -(-len(values) // 2**LANE)
    padded = np.zeros(count * 2**LANE, np.uint8)
    padded[len(padded) - len(values) :] = values  # zeros in front change nothing
    table = _table()
    columns = np.ascontiguousarray(padded.reshape(count, 2**LANE).T)
    crc = np.zeros(count, np.uint64)
    for column in columns:
        crc = (crc << np.uint64(8)) ^ table[(crc >> np.uint64(56)).astype(np.uint8) ^ column]
    power = LANE
    while len(crc) > 1:
        if len(crc) % 2:
            crc = np.concatenate([np.zeros(1, np.uint64), crc])
        crc = _moved(crc[::2], power) ^ crc[1::2]
        power += 1
    return int(crc[0])


@cache
def _table() -> NDArray[np.uint64]:
    found = []
    for byte in range(256):
        value = byte << 56
        for _ in range(8):
            value = (value << 1) ^ (POLYNOMIAL if value >> 63 else 0)
            value &= 2**64 - 1
        found.append(value)
    return np.array(found, np.uint64)


@cache
def _moves(power: int) -> NDArray[np.uint64]:
    """Return what each byte of a CRC becomes when 2^power zero bytes follow: 8 x 256."""
    bytes_ = np.arange(256, dtype=np.uint64)
    plain = np.stack([bytes_ << np.uint64(8 * place) for place in range(8)])
    if power == 0:
        moved: NDArray[np.uint64] = plain << np.uint64(8)
        moved ^= _table()[(plain >> np.uint64(56)).astype(np.uint8)]
        return moved
    return _moved(_moved(plain, power - 1), power - 1)


def _moved(crc: NDArray[np.uint64], power: int) -> NDArray[np.uint64]:
    moves = _moves(power)
    result = np.zeros_like(crc)
    for place in range(8):
        result ^= moves[place][(crc >> np.uint64(8 * place)).astype(np.uint8)]
    return result
