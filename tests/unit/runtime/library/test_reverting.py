"""A library's exemplars in use, as they were after an earlier change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recallseg.engines.errors import InputError, LibraryWriteError
from recallseg.runtime.library import Library
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.reverting import revert


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library.create(tmp_path / "library", "demo", threads=1) as made:
        yield made


def add(library: Library, key: str) -> int:
    """Add an exemplar; return the library's revision after it."""
    image = np.full((64, 64), 20 + len(key), np.uint8)
    image[16:48, 16 : 20 + 4 * len(library)] = 200
    library.add(image, {"bar": image > 100}, key=key)
    return library.history()[-1].revision


def test_later_ones_are_retired_and_retired_ones_come_back(library: Library) -> None:
    add(library, "a")
    then = add(library, "b")
    digest = library.digest
    library.retire("a")
    now = add(library, "c")
    done = revert(library, then)
    assert (done.retired, done.reinstated, done.lost) == (("c",), ("a",), 0)
    assert [one.key for one in library] == ["a", "b"]
    assert library.digest == digest
    back = revert(library, now)
    assert (back.retired, back.reinstated) == (("a",), ("c",))
    assert [one.key for one in library] == ["b", "c"]


def test_removed_ones_do_not_come_back_which_is_said(library: Library) -> None:
    add(library, "a")
    then = add(library, "b")
    library.remove("a")
    add(library, "c")
    done = revert(library, then)
    assert (done.retired, done.lost) == (("c",), 1)
    assert [one.key for one in library] == ["b"]


def test_what_came_and_went_since_is_not_missed(library: Library) -> None:
    then = add(library, "a")
    add(library, "b")
    library.remove("b")
    assert revert(library, then).lost == 0


def test_other_changes_stay_and_are_told(library: Library) -> None:
    then = add(library, "a")
    library.retag("a", {"view": "axial"})
    done = revert(library, then)
    assert [change.what for change in done.kept] == ["retag"]
    assert library["a"].tags == {"view": "axial"}


def test_one_whose_mask_was_replaced_stays(library: Library) -> None:
    then = add(library, "a")
    _, masks = library.source("a")
    library.replace_mask("a", "bar", ~masks["bar"])
    done = revert(library, then)
    assert (done.retired, done.lost) == ((), 0)
    assert [change.what for change in done.kept] == ["replace_mask"]


def test_one_whose_mask_was_replaced_is_the_one_that_it_was(library: Library) -> None:
    add(library, "a")
    add(library, "b")
    for _ in range(2):
        _, masks = library.source("a")
        library.replace_mask("a", "bar", ~masks["bar"])
    then = library.history()[-1].revision
    add(library, "c")
    assert revert(library, then).retired == ("c",)  # and not a
    assert [one.key for one in library] == ["b", "a"]
    done = revert(library, 2)
    assert (done.retired, done.lost) == ((), 0)
    before = revert(library, 1)  # when there was a alone
    assert (before.retired, before.lost) == (("b",), 0)
    library.remove("a")
    assert [(one.what, one.exemplars, one.erased) for one in library.history()[:3]] == [
        ("add", (), 1),
        ("add", ("b",), 0),
        ("replace_mask", (), 1),
    ]
    assert revert(library, 2).lost == 1


def test_a_change_that_there_was_not(library: Library) -> None:
    add(library, "a")
    with pytest.raises(InputError, match="no change of revision 77; it has 1"):
        revert(library, 77)


def test_only_who_may_write(library: Library) -> None:
    add(library, "a")
    with Library.open(library.path) as reader, pytest.raises(LibraryWriteError):
        revert(reader, 1)


def test_a_revert_that_fails_halfway_changes_nothing(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(library, "a")
    then = add(library, "b")
    library.retire("a")
    add(library, "c")
    before = library.digest, library.history()
    mark = Catalog._mark

    def full(self: Catalog, numbers: Any, *, retired: bool) -> None:
        if not retired:
            raise LibraryWriteError("the disk is full")
        mark(self, numbers, retired=retired)

    monkeypatch.setattr(Catalog, "_mark", full)
    with pytest.raises(LibraryWriteError):
        revert(library, then)
    assert (library.digest, library.history()) == before
