"""Records of memories: layout, order, rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.shards import (
    HEADER_BYTES,
    Place,
    ShardReader,
    ShardWriter,
    digest_record,
    pack,
    record_bytes,
)

LAYOUT = MemoryLayout(tokens=5, memory_dim=3, pointer_dim=4)  # odd, so that padding shows


def test_records_lie_where_they_should(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "memories", LAYOUT, shard_bytes=HEADER_BYTES + 3 * 64)
    reader = ShardReader(tmp_path / "memories", LAYOUT)
    assert record_bytes(LAYOUT) == 64
    assert writer.capacity == 3
    tokens = [np.full((5, 3), n, np.float16) for n in range(3)]
    for n in range(3):
        writer.append(Place(1, n), pack(LAYOUT, tokens[n], np.full(4, -n, np.float32)))
        writer.sync(1)
        # A reader that has mapped the shorter file sees what was appended.
        found = reader.record(Place(1, n))
        assert np.array_equal(found["tokens"], tokens[n])
        assert (found["pointer"] == -n).all()
    assert (tmp_path / "memories" / "000001.shard").stat().st_size == HEADER_BYTES + 3 * 64
    with pytest.raises(LibraryCorruptError, match="holds 3 memories, number 3 is wanted"):
        reader.record(Place(1, 3))
    with pytest.raises(LibraryCorruptError, match=r"000002\.shard cannot be read"):
        reader.record(Place(2, 0))
    with pytest.raises(LibraryCorruptError, match="has layout"):
        ShardReader(tmp_path / "memories", MemoryLayout(5, 3, 5)).record(Place(1, 0))
    with pytest.raises(LibraryCorruptError, match="has layout"):
        ShardReader(tmp_path / "memories", MemoryLayout(5, 3, 4, "int8")).record(Place(1, 0))


def test_beginning_a_shard_again_leaves_old_maps_alone(tmp_path: Path) -> None:
    writer, reader = ShardWriter(tmp_path / "m", LAYOUT), ShardReader(tmp_path / "m", LAYOUT)
    pointer = np.ones(4, np.float32)
    writer.append(Place(1, 0), pack(LAYOUT, np.ones((5, 3), np.float32), pointer))
    old = reader.record(Place(1, 0))
    writer.append(Place(1, 0), pack(LAYOUT, np.zeros((5, 3), np.float32), pointer))
    assert (old["tokens"] == 1).all()


@given(arrays(np.float32, (5, 3), elements=st.floats(-60000, 60000, width=32)))
def test_int8_is_off_by_half_a_scale_at_most(tokens: np.ndarray) -> None:
    layout = MemoryLayout(5, 3, 4, "int8")
    record = pack(layout, tokens, np.arange(4, dtype=np.float32))
    scales = np.float64(1) * record["scales"]
    decoded = record["tokens"] * scales[:, None]
    largest = np.abs(tokens).max(axis=1)
    # A scale itself is rounded to 24 bits, or to the smallest number there is.
    half = largest[:, None] / 254 * (1 + 2**-20) + 128 * np.finfo(np.float32).smallest_subnormal
    assert (np.abs(decoded - tokens) <= half).all()
    assert np.abs(record["tokens"].astype(int)).max() <= 127
    assert (record["pointer"] == np.arange(4)).all()
    for other in ("tokens", "scales", "pointer"):
        changed = record.copy()
        changed[other].flat[0] = 0 if changed[other].flat[0] else 1
        assert digest_record(changed) != digest_record(record)


def test_int8_takes_a_little_more_than_half_the_bytes() -> None:
    wide, narrow = (MemoryLayout(1024, 64, 256, name) for name in ("fp16", "int8"))
    assert record_bytes(wide) == 1024 * 128 + 1024
    assert record_bytes(narrow) == 1024 * 68 + 1024
