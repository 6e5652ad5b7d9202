"""A library that is changed while it is verified is not told to be damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_library import add, create, draw

from recallseg.runtime.library import Library, index, maintenance

CHANGES: dict[str, Callable[[Library], object]] = {
    "add": lambda writer: add(writer, 9),
    "remove": lambda writer: writer.remove("case 3"),
    "retire": lambda writer: writer.retire(["case 3"]),
    "replace": lambda writer: writer.replace_mask("case 3", "nucleus", draw(9)[1]),
    "compact": lambda writer: (writer.remove("case 0"), writer.compact()),
    "rename": lambda writer: writer.rename_structure("nucleus", "core"),
}


@pytest.mark.parametrize("page", [1, 256])  # changed between pages, and within one
@pytest.mark.parametrize("what", CHANGES)
def test_what_another_changes_meanwhile_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, page: int
) -> None:
    monkeypatch.setattr(maintenance, "_PAGE", page)
    with create(tmp_path / "library", shard_bytes=1) as writer:
        for number in range(4):
            add(writer, number, key=f"case {number}")
        with Library.open(tmp_path / "library") as reader:
            read, left = reader._store.reader.record, [CHANGES[what]]

            def change_first(*place: object) -> object:
                while left:
                    left.pop()(writer)
                return read(*place)  # type: ignore[arg-type]

            monkeypatch.setattr(reader._store.reader, "record", change_first)
            report = reader.verify()
            assert report.ok, report.problems
            assert not left
        assert writer.verify().ok


def test_damage_is_told_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "_PAGE", 2)
    with create(tmp_path / "library") as library:
        for number in range(4):
            add(library, number, key=f"case {number}")
        file = next((tmp_path / "library" / "memories").glob("*.shard"))
        data = bytearray(file.read_bytes())
        data[4096] ^= 1
        file.write_bytes(data)
        library._store.sources.remove(4)
        told = library.verify().problems
        assert len(told) == 2
        assert "memory of 'nucleus' of exemplar 'case 0' does not match its digest" in told[0]
        assert "case 3" in told[1]


def test_an_index_that_another_saves_anew_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recallseg.runtime.library import retrieval

    for module in (index, retrieval):
        monkeypatch.setattr(module, "EXACT_LIMIT", 4)
    with create(tmp_path / "library") as writer:
        for number in range(6):
            add(writer, number)
        writer.rebuild_index()
        digests, left = retrieval.file_digests, [1]

        def saved_meanwhile(*given: object, **more: object) -> object:
            while left:
                left.pop()
                add(writer, 9)
                writer.rebuild_index()
            return digests(*given, **more)  # type: ignore[arg-type]

        with Library.open(tmp_path / "library") as reader:
            monkeypatch.setattr(retrieval, "file_digests", saved_meanwhile)
            report = reader.verify()
        assert not left
        assert report.indexes
        assert report.ok, report.problems
