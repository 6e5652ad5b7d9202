"""Tags that the C interface gives with what was recalled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.fake_library import add, create

from recallseg.runtime.services.c_results import Query
from recallseg.runtime.services.scheduling import Scheduling


def test_tags_are_those_of_the_state_that_was_recalled_from(tmp_path: Path) -> None:
    library = create(tmp_path / "library")
    key = add(library, 0, tags={"view": "axial"})
    segmenter: Any = SimpleNamespace(library=library)
    match: Any = SimpleNamespace(key=key)
    former = library.digest
    query = Query(segmenter, Scheduling())
    assert query.tags(match, former) == (("view", "axial"),)
    library.retag(key, {"view": "sagittal"})
    assert query.tags(match, former) == (("view", "axial"),)  # remembered
    assert Query(segmenter, Scheduling()).tags(match, former) == ()  # nobody knows any more
    assert query.tags(match, library.digest) == (("view", "sagittal"),)
    library.remove(key)
    assert query.tags(match, library.digest) == ()
