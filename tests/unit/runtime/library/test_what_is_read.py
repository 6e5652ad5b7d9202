"""What a query reads is what was stored, or an error that names it: never other numbers."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle
from support.fake_library import add, buffers, create, embedding

from recallseg import Library, Segmenter
from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library import index, retrieval, shards
from recallseg.runtime.library.shards import HEADER_BYTES


@pytest.fixture(params=["fp16", "int8"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> Library:
    made = create(tmp_path / "library", memory_format=request.param)
    for n in range(4):
        add(made, n, key=str(n), tags={"site": "ab"[n % 2]})
    return made


def shard_of(library: Library) -> Path:
    return next((library.path / "memories").iterdir())


def reverse(shard: Path, count: int = 4) -> None:
    """Reverse the order of a shard's records, in place as a program that has it open would."""
    with shard.open("r+b") as file:
        data = file.read()
        size = (len(data) - HEADER_BYTES) // count
        records = [data[HEADER_BYTES + i * size :][:size] for i in range(count)]
        file.seek(HEADER_BYTES)
        file.write(b"".join(reversed(records)))


def gather(library: Library, key: str) -> np.ndarray:
    memories, pointers = buffers(1)
    library.gather(library.memories([key], "nucleus"), memories, pointers)
    return memories


def test_exchanged_records_are_an_error(library: Library) -> None:
    library.close()
    reverse(shard_of(library))
    reader = Library.open(library.path)
    found = reader.recall(embedding(2), ["nucleus"], 2).found["nucleus"]
    with pytest.raises(
        LibraryCorruptError, match=r"memory of 'nucleus' of exemplar '2'.*not what was stored"
    ):
        reader.gather([*found.memories.values()], *buffers(2))
    reverse(shard_of(library))
    reader.gather([*found.memories.values()], *buffers(2))


def test_records_exchanged_under_a_running_process_are_an_error_too(library: Library) -> None:
    reader = Library.open(library.path)
    before = gather(reader, "1")
    reverse(shard_of(library))
    with pytest.raises(LibraryCorruptError, match="exemplar '1'"):
        gather(reader, "1")
    reverse(shard_of(library))
    assert np.array_equal(gather(reader, "1"), before)


def test_a_segmenter_gives_no_masks_with_exchanged_labels(tmp_path: Path) -> None:
    """Reversed, the two memories gave each structure the other's mask, and quality "ok"."""
    bundle = make_fake_bundle(tmp_path / "bundle")
    image = np.full((64, 64), 30, np.uint8)
    image[:32] = 200
    with Library.create(tmp_path / "library", bundle, engine="fake") as library:
        library.add(image, {"top": image > 100, "bottom": image < 100})
        assert Segmenter(library, k=1, engine="fake").segment(image).masks["top"][:16].all()
    reverse(shard_of(library), count=2)
    with Library.open(tmp_path / "library", bundle) as library:
        segmenter = Segmenter(library, k=1, engine="fake")
        with pytest.raises(LibraryCorruptError, match="not what was stored"):
            segmenter.segment(image)


def test_a_record_is_digested_once_in_a_process(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def count(record: shards.Record) -> bytes:
        asked.append(b"")
        return digest_record(record)

    digest_record = shards.digest_record
    monkeypatch.setattr(shards, "digest_record", count)
    reader = Library.open(library.path)
    for _ in range(3):
        gather(reader, "0")
        gather(reader, "3")
    assert len(asked) == 2
    add(library, 9, key="9")  # the writer's own digest is one more; the file is another now
    asked.clear()
    for _ in range(3):
        gather(reader, "0")
    assert len(asked) == 1


def test_a_shard_cut_short_under_a_running_process_is_an_error(library: Library) -> None:
    """It was SIGBUS: the end of the process, with no word to anybody."""
    library.close()
    code = f"""
import os, sys
sys.path[:0] = {[*sys.path, str(Path(__file__).parents[3])]!r}
from recallseg import Library
from recallseg.engines.errors import LibraryCorruptError
from support.fake_library import buffers
library = Library.open({str(library.path)!r})
held = library.memories(["0", "3"], "nucleus")
library.gather(held, *buffers(2))
os.truncate({str(shard_of(library))!r}, {HEADER_BYTES + 600})
for look in (lambda: library.gather(held, *buffers(2)), lambda: print(library.verify().problems)):
    try:
        look()
    except LibraryCorruptError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr)
    gathered, verified = done.stdout.splitlines()
    assert "is cut off: it has 4696 bytes" in gathered
    assert verified.count("is cut off") >= 2


def tamper(library: Library, statement: str) -> Library:
    library.close()
    connection = sqlite3.connect(library.path / "library.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    return Library.open(library.path)


SWAP = (
    "UPDATE encodings SET embedding = (SELECT e.embedding FROM encodings e WHERE e.exemplar = 3) "
    "WHERE exemplar = 2"
)


def test_exchanged_embeddings_are_an_error(library: Library) -> None:
    reader = tamper(library, SWAP)
    with pytest.raises(LibraryCorruptError, match=r"embedding of exemplar '1' is not what was"):
        reader.search(embedding(0), "nucleus", 1)
    assert any("embedding of exemplar '1'" in problem for problem in reader.verify().problems)


def test_embeddings_behind_a_graph_are_compared_when_they_are_first_read(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (index, retrieval):
        monkeypatch.setattr(module, "EXACT_LIMIT", 3)
    library.rebuild_index()
    assert list((library.path / "index").iterdir())
    reader = tamper(library, SWAP)
    with pytest.raises(LibraryCorruptError, match=r"embedding of exemplar '1' is not what was"):
        reader.search(embedding(0), "nucleus", 4)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE exemplars SET content = (SELECT content FROM exemplars WHERE id = 1) WHERE id = 3",
        "UPDATE tags SET value = 'b' WHERE exemplar = 3 AND value = 'a'",
        "INSERT INTO tags VALUES (3, 'sex', 'F')",
        "DELETE FROM tags WHERE exemplar = 3",
        "UPDATE exemplars SET key = 'two' WHERE id = 3",
    ],
)
def test_a_row_that_was_changed_is_an_error_when_it_is_recalled(
    library: Library, statement: str
) -> None:
    reader = tamper(library, statement)
    with pytest.raises(LibraryCorruptError, match=r"key, content or tags do not match its digest"):
        reader.search(embedding(2), "nucleus", 4)


def test_exchanged_places_are_an_error(library: Library) -> None:
    reader = tamper(library, "UPDATE memories SET slot = 3 - slot WHERE slot IN (0, 3)")
    with pytest.raises(LibraryCorruptError, match=r"of exemplar '[03]'.*not what was stored"):
        gather(reader, "0")
    assert np.isfinite(gather(reader, "1")).all()
