"""Small libraries that operations begin with, and what such a library holds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support.fake_library import HashEncoder, StubBundle, draw, embedding

from faults.operation import Operation
from recallseg.engines.errors import LibraryNotFoundError
from recallseg.runtime.library import Library

__all__ = ["exemplar", "library_state", "on_library", "state_of", "stub_library", "writing"]


def exemplar(number: int) -> dict[str, Any]:
    image, mask = draw(number)
    masks = {"nucleus": mask, "wall": ~mask} if number % 2 else {"nucleus": mask}
    return {"image": image, "masks": masks, "tags": {"n": str(number)}, "key": f"case {number}"}


def stub_library(root: Path, exemplars: int = 4) -> None:
    with Library.create(root / "library", StubBundle(), encoder=HashEncoder()) as library:
        for number in range(exemplars):
            library.add(**exemplar(number))


@contextlib.contextmanager
def writing(root: Path) -> Iterator[Library]:
    with Library.open(root / "library", mode="write", encoder=HashEncoder()) as library:
        yield library


def library_state(root: Path) -> Any:
    """Everything that the library below a folder holds, read anew; None where there is none."""
    return state_of(root / "library")


def state_of(folder: Path) -> Any:
    try:
        opened = Library.open(folder, encoder=HashEncoder())
    except LibraryNotFoundError:
        return None
    with opened as library:
        # What an operation that failed has left is deleted by the next one; names() looks then.
        problems = [one for one in library.verify().problems if "is deleted when" not in one]
        if problems:
            raise AssertionError(f"verify found: {problems}")
        found = {}
        for one in library:
            image, masks = library.source(one.key)
            parts = [np.asarray(image).tobytes(), *(masks[name].tobytes() for name in masks)]
            for name in one.structures:
                (memory,) = library.memories([one.key], name)
                parts.append(memory.digest)
            digest = hashlib.sha256(b"".join(parts)).hexdigest()
            found[one.key] = (one.structures, one.absent, tuple(sorted(one.tags.items())), digest)
        asked = embedding(0)
        for name in library.structures:
            hits = {hit.key for hit in library.search(asked, name, k=100) if not hit.absent}
            there = {key for key, value in found.items() if name in value[0]}
            if hits != there:
                raise AssertionError(f"search finds {sorted(hits)}, there are {sorted(there)}")
    return found


def on_library(
    name: str,
    act: Callable[[Library], Any],
    prepare: Callable[[Path], None] | None = None,
) -> Operation:
    def run(root: Path) -> None:
        with writing(root) as library:
            act(library)

    return Operation(f"library.{name}", prepare or stub_library, run, library_state)
