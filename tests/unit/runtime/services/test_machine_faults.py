"""What the machine lacks for a while sets no input aside, and takes no slice from a series."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import numpy as np
import pytest
from support.dicom_series import write_series
from support.inside import HereCrew, HereDecoder
from support.pictures import disc

from recallseg import Bundle, Library, Segmenter, Stream
from recallseg.engines.errors import DeviceMemoryError, HostMemoryError, InputError
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.formats.dicom_headers import NotGiven
from recallseg.runtime.formats.finding import find_in_folder
from recallseg.runtime.services import decoding, patience, watching
from recallseg.runtime.services.archive import running, worker
from recallseg.runtime.services.archive.running import segment_archive
from recallseg.runtime.services.decoding import DecodingLimits, IsolatedDecoder
from recallseg.runtime.services.http import application
from recallseg.runtime.services.patience import MOST_TIMES
from recallseg.runtime.services.watching import Arrival, Watcher

SLICES = 4
LAST = "IM0003.dcm"  # without one in the middle, a series is refused for its gap
SHORT = (MemoryError(), HostMemoryError("too little memory"), DeviceMemoryError("GPU is full"))


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Library:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    example = disc(0.5)
    library.add(example.image, example.masks)
    return library


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    stack = np.stack([disc(0.3 + 0.1 * i).image for i in range(SLICES)]).astype(np.uint16)
    write_series(tmp_path / "in" / "series", stack, shuffle=False)
    cv2.imwrite(str(tmp_path / "in" / "a.png"), disc(0.2).image)
    return tmp_path / "in"


@dataclass
class Disk:
    """How often it does not give a file's header, and how often it was asked for it."""

    fails: int
    asked: int = 0


def not_given(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> Disk:
    given, disk = decoding._answer, Disk(times)

    def answer(question: Any) -> Any:
        if isinstance(question, Path) and question.name == name:
            disk.asked += 1
            if disk.asked <= disk.fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return given(question)

    monkeypatch.setattr(decoding, "_answer", answer)
    monkeypatch.setattr(watching, "IsolatedDecoder", HereDecoder)
    monkeypatch.setattr(worker, "IsolatedDecoder", HereDecoder)
    monkeypatch.setattr(running, "_crew", lambda setup, *_: HereCrew(setup))
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    return disk


def watched(library: Library, inbox: Path, most: int = 100, **settings: Any) -> Iterator[Arrival]:
    segmenter = Segmenter(library, k=1, engine="fake")
    stop = Event()
    with Watcher(segmenter, inbox, inbox.parent / "out", settle_s=0.0, **settings) as watcher:
        for count, arrival in enumerate(watcher.run(stop, once=True, poll_s=0.01), 1):
            yield arrival
            if count == most:
                stop.set()


def told(arrivals: Iterator[Arrival]) -> tuple[list[int], list[str]]:
    """Return of how many files each series was that was segmented, and why what failed did."""
    done: list[int] = []
    failed: list[str] = []
    for arrival in arrivals:
        if arrival.record is None:
            failed.append(str(arrival.error))
        elif "files" in arrival.record:
            done.append(arrival.record["files"])
    return done, failed


def failures(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.error.json")]


def test_a_watched_series_waits_for_a_slice_that_the_disk_did_not_give(
    library: Library, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_given(monkeypatch, LAST, 2)
    done, failed = told(watched(library, inbox))
    assert done == [SLICES], "never with fewer"
    assert any("may lack a slice" in why and LAST in why for why in failed)
    assert all("Input/output error" in why for why in failed)
    assert not failures(inbox.parent / "out")


def test_it_does_not_wait_for_ever(
    library: Library, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = not_given(monkeypatch, LAST, MOST_TIMES + 2)
    done, failed = told(watched(library, inbox))
    assert done == [SLICES - 1, SLICES], "without it at last, and anew when it is given"
    assert disk.asked == MOST_TIMES + 3
    assert sum("may lack a slice" in why for why in failed) < MOST_TIMES
    assert not failures(inbox.parent / "out")


@pytest.mark.parametrize("times", [1, 99])
def test_an_archived_series_is_not_segmented_without_it(
    library: Library, inbox: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    disk = not_given(monkeypatch, LAST, times)
    settings: dict[str, Any] = {"engine": "fake", "k": 1, "workers": 1}
    out = inbox.parent / "out"
    done = segment_archive(library.path, [inbox], out, **settings)
    assert done.progress.done == (2 if times == 1 else 1)
    aside = " ".join(done.set_aside.values())
    assert ("may lack a slice" in aside) == ("Input/output error" in aside) == (times == 99)
    if times == 99:
        disk.fails = 0  # well again: the same call does what is left
        again = segment_archive(library.path, [inbox], out, **settings)
        assert (again.progress.done, dict(again.set_aside)) == (2, {})


def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    library: Library, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_given(monkeypatch, "", 0)
    real, failed = os.scandir, []

    def listed(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "series" and len(failed) < 2:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    settings: dict[str, Any] = {"engine": "fake", "k": 1, "workers": 1}
    done = segment_archive(library.path, [inbox], inbox.parent / "out", **settings)
    assert (done.progress.done, done.failed) == (2, 0)
    failed[:] = []
    done = segment_archive(library.path, [inbox], inbox.parent / "o", attempts=2, **settings)
    assert (done.progress.done, done.failed) == (1, 1)
    assert "Input/output error" in str(done.set_aside)


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("times", [2, 99])
def test_what_found_too_little_memory_is_tried_again_a_few_times(
    library: Library,
    inbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    times: int,
) -> None:
    not_given(monkeypatch, "", 0)
    real, asked = watching.segment_item, list[str]()

    def segment(segmenter: Segmenter, item: Any, *rest: Any, **more: Any) -> Any:
        if item.name == "a.png":
            asked.append(item.name)
            if len(asked) <= times:
                raise error
        return real(segmenter, item, *rest, **more)

    monkeypatch.setattr(watching, "segment_item", segment)
    found = [*watched(library, inbox)]
    assert told(iter(found))[0] == [SLICES], "others go on"
    mine = [arrival for arrival in found if arrival.name == "a.png"]
    assert "tried again" in str(mine[0].error)
    assert "memory" in str(mine[0].error).lower() or "GPU" in str(mine[0].error)
    if times == 2:
        assert [arrival.record is not None for arrival in mine] == [False, False, True]
        assert not failures(inbox.parent / "out")
    else:
        assert len(mine) == MOST_TIMES
        assert f"({MOST_TIMES} attempts)" in str(mine[-1].error)
        assert failures(inbox.parent / "out") == ["a.png.error.json"]
        assert [*watched(library, inbox)] == [], "it is not met again"


def test_a_reader_that_the_system_kills_is_no_fault_of_the_file(
    library: Library, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's SIGKILL where memory is short says nothing of the file that was being read."""
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    real, killed = IsolatedDecoder._started, list[int]()

    def started(decoder: IsolatedDecoder) -> Any:
        link = real(decoder)
        if len(killed) < 2:
            process = decoder._process
            assert process is not None
            process.kill()
            process.wait()
            killed.append(process.pid)
        return link

    monkeypatch.setattr(IsolatedDecoder, "_started", started)
    done, failed = told(watched(library, inbox))
    assert done == [SLICES]
    assert failed
    assert all("too little memory" in why for why in failed)
    assert not failures(inbox.parent / "out")


def test_a_frame_that_finds_too_little_memory_does_not_end_its_stream(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = Segmenter(library, k=1, engine="fake", frames=2)
    real, asked = segmenter.segment, list[int]()

    def segment(*values: Any, **named: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise MemoryError
        return real(*values, **named)

    monkeypatch.setattr(segmenter, "segment", segment)
    frames: list[Any] = []
    with Stream(segmenter, frames.append) as stream:
        for _ in range(2):
            stream.push(disc(0.5).image)
            stream.drain(60)
    assert isinstance(frames[0].error, HostMemoryError)
    assert frames[1].result is not None


def test_a_disk_that_is_slow_is_told_from_a_file_that_hangs(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), disc(0.2).image)
    series = tmp_path / "series"
    stack = np.stack([disc(0.3).image] * 2).astype(np.uint16)
    write_series(series, stack)
    file = next(series.iterdir())
    (item,) = find_in_folder(tmp_path, kind="image").items
    with IsolatedDecoder(DecodingLimits(header_seconds=1.0, seconds=1.0)) as decoder:
        for ask in (lambda: decoder.read(item), lambda: decoder.read_header(file)):
            assert decoder.read_header(tmp_path / "a.png") is None  # the process is there
            assert decoder._process is not None
            os.kill(decoder._process.pid, signal.SIGSTOP)  # it waits, as for a network
            try:
                told = ask()
            except InputError as error:
                assert "the disk is slow" in str(error)  # noqa: PT017
                assert machine_fault(error) == errno.ETIMEDOUT  # noqa: PT017
            else:
                assert isinstance(told, NotGiven)
                assert told.number == errno.ETIMEDOUT
        assert decoder.read_header(tmp_path / "a.png") is None
        (tmp_path / "zeros.dcm").write_bytes(bytes(128) + b"DICM")
        os.truncate(tmp_path / "zeros.dcm", 10**11)  # of holes: work for minutes
        told = decoder.read_header(tmp_path / "zeros.dcm")
        assert isinstance(told, str)
        assert "it is damaged, or made to hang" in told


@pytest.mark.parametrize("fault", [0, errno.EIO, errno.ENOMEM])
def test_serve_says_whose_fault_it_is(fault: int) -> None:
    import asyncio

    error = InputError("a.png cannot be read")
    error.__cause__ = OSError(fault, os.strerror(fault)) if fault else None
    for status in (400, 500):
        answered = asyncio.run(application._answering(status)(None, error))  # type: ignore[arg-type]
        assert answered.status_code == (503 if fault else status)
