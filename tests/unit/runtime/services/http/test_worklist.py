"""The worklist: what is there, in which order, and what was done with it."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from support.annotating import disc, fill
from support.inside import HereDecoder
from support.services import wait_until

from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.services import decoding, patience
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http import worklist as worklists
from recallseg.runtime.services.http.limits import RefusedError
from recallseg.runtime.services.http.serving import Access, open_server
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
        _, _, item = worklist.open(order[0].mark)
        worklist.put_aside(item)
        assert worklist.entries("teaching")[-1].name == order[0].name
        assert worklist.entries("newest")[-1].state == "rejected"
    finally:
        worklist.close()


def test_what_the_disk_did_not_give_is_asked_for_again(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = decoding._answer, Counter[str]()
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    monkeypatch.setattr(worklists, "LOOK_S", 0.05)

    def answer(question: Any) -> Any:
        name = "" if isinstance(question, Path) else question.item.path.name
        asked[name] += 1
        if name == "disc-0.png" and asked[name] == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if name == "disc-1.png":
            raise MemoryError
        return given(question)

    monkeypatch.setattr(decoding, "_answer", answer)
    monkeypatch.setattr(worklists, "IsolatedDecoder", HereDecoder)
    listed = Worklist(folder, library)
    try:
        listed.start()
        wait_until(lambda: sum(one.teaches is not None for one in listed.entries("teaching")) == 5)
        wait_until(lambda: asked["disc-1.png"] == patience.MOST_TIMES)
        time.sleep(0.3)  # it is not asked for once more
        troubles = {one.name: one.trouble for one in listed.entries("newest") if one.trouble}
        assert sorted(troubles) == ["broken.png", "disc-1.png"]
        assert "memory" in troubles["disc-1.png"]
        assert (asked["disc-0.png"], asked["broken.png"]) == (2, 1)
        assert asked["disc-1.png"] == patience.MOST_TIMES
    finally:
        listed.close()


def test_an_image_that_went_is_none_of_the_list(library: Library, folder: Path) -> None:
    worklist = Worklist(folder, library)
    try:
        entry = next(one for one in worklist.entries("newest") if one.name == "disc-0.png")
        volume, name, _ = worklist.open(entry.mark)
        assert (volume.shape, name) == ((1, 120, 140), "disc-0.png")
        (folder / "disc-0.png").unlink()
        time.sleep(LOOK_S)
        with pytest.raises(RefusedError, match="no such image"):
            worklist.open(entry.mark)
    finally:
        worklist.close()


def test_a_folder_that_was_away_is_looked_into_again(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worklists, "LOOK_S", 0.05)
    monkeypatch.setattr(worklists, "IsolatedDecoder", HereDecoder)
    for path in folder.iterdir():
        if path.name != "disc-0.png":
            path.unlink()
    listed = Worklist(folder, library)

    def ranked() -> list[str]:
        return [one.name for one in listed.entries("teaching") if one.teaches is not None]

    try:
        listed.start()
        wait_until(lambda: ranked() == ["disc-0.png"])
        away = folder.rename(folder.with_name("away"))
        time.sleep(0.5)
        with pytest.raises(InputError, match="there is no folder"):
            listed.entries("newest")
        away.rename(folder)
        cv2.imwrite(str(folder / "disc-0.png"), disc(60, 62, 20, 44)[0])
        cv2.imwrite(str(folder / "disc-9.png"), disc(61, 62, 20, 45)[0])
        wait_until(lambda: sorted(ranked()) == ["disc-0.png", "disc-9.png"])
        wait_until(lambda: len(listed._embeddings) == 2)  # not that of the former disc-0
    finally:
        listed.close()


def test_an_accepted_image_stays_done_whatever_becomes_of_its_mask(library: Library) -> None:
    """Until its exemplar is removed, or out of use: then it is to be done again."""
    trace = library.trace(worklists.ITEM)
    image, mask = disc(60, 62, 20, 40)
    item = {"image": image, "masks": {"disc": mask}}
    (key,) = library.add_many([item], details={worklists.ITEM: "ab" * 32})
    assert trace.look() == {"ab" * 32}
    for _ in range(2):
        library.replace_mask(key, "disc", ~library.source(key)[1]["disc"])
        library.retag(key, {"view": "axial"})
        assert trace.look() == {"ab" * 32}
    library.retire(key)
    assert not trace.look()
    library.reinstate(key)
    library.rename_structure("disc", "other")
    assert trace.look() == {"ab" * 32}
    library.remove(key)
    assert not trace.look()


def test_what_was_done_outlasts_the_server(library: Library, folder: Path, tmp_path: Path) -> None:
    """Accepted, rejected and new images are so after a restart, and a changed one is new."""
    log = tmp_path / "audit.jsonl"

    @contextmanager
    def client() -> Iterator[httpx.Client]:
        access = Access.of(["ada"], "token-of-ada-is-long")
        with open_server(library, AuditLog(log), access, port=0, folder=folder) as server:
            headers = {"Authorization": "Bearer token-of-ada-is-long"}
            with httpx.Client(base_url=f"{server.url}/api", headers=headers, timeout=60) as one:
                yield one

    def states(one: httpx.Client) -> dict[str, str]:
        images = one.get("/worklist").json()["images"]
        return {image["name"]: image["state"] for image in images}

    with client() as one:
        images = one.get("/worklist").json()["images"]
        marks = {image["name"]: image["mark"] for image in images}
        for name, done in (
            ("disc-0.png", "accept"),
            ("disc-1.png", "accept"),
            ("disc-2.png", "reject"),
        ):
            draft = one.post("/drafts", json={"mark": marks[name]}).json()["draft"]
            one.post(f"/drafts/{draft}/propose")
            body = {"structures": ["disc"]} if done == "accept" else {}
            answer = one.post(f"/drafts/{draft}/{done}", json=body)
            assert answer.status_code == 200, answer.text
            one.delete(f"/drafts/{draft}")
        before = states(one)
        (accepted, _) = [change for change in library.history() if change.details]
        library.retire(accepted.exemplars)  # as others may, while it is served
        assert states(one) == {**before, "disc-0.png": "new"}
        library.reinstate(accepted.exemplars)
        assert states(one) == before
    wanted = {"disc-0.png": "accepted", "disc-1.png": "accepted", "disc-2.png": "rejected"}
    assert before == {name: wanted.get(name, "new") for name in before}
    with client() as one:
        assert states(one) == before
        assert one.get("/next", params={"order": "newest"}).json()["image"]["state"] == "new"
    (accepted, other) = [change for change in library.history() if change.details]
    library.retire(accepted.exemplars)  # of which nothing is in use any more
    image = cv2.imread(str(folder / "disc-1.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(folder / "disc-1.png"), image // 2)
    with client() as one:
        after = states(one)
    assert (after["disc-0.png"], after["disc-1.png"], after["disc-2.png"]) == (
        "new",
        "new",
        "rejected",
    )
    assert other.exemplars
    for entry in log.read_text().splitlines():
        assert "disc-" not in entry
