"""Records of memories: layout, order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.shards import (
    HEADER_BYTES,
    Place,
    ShardReader,
    ShardWriter,
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
        writer.append(Place(1, n), tokens[n], np.full(4, -n, np.float32))
        writer.sync(1)
        # A reader that has mapped the shorter file sees what was appended.
        found, pointer = reader.record(Place(1, n))
        assert np.array_equal(found, tokens[n])
        assert (pointer == -n).all()
    assert (tmp_path / "memories" / "000001.shard").stat().st_size == HEADER_BYTES + 3 * 64
    with pytest.raises(LibraryCorruptError, match="holds 3 memories, number 3 is wanted"):
        reader.record(Place(1, 3))
    with pytest.raises(LibraryCorruptError, match=r"000002\.shard cannot be read"):
        reader.record(Place(2, 0))
    with pytest.raises(LibraryCorruptError, match="has layout"):
        ShardReader(tmp_path / "memories", MemoryLayout(5, 3, 5)).record(Place(1, 0))


def test_beginning_a_shard_again_leaves_old_maps_alone(tmp_path: Path) -> None:
    writer, reader = ShardWriter(tmp_path / "m", LAYOUT), ShardReader(tmp_path / "m", LAYOUT)
    writer.append(Place(1, 0), np.ones((5, 3), np.float16), np.ones(4, np.float32))
    old, _ = reader.record(Place(1, 0))
    writer.append(Place(1, 0), np.zeros((5, 3), np.float16), np.ones(4, np.float32))
    assert (old == 1).all()
