"""An archive on one machine: each output once, whatever is lost; what is left out is named."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import fsspec
import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dicom_series import write_series
from support.inside import HereCrew, HereDecoder
from support.pictures import disc
from support.records import check_record
from support.ungiven import ungiven

from recallseg import Bundle, Library
from recallseg.engines.errors import EngineRunError, InputError, OutputError
from recallseg.runtime.services import decoding
from recallseg.runtime.services.archive import (
    Archived,
    Progress,
    crews,
    objects,
    running,
    segment_archive,
    summary,
    worker,
)
from recallseg.runtime.services.archive.journal import JOURNAL, Journal, Task
from recallseg.runtime.services.archive.sources import Source, list_sources
from recallseg.runtime.services.archive.worker import AuditFiles, Done, Failed, Setup, Worker
from recallseg.runtime.services.audit import verify_audit_log
from recallseg.runtime.services.decoding import IsolatedDecoder
from recallseg.runtime.volumes.outputs import VolumeSettings

ASKING: dict[str, Any] = {"engine": "fake", "k": 1, "threads": 1}


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "library"
    with Library.create(folder, fake_bundle, engine="fake") as made:
        for position in (0.0, 1.0):
            example = disc(position)
            made.add(example.image, example.masks)
    return folder


def write_archive(folder: Path) -> None:
    """Pictures, a volume, and a series; a mask and a text that are no images."""
    (folder / "a").mkdir(parents=True)
    for n in range(3):
        cv2.imwrite(str(folder / "a" / f"{n}.png"), disc(0.2 + 0.1 * n).image)
    cv2.imwrite(str(folder / "a" / "0.mask.png"), np.zeros((64, 64), np.uint8))
    stack = np.stack([disc(0.3 + 0.1 * i).image for i in range(3)], axis=-1).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stack, np.diag([1.0, 2.0, 3.0, 1.0])), folder / "scan.nii.gz")
    write_series(folder / "series", np.moveaxis(stack, -1, 0).astype(np.uint16))
    (folder / "notes.txt").write_text("not an image")


def outputs(folder: Path) -> dict[str, int]:
    """Every file of results, and when it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.startswith(".recallseg")
        and path.parent != folder.parent
        and path.suffix not in (".parquet", ".csv")
    }


@pytest.fixture(scope="module")
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder() as made:
        yield made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, decoder: IsolatedDecoder) -> None:
    monkeypatch.setattr(running, "_crew", lambda setup, *_: HereCrew(setup))
    monkeypatch.setattr(worker, "IsolatedDecoder", lambda: decoder)


def archived(library: Path, inputs: list[Any], out: Path, **more: Any) -> Archived:
    return segment_archive(library, inputs, out, **{"workers": 1, **ASKING, **more})


def test_everything_is_segmented_once_and_stands_in_the_table(
    library: Path, tmp_path: Path
) -> None:
    write_archive(tmp_path / "in")
    out, log = tmp_path / "out", tmp_path / "audit.jsonl"
    told: list[Progress] = []
    done = archived(
        *(library, [tmp_path / "in"], out),
        audit=AuditFiles(log),
        progress=told.append,
    )
    assert (done.complete, done.failed, done.rows) == (True, 0, 7)
    assert (done.progress.done, done.progress.passed_over, done.progress.looking) == (5, 2, False)
    assert told[-1] == done.progress
    assert verify_audit_log(log).entries == 5
    rows = {row["input"].split("/")[-1]: row for row in pq.read_table(done.summary).to_pylist()}
    assert rows["notes.txt"]["reason"] == "of no format that is read"
    assert rows["0.mask.png"]["outcome"] == "passed over"
    scan = rows["scan.nii.gz"]
    record = json.loads((out / scan["record"]).read_text())
    check_record(record)
    for name in ("disc", "core"):
        assert scan[f"{name} voxels"] == record["voxels"][name]
        assert scan[f"{name} ml"] == pytest.approx(record["voxels"][name] * 6e-3, abs=1e-3)
    assert (scan["provenance"], scan["quality"], scan["slices"]) == (
        *(done.provenance, "uncalibrated", 3),
    )
    assert rows["0.png"]["disc ml"] is None
    made = [row for row in rows.values() if row["outcome"] == "done"]
    assert len(made) == 5
    assert all((out / row["mask"]).is_file() for row in made if row["mask"])
    (series,) = (row for row in made if row["format"] == "dicom")
    assert series["record"].startswith("series/MR-")

    before = outputs(out)
    again = archived(library, [tmp_path / "in"], out)
    assert (again.progress.done, again.progress.before) == (5, 5)
    assert outputs(out) == before
    assert pq.read_table(again.summary).equals(pq.read_table(done.summary))
    (out / "a" / "1.json").unlink()  # killed between the mask and its record
    (out / "a" / "2.mask.png").unlink()
    mended = archived(library, [tmp_path / "in"], out, summary=tmp_path / "all.csv")
    assert (mended.progress.done, mended.progress.before) == (5, 3)
    assert {*outputs(out)} == {*before}
    with (tmp_path / "all.csv").open() as stream:
        assert [row["record"] for row in csv.DictReader(stream) if row["record"]] == sorted(
            row["record"] for row in made
        )


def opened() -> set[str]:
    """Return the files that this process has open."""
    listed = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return {os.readlink(path) for path in listed if os.path.lexists(path)}


@pytest.mark.usefixtures("here")
def test_a_journal_that_is_gone_costs_nothing(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    archived(library, [tmp_path / "in"], tmp_path / "out")
    before = outputs(tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    journal.write_bytes(b"not a journal of anything" * 100)
    with pytest.raises(InputError, match="is no journal") as raised:
        archived(library, [tmp_path / "in"], tmp_path / "out")
    assert str(journal) not in opened(), raised
    journal.unlink()
    with closing(sqlite3.connect(journal)) as newer:
        newer.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="has format 99") as raised:
        archived(library, [tmp_path / "in"], tmp_path / "out")
    assert str(journal) not in opened(), raised
    journal.unlink()
    assert archived(library, [tmp_path / "in"], tmp_path / "out").progress.before == 5
    assert outputs(tmp_path / "out") == before


@pytest.mark.usefixtures("here")
def test_other_settings_and_another_library_are_refused(
    library: Path, fake_bundle: Bundle, tmp_path: Path
) -> None:
    write_archive(tmp_path / "in")
    archived(library, [tmp_path / "in"], tmp_path / "out")
    before = outputs(tmp_path / "out")
    with pytest.raises(InputError, match="other settings or another state"):
        archived(library, [tmp_path / "in"], tmp_path / "out", k=2)
    assert outputs(tmp_path / "out") == before
    cv2.imwrite(str(tmp_path / "in" / "a" / "0.png"), disc(0.9).image)
    done = archived(library, [tmp_path / "in"], tmp_path / "out")
    assert "is of another image" in done.set_aside[str(tmp_path / "in" / "a" / "0.png")]
    assert outputs(tmp_path / "out") == before


@pytest.mark.usefixtures("here")
def test_a_damaged_input_is_set_aside_with_its_reason(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    bad = tmp_path / "in" / "a" / "bad.png"
    bad.write_bytes((tmp_path / "in" / "a" / "0.png").read_bytes()[:60])
    done = archived(library, [tmp_path / "in"], tmp_path / "out")
    assert [*done.set_aside] == [str(bad)]
    assert (done.progress.done, done.progress.set_aside) == (5, 1)
    row = next(r for r in pq.read_table(done.summary).to_pylist() if r["input"] == str(bad))
    assert (row["outcome"], row["reason"]) == ("set aside", done.set_aside[str(bad)])
    again = archived(library, [tmp_path / "in"], tmp_path / "out")
    assert (again.progress.before, again.progress.set_aside) == (5, 1)
    cv2.imwrite(str(bad), disc(0.4).image)  # another file now
    assert archived(library, [tmp_path / "in"], tmp_path / "out").failed == 0


KILLER = """
import os, signal
from recallseg.runtime.services.archive import worker
real = worker.segment_item
def segment_item(segmenter, item, *rest, **more):
    if item.name == "poison.png":
        with open(os.environ["POISON_LOG"], "a") as log:
            log.write("begun\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if item.name == "raises.png":
        raise ZeroDivisionError("of a defect")
    return real(segmenter, item, *rest, **more)
worker.segment_item = segment_item
"""


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers, wherever they start, that one picture kills and another makes raise."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("POISON_LOG", str(tmp_path / "begun"))
    folder = tmp_path / "in"
    write_archive(folder)
    for name in ("poison", "raises"):
        cv2.imwrite(str(folder / "a" / f"{name}.png"), disc(0.5).image)
    return folder


def test_what_ends_its_worker_is_set_aside_after_bounded_attempts(
    library: Path, poisoned: Path, tmp_path: Path
) -> None:
    done = archived(library, [poisoned], tmp_path / "out", attempts=2)
    reasons = {Path(name).name: why for name, why in done.set_aside.items()}
    assert reasons == {
        "poison.png": "it ended the process that segmented it (SIGKILL) (2 attempts)",
        "raises.png": "defect: ZeroDivisionError: of a defect (2 attempts)",
    }
    assert (done.progress.done, done.progress.set_aside) == (5, 2)
    assert (tmp_path / "begun").read_text().count("begun") == 2
    again = archived(library, [poisoned], tmp_path / "out", attempts=2)
    assert (again.progress.before, again.progress.set_aside) == (5, 2)
    assert (tmp_path / "begun").read_text().count("begun") == 2
    archived(library, [poisoned], tmp_path / "out", attempts=1, retry=True)
    assert (tmp_path / "begun").read_text().count("begun") == 3


@pytest.mark.usefixtures("here")
def test_workers_that_cannot_start_end_it(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    with pytest.raises(InputError, match="lung"):
        archived(library, [tmp_path / "in"], tmp_path / "out", structures=["lung"])
    assert not [*(tmp_path / "out").glob("*.json")]


def test_a_worker_that_ended_before_it_was_told_anything_is_a_worker_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a BrokenPipeError, of which the command line says nothing: it stands for its reader."""

    class Gone(subprocess.Popen[bytes]):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(["false"])
            self.wait()

    monkeypatch.setattr(crews.subprocess, "Popen", Gone)
    setup = Setup(tmp_path, tmp_path, {}, VolumeSettings())
    with closing(crews.Processes(setup, 1, 60.0)) as crew:
        for _ in range(crews.MOST_STARTS - 1):
            assert crew.wait(5.0) == []
        with pytest.raises(EngineRunError, match=r"ended one after the other.*status 1"):
            crew.wait(5.0)


def test_a_killed_call_is_gone_on_with(library: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for n in range(40):
        cv2.imwrite(str(folder / f"{n:02}.png"), disc(n / 40).image)
    command = [sys.executable, "-m", "recallseg", "archive", str(library), str(folder)]
    command += ["--output", str(out), "--engine", "fake", "--k", "1", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len([*out.glob("*.json")]) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    done = archived(library, [folder], out)
    assert (done.progress.done, done.failed) == (40, 0)
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    assert len(after) == len([*out.glob("*.mask.png")]) == 40
    assert after.items() >= {k: v for k, v in before.items() if k in after}.items()
    assert not [*out.glob("*.tmp")]


@pytest.mark.usefixtures("here")
def test_it_stops_when_it_is_told_to(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    count = 0

    def stop() -> bool:
        nonlocal count
        count = len([*(tmp_path / "out").rglob("*.json")])
        return count >= 1

    done = archived(library, [tmp_path / "in"], tmp_path / "out", stop=stop)
    assert not done.complete
    assert 1 <= done.progress.done < 5
    assert archived(library, [tmp_path / "in"], tmp_path / "out", attempts=1).progress.done == 5


@pytest.mark.usefixtures("here")
def test_patterns_and_tables_name_their_outputs(library: Path, tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write_archive(tmp_path / "in" / patient)
    done = archived(library, [tmp_path / "in" / "p*" / "a"], tmp_path / "out")
    assert (tmp_path / "out" / "p2" / "a" / "1.json").is_file()
    assert done.progress.done == 6
    table = tmp_path / "in" / "list.csv"
    table.write_text("path,name\np1/scan.nii.gz,\np2/scan.nii.gz,second\np3/none.png,\n,\n")
    done = archived(library, [table], tmp_path / "out2")
    assert done.progress.done == 2
    assert (tmp_path / "out2" / "p1" / "scan.json").is_file()
    assert (tmp_path / "out2" / "second" / "scan.json").is_file()
    assert [*done.set_aside.values()] == [
        "list.csv, row 4: the path is empty.",
        "list.csv, row 3: there is no p3/none.png.",
    ]
    pq.write_table(pa.table({"path": ["p1/a", None]}), tmp_path / "in" / "list.parquet")
    done = archived(library, [tmp_path / "in" / "list.parquet"], tmp_path / "out3")
    assert (done.progress.done, done.progress.refused) == (3, 1)
    assert (tmp_path / "out3" / "p1" / "a" / "1.json").is_file()


def test_slices_that_a_pattern_names_one_by_one_are_one_series(tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    (nowhere,) = list_sources(["x" * 300])  # longer than a file's name may be
    assert nowhere.trouble == f"there is no file or folder {'x' * 300}."
    (source,) = list_sources([tmp_path / "in" / "ser*" / "*.dcm"])
    assert len(source.paths) == 3
    assert source.place == "series"


@pytest.mark.parametrize("pattern", ["*/ct", "*/ct/*.png", "**/*.png", "b/*/*.png"])
def test_a_folder_that_a_pattern_leads_through_is_not_passed_over(
    tmp_path: Path, pattern: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "ct").mkdir(parents=True)
        (tmp_path / name / "ct" / "x.png").touch()
    named = tmp_path / "a" / "ct" / "x.png"
    listed = [named.parent.parent.parent, tmp_path / "b" / "ct"][not pattern.endswith("ct")]
    with ungiven(listed), pytest.raises(InputError, match=f"{listed}.*Input/output error"):
        [*list_sources([tmp_path / pattern])]
    with ungiven(named), pytest.raises(InputError, match=f"{named}.*Input/output error"):
        [*list_sources([named])]


@pytest.mark.usefixtures("here")
def test_two_that_would_get_one_name_are_told_apart(library: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "same.png"), disc(0.5).image)
    done = archived(library, [tmp_path / "x", tmp_path / "y", tmp_path / "x"], tmp_path / "out")
    assert (done.progress.done, done.progress.refused) == (1, 1)
    assert "it would be written where" in next(iter(done.set_aside.values()))


@pytest.mark.usefixtures("here")
def test_what_is_named_twice_is_segmented_once(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    done = archived(library, [tmp_path / "in", tmp_path / "in" / "a"], tmp_path / "out")
    assert (done.progress.done, done.progress.refused) == (5, 3)
    assert "under another name" in next(iter(done.set_aside.values()))
    assert archived(library, [tmp_path / "in" / "a"], tmp_path / "out").progress.refused == 3


@pytest.mark.usefixtures("here")
def test_parts_of_a_series_in_two_inputs_are_not_taken_for_two(
    library: Path, tmp_path: Path
) -> None:
    write_archive(tmp_path / "in")
    (tmp_path / "in" / "part").mkdir()
    last = sorted((tmp_path / "in" / "series").iterdir())[-1]
    last.rename(tmp_path / "in" / "part" / last.name)
    done = archived(library, [tmp_path / "in" / "series", tmp_path / "in" / "part"], tmp_path / "o")
    assert (done.progress.done, done.progress.refused) == (1, 1)
    assert "the same series" in next(iter(done.set_aside.values()))
    whole = archived(library, [tmp_path / "in"], tmp_path / "whole")
    assert (whole.progress.done, whole.progress.refused) == (5, 0)


@pytest.mark.usefixtures("here")
def test_an_object_store_is_read(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    url = f"file://{tmp_path}/in"  # another store of fsspec's; what it gives is fetched
    done = archived(library, [f"{url}/*"], tmp_path / "out")
    here = archived(library, [tmp_path / "in"], tmp_path / "here")
    assert (done.progress.done, done.progress.passed_over) == (3, 2)  # two folders, and files
    assert not done.set_aside
    named = {r["record"] for r in pq.read_table(done.summary).to_pylist() if r["record"]}
    assert named == {r["record"] for r in pq.read_table(here.summary).to_pylist() if r["record"]}
    for row in pq.read_table(done.summary).to_pylist():
        assert row["input"].startswith("file://")
    before = outputs(tmp_path / "out")
    assert archived(library, [f"{url}/*"], tmp_path / "out").progress.before == 3
    assert outputs(tmp_path / "out") == before
    (tmp_path / "in" / "a" / "bad.png").write_bytes(b"nothing")
    cv2.imwrite(str(tmp_path / "in" / "a" / "new.png"), disc(0.6).image)
    more = archived(library, [f"{url}/*"], tmp_path / "out")
    assert (more.progress.done, more.progress.before, more.progress.refused) == (3, 2, 1)
    assert [*more.set_aside] == [f"{url}/a/bad.png"]
    assert {*outputs(tmp_path / "out")} - {*before} == {"a/new.json", "a/new.mask.png"}
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/../x.png", b"")
    with pytest.raises(InputError, match="nothing matches"):
        archived(library, ["memory://nothing/*"], tmp_path / "out4")


@pytest.mark.usefixtures("here")
def test_room_that_this_machine_lacks_is_no_fault_of_an_object(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/room/x.png", cv2.imencode(".png", disc(0.5).image)[1].tobytes())
    source = Source("memory://room/x.png", ("memory://room/x.png",))
    setup = Setup(library, tmp_path / "out", {"engine": "fake", "k": 1}, VolumeSettings())
    done = Worker(setup)
    done.open()
    with monkeypatch.context() as patched:  # others take it just now
        usage = shutil.disk_usage(tmp_path)._replace(free=3)
        patched.setattr(objects.shutil, "disk_usage", lambda _: usage)
        answer = done.do(Task(1, Path("x"), source, 0))
        assert isinstance(answer, Failed)
        assert answer.again, answer.why

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "get_file", full)
        answer = done.do(Task(1, Path("x"), source, 0))
        assert isinstance(answer, Failed)
        assert answer.all, answer.why  # it ends, and sets nothing aside
    assert isinstance(done.do(Task(1, Path("x"), source, 0)), Done)


@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_said_before_the_work(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    out = tmp_path / "out"
    for inputs, told in (
        ([], "nothing was named"),
        ([tmp_path / "nowhere"], "there is no file or folder"),
        ([tmp_path / "in" / "*.gif"], "nothing matches"),
        ([tmp_path / "in", tmp_path], "lie in each other"),
    ):
        with pytest.raises(InputError, match=told):
            archived(library, inputs, out)
    (tmp_path / "t.csv").write_text("file\na.png\n")
    with pytest.raises(InputError, match="no column 'path'; it has 'file'"):
        archived(library, [tmp_path / "t.csv"], out)
    with pytest.raises(InputError, match="a summary is a table"):
        archived(library, [tmp_path / "in"], out, summary="all.xlsx")
    assert not out.exists()
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(InputError, match="there is no image"):
        archived(library, [tmp_path / "in" / "empty"], out)


@pytest.mark.parametrize(("times", "why"), [(1, ""), (9, "3 attempts")])
@pytest.mark.usefixtures("here")
def test_what_the_disk_did_not_give_is_asked_for_again(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, why: str
) -> None:
    """An error of the disk says nothing of the image, which would be set aside at once."""
    write_archive(tmp_path / "in")
    given, failed = decoding._answer, []

    def answer(question: Any) -> Any:
        name = "" if isinstance(question, Path) else question.item.path.name
        if name == "1.png" and len(failed) < times:
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return given(question)

    monkeypatch.setattr(decoding, "_answer", answer)
    monkeypatch.setattr(worker, "IsolatedDecoder", HereDecoder)
    done = archived(library, [tmp_path / "in" / "a"], tmp_path / "out")
    assert len(failed) == min(times, 3)
    assert (done.progress.done, done.failed) == ((2, 1) if why else (3, 0))
    assert why in str(done.set_aside)


@pytest.mark.parametrize("name", ["summary.parquet", "summary.csv"])
@pytest.mark.usefixtures("here")
def test_a_summary_is_whole_where_the_system_writes_less_than_it_was_asked_to(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_archive(tmp_path / "in")
    real = os.fdopen

    def slow(descriptor: int, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        if "w" not in mode:
            return real(descriptor, mode, buffering, **more)

        class Short(io.FileIO):
            def write(self, data: Any) -> int:
                return super().write(bytes(data)[: max(1, len(data) // 2)])

        raw = Short(descriptor, mode)
        return raw if buffering == 0 else io.BufferedWriter(raw)

    monkeypatch.setattr(os, "fdopen", slow)
    done = archived(library, [tmp_path / "in"], tmp_path / "out", summary=tmp_path / name)
    if name.endswith(".csv"):
        with done.summary.open(newline="") as file:
            assert len([*csv.DictReader(file)]) == done.rows == 7
    else:
        assert pq.read_table(done.summary).num_rows == done.rows == 7


@pytest.mark.usefixtures("here")
def test_a_library_that_changes_meanwhile_ends_it(fake_bundle: Bundle, tmp_path: Path) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as made:
        made.add(disc(0.0).image, disc(0.0).masks)
        write_archive(tmp_path / "in")
        setup = Setup(tmp_path / "library", tmp_path / "out", ASKING, VolumeSettings())
        worker = Worker(setup)
        worker.open()
        looked = worker.do(Source("in", (str(tmp_path / "in" / "a"),)))
        first, second, *_ = looked.found.items  # type: ignore[union-attr]
        assert isinstance(worker.do(Task(1, first.relative, first, 0)), Done)
        made.add(disc(1.0).image, disc(1.0).masks)
        answer = worker.do(Task(2, second.relative, second, 0))
        assert isinstance(answer, Failed)
        assert answer.all
        assert "was changed while" in answer.why
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"0.json", "0.mask.png"}


def test_a_journal_needs_no_memory_for_what_waits(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with (
        closing(sqlite3.connect(tmp_path / JOURNAL, timeout=0)) as other,
        pytest.raises(sqlite3.OperationalError),
    ):
        other.execute("DELETE FROM inputs")
    journal.close()


@pytest.mark.parametrize("run", ["", "x", "1.5", "-1", "9" * 40, "\u0663"])
def test_a_damaged_number_of_a_run_is_told(tmp_path: Path, run: str) -> None:
    Journal(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / JOURNAL)) as base:
        base.execute("UPDATE about SET value = ? WHERE name = 'run'", (run or b"\xff",))
        base.commit()
    with pytest.raises(InputError, match=r"no journal of an archive, or damaged.*Remove it"):
        Journal(tmp_path)


def test_damaged_rows_of_a_journal_are_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for text in ("no JSON", "[]", "{}", '{"item": 1}'):
        journal._base.execute(
            "INSERT OR REPLACE INTO inputs VALUES (1, x'00', '', 'a', ?, ?, 0, 0, '')",
            (text, journal._run),
        )
        with pytest.raises(InputError, match=r"no journal of an archive, or damaged: input 1"):
            journal.begin(())
    journal._base.execute("UPDATE inputs SET state = 1")
    for row, place in (("no JSON", '"a"'), ("[1]", '"a"'), ("{}", "no JSON")):
        journal._base.execute("INSERT OR REPLACE INTO outputs VALUES (1, ?, ?)", (place, row))
        with pytest.raises(InputError, match="or damaged: an output of 'a'"):
            list(journal.outputs())
        journal._base.execute("DELETE FROM outputs")
    journal.close()


def test_a_journal_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal._base.execute("DROP TABLE inputs")
    journal._base.execute("DROP TABLE passed")
    for read in (
        lambda: journal.begin(()),
        lambda: [*journal.outputs()],
        lambda: [*journal.aside()],
        lambda: [*journal.passed(refused=True)],
    ):
        with pytest.raises(OutputError, match="sqlite cannot be read: no such table"):
            read()
    journal.close()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("at", ["_prepare", "commit"])
def test_what_cannot_be_written_keeps_no_other_call_out(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """In one process: a connection that nobody closed held the journal, and the folder's lock."""
    write_archive(tmp_path / "in")
    real = getattr(Journal, at)

    def full(self: Journal) -> None:
        real(self)
        raise OutputError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, at, full)
        with pytest.raises(OutputError, match="No space left") as kept:
            archived(library, [tmp_path / "in" / "a"], tmp_path / "out")
    assert archived(library, [tmp_path / "in" / "a"], tmp_path / "out").progress.done == 3
    del kept


def test_the_command_answers(library: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "in")
    command = [sys.executable, "-m", "recallseg", "archive", str(library), str(tmp_path / "in")]
    command += ["--output", str(tmp_path / "out"), "--engine", "fake", "--k", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["done"], answer["rows"], answer["complete"]) == (5, 7, True)
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG")
    done = subprocess.run(command[:-1], capture_output=True, text=True)
    assert done.returncode == 1
    assert "5 done (5 before), 1 set aside" in done.stdout
    assert "not segmented" in done.stderr


def test_a_name_that_is_no_text_stands_in_every_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"input": "in/\udcff.png", "outcome": "done"}]
    for write, suffix in ((summary._write_csv, "csv"), (summary._write_parquet, "parquet")):
        assert write(tmp_path / f"t.{suffix}", iter(rows), []) == 1
    assert pq.read_table(tmp_path / "t.parquet")["input"].to_pylist() == ["in/\\udcff.png"]
    assert "in/\\udcff.png" in (tmp_path / "t.csv").read_text(encoding="utf-8")


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    names = ("=cmd|'C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\n=1", "\uff1d1+1", "a\x1b[2J")
    rows: list[dict[str, Any]] = [
        {"input": name, "reason": name, "seconds": -1.5} for name in names
    ]
    summary._write_csv(tmp_path / "t.csv", iter(rows), names[:-1])
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as stream:
        table = [*csv.reader(stream)]
    assert len(table) == 1 + len(names)
    texts = [cell for row in table for cell in row if cell not in ("", "-1.5")]
    assert not [text for text in texts if text[0] in "=+-@\t\r\n\uff1d"]
    assert not [text for text in texts if "\x1b" in text]
