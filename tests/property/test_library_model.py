"""Any sequence of changes leaves what a plain dictionary would hold, for writer and reader."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.fake_library import GEOMETRY, HashEncoder, StubBundle, draw

from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.library import index as index_module
from recallseg.runtime.library import retrieval as retrieval_module

NAMES = ("nucleus", "wall", "cyst")
NUMBERS = st.integers(0, 30)


class LibraryMachine(RuleBasedStateMachine):
    """The model: key -> (number, structures shown, structures absent)."""

    memory_format = "fp16"

    def __init__(self) -> None:
        super().__init__()
        parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        path = self.folder / "library"
        self.writer = Library.create(
            path,
            StubBundle(),
            encoder=HashEncoder(),
            shard_bytes=4096 + 5 * 320,
            memory_format=self.memory_format,
        )
        self.reader = Library.open(path)
        self.model: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.retired: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {}

    @rule(number=NUMBERS, shown=st.sets(st.sampled_from(NAMES)), absent=st.sampled_from(NAMES))
    def add(self, number: int, shown: set[str], absent: str) -> None:
        image, mask = draw(number)
        present = tuple(name for name in NAMES if name in shown)
        missing = () if absent in shown else (absent,)
        arguments = (image, dict.fromkeys(present, mask))
        options = {"absent": missing, "tags": {"parity": str(number % 2)}, "key": str(number)}
        if str(number) in {*self.model, *self.retired}:
            with pytest.raises(InputError, match="already"):
                self.writer.add(*arguments, **options)
        else:
            self.writer.add(*arguments, **options)
            self.model[str(number)] = (number, present, missing)
            self.tags[str(number)] = {"parity": str(number % 2)}

    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def add_many(self, numbers: list[int]) -> None:
        drawn = [(number, *draw(number)) for number in numbers]
        items: list[Any] = [
            {
                "image": image,
                "masks": {"nucleus": mask, "wall": ~mask},
                "tags": {"parity": str(number % 2)},
                "key": str(number),
            }
            for number, image, mask in drawn
        ]
        known = {*self.model, *self.retired}
        if len({*numbers}) < len(numbers) or {*map(str, numbers)} & known:
            with pytest.raises(InputError, match=r"^items\[[0-3]\]: .*(already|has the key)"):
                self.writer.add_many(items)
            return
        assert self.writer.add_many(iter(items)) == [*map(str, numbers)]
        for number in numbers:
            self.model[str(number)] = (number, ("nucleus", "wall"), ())
            self.tags[str(number)] = {"parity": str(number % 2)}

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        known = self.retired if str(number) in self.retired else self.model
        if known.pop(str(number), None) is None:
            with pytest.raises(InputError, match="no exemplar"):
                self.writer.remove(str(number))
        else:
            self.writer.remove(str(number))

    @rule(numbers=st.sets(NUMBERS, max_size=3), back=st.booleans())
    def retire(self, numbers: set[int], back: bool) -> None:
        before, after = (self.retired, self.model) if back else (self.model, self.retired)
        change = self.writer.reinstate if back else self.writer.retire
        keys = [str(number) for number in numbers]
        if {*keys} <= {*before}:
            change(keys)
            after.update((key, before.pop(key)) for key in keys)
        else:
            with pytest.raises(InputError, match=r"no exemplar|nothing was changed"):
                change(keys)

    @rule(number=NUMBERS)
    def replace_mask(self, number: int) -> None:
        """The other way round; twice is the first again."""
        _, present, missing = self.model.get(str(number), (0, (), ()))
        before = self.writer.digest
        if "nucleus" not in present:
            with pytest.raises(InputError, match=r"no (exemplar|mask)|is retired"):
                self.writer.replace_mask(str(number), "nucleus", draw(number)[1])
            assert self.writer.digest == before
            return
        mask = self.writer.source(str(number))[1]["nucleus"]
        self.writer.replace_mask(str(number), "nucleus", ~mask)
        assert np.array_equal(self.writer.source(str(number))[1]["nucleus"], ~mask)
        assert self.writer.digest != before
        assert self.writer.get(str(number)).absent == missing

    @rule(number=NUMBERS, parity=st.sampled_from(["0", "1"]), more=st.booleans())
    def retag(self, number: int, parity: str, more: bool) -> None:
        tags = {"parity": parity, **({"more": "yes"} if more else {})}
        if str(number) not in {*self.model, *self.retired}:
            with pytest.raises(InputError, match="no exemplar"):
                self.writer.retag(str(number), tags)
        else:
            self.writer.retag(str(number), tags)
            self.tags[str(number)] = tags

    @rule()
    def reopen_writer(self) -> None:
        self.writer.close()
        self.writer = Library.open(self.writer.path, mode="write", encoder=HashEncoder())

    @rule()
    def reopen_reader(self) -> None:
        self.reader.close()
        self.reader = Library.open(self.writer.path)

    @rule()
    def compact(self) -> None:
        self.writer.compact()

    @rule()
    def rebuild(self) -> None:
        self.writer.rebuild(StubBundle(), encoder=HashEncoder())

    @rule(
        query=st.integers(100, 110),
        structure=st.sampled_from(NAMES),
        parity=st.sampled_from(["0", "1", None]),
        data=st.data(),
    )
    def search(self, query: int, structure: str, parity: str | None, data: st.DataObject) -> None:
        vector = self.embedding(query)
        known = {
            key: (1 - float(self.embedding(number) @ vector), structure in missing)
            for key, (number, present, missing) in self.model.items()
            if structure in (*present, *missing) and parity in (None, self.tags[key]["parity"])
        }
        shown = sorted(d for d, absent in known.values() if not absent)
        if not shown:
            return
        k = data.draw(st.integers(1, len(shown)))
        wanted = sorted(
            (d, key, absent) for key, (d, absent) in known.items() if d <= shown[k - 1] + 1e-6
        )
        absent_left = k
        expected = []
        for distance, key, absent in wanted:
            absent_left -= absent
            if not absent or absent_left >= 0:
                expected.append((key, absent, distance))
        for library in (self.writer, self.reader):
            found = library.search(
                vector, structure, k, tags=None if parity is None else {"parity": parity}
            )
            assert [(m.key, m.absent) for m in found] == [(key, a) for key, a, _ in expected]
            assert np.allclose([m.distance for m in found], [d for _, _, d in expected], atol=1e-5)
            self.gather(library, [m.key for m in found if not m.absent], structure)

    def gather(self, library: Library, keys: list[str], structure: str) -> None:
        memories = np.empty((len(keys), GEOMETRY.tokens, GEOMETRY.memory_dim), np.float32)
        pointers = np.empty((len(keys), GEOMETRY.channels), np.float32)
        library.gather(library.memories(keys, structure), memories, pointers)
        for row, key in enumerate(keys):
            image, mask = draw(self.model[key][0])
            encoded = HashEncoder().encode(image, {structure: mask})
            wanted = encoded.memories[structure]
            if library.memory_format == "int8":
                half = np.abs(wanted).max(axis=1, keepdims=True) / 254
                assert (np.abs(memories[row] - wanted) <= half * 1.001).all()
            else:
                assert np.allclose(memories[row], wanted, rtol=2**-10, atol=1e-6)
            assert np.array_equal(pointers[row], encoded.pointers[structure])

    @invariant()
    def both_hold_what_the_model_holds(self) -> None:
        for library in (self.writer, self.reader):
            found = {e.key: (int(e.key), e.structures, e.absent) for e in library}
            ordered = {
                key: (number, set(present), missing)
                for key, (number, present, missing) in self.model.items()
            }
            assert {k: (n, set(p), a) for k, (n, p, a) in found.items()} == ordered
            assert len(library) == len(self.model)
            both = {*self.model, *self.retired}
            assert all(library[key].tags == self.tags[key] for key in both)
            assert {e.key for e in library.retired} == {*self.retired}
            for name in NAMES:
                assert library.count(name) == sum(name in p for _, p, _ in self.model.values())
        assert self.writer.digest == self.reader.digest

    @precondition(lambda self: self.model)
    @rule()
    def verify(self) -> None:
        assert self.writer.verify().problems == ()
        changes = self.writer.history()
        added = {key for change in changes if "add" in change.what for key in change.exemplars}
        assert {*self.model, *self.retired} <= added

    @staticmethod
    def embedding(number: int) -> np.ndarray:
        return HashEncoder().encode(draw(number)[0], {}).embedding

    def teardown(self) -> None:
        self.writer.close()
        self.reader.close()
        shutil.rmtree(self.folder)


LibraryMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class TestSmall(LibraryMachine.TestCase):  # type: ignore[misc, name-defined]
    """Searched exactly."""


class Int8Machine(LibraryMachine):
    """The same with memories in int8."""

    memory_format = "int8"


Int8Machine.TestCase.settings = LibraryMachine.TestCase.settings


class TestInt8(Int8Machine.TestCase):  # type: ignore[misc, name-defined]
    """Memories in int8."""


class TestGraph(LibraryMachine.TestCase):  # type: ignore[misc, name-defined]
    """With a limit so low that graphs are built, grown and replaced."""

    @pytest.fixture(autouse=True)
    def limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index_module, "EXACT_LIMIT", 4)
        monkeypatch.setattr(retrieval_module, "EXACT_LIMIT", 4)
