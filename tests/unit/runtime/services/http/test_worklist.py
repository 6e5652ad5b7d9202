"""The worklist: what is there, in which order, and what was done with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.annotating import disc, fill
from support.services import wait_until

from recallseg.runtime.library import Library
from recallseg.runtime.services.http.limits import RefusedError
from recallseg.runtime.services.http.worklist import LOOK_S, Worklist


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library.create(tmp_path / "library", "demo", threads=1) as made:
        fill(made, 2)
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):  # like the library
        cv2.imwrite(str(folder / f"disc-{seed}.png"), disc(52 + seed, 62, 20, 40 + seed)[0])
    for seed in range(3):  # of another kind
        stripes = (np.indices((120, 140)).sum(0) // (9 + seed) % 2 * 200).astype(np.uint8)
        cv2.imwrite(str(folder / f"stripes-{seed}.png"), stripes)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "link.png").symlink_to("/etc/passwd")
    return folder


def test_the_newest_first_or_what_would_teach_most(library: Library, folder: Path) -> None:
    worklist = Worklist(folder, library)
    try:
        newest = worklist.entries("newest")
        assert "link.png" not in {one.name for one in newest}
        assert {one.teaches for one in worklist.entries("teaching")} == {None}
        worklist.start()
        wait_until(
            lambda: sum(one.teaches is not None for one in worklist.entries("teaching")) == 6
        )
        order = worklist.entries("teaching")
        assert order[0].name.startswith("stripes")
        assert order[0].teaches > 0.3
        assert [one.name for one in order if one.trouble] == ["broken.png"]
        worklist.settle(order[0].mark, "accepted")
        assert worklist.entries("teaching")[-1].name == order[0].name
        assert worklist.entries("newest")[-1].state == "accepted"
    finally:
        worklist.close()


def test_an_image_that_went_is_none_of_the_list(library: Library, folder: Path) -> None:
    worklist = Worklist(folder, library)
    try:
        entry = next(one for one in worklist.entries("newest") if one.name == "disc-0.png")
        volume, name = worklist.open(entry.mark)
        assert (volume.shape, name) == ((1, 120, 140), "disc-0.png")
        (folder / "disc-0.png").unlink()
        time.sleep(LOOK_S)
        with pytest.raises(RefusedError, match="no such image"):
            worklist.open(entry.mark)
    finally:
        worklist.close()
