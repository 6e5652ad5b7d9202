"""Counts that are listed, against those of PyTorch's modules."""

from __future__ import annotations

from recallseg.export.families.counting import count_in_process
from recallseg.export.families.listing import networks


def test_the_listed_counts_are_those_of_the_models() -> None:
    (entry,) = (e for e in networks() if e["name"] == "edgetam")
    counted = count_in_process("edgetam", 512)
    assert entry["parameters"] == counted.pop("parameters") == 13_895_794
    assert entry["sizes"]["512"] == counted
    assert counted["memory_bytes_fp16"] == 2 * (512 * 64 + 256)
