"""What replaces something on the disk leaves the old until the new stands, whatever happens."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from support.ungiven import ungiven

from recallseg.engines import durable
from recallseg.engines.durable import (
    create_file,
    creating,
    make_folder,
    replace_file,
    replace_folder,
)
from recallseg.engines.inside import make_folder_inside


def fill(folder: Path, text: str) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "file").write_text(text)


def read(folder: Path) -> str:
    return (folder / "below" / "file").read_text()


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    place = tmp_path / "new" / "place"
    for text in ("one", "two"):
        with replace_folder(place) as work:
            fill(work, text)
            if text == "two":
                assert read(place) == "one"
        assert read(place) == text
        assert os.listdir(place.parent) == ["place"]
    assert place.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777


def filled(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    with replace_folder(place) as work:
        fill(work, "old")
    return place


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    place = filled(tmp_path)

    def fail() -> None:
        with replace_folder(place) as work:
            fill(work, "new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read(place) == "old"
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("at", range(1, 9))
def test_the_old_stands_whichever_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    place, steps = tmp_path / "place", [0]
    with replace_folder(place) as work:
        fill(work, "old")

    def failing(call):  # type: ignore[no-untyped-def]
        def step(*args, **options):  # type: ignore[no-untyped-def]
            steps[0] += 1
            if steps[0] == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(Path, "rename", failing(Path.rename))
        try:
            with replace_folder(place) as work:
                fill(work, "new")
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            # Not the last step: that the new one's name is on the disk too.
            assert read(place) == ("new" if at == 6 else "old")
        else:
            assert at > steps[0] == 6
            assert read(place) == "new"
    with replace_folder(place) as work:
        fill(work, "newer")
    assert os.listdir(tmp_path) == ["place"]


def test_remains_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(
    tmp_path: Path,
) -> None:
    code = f"""
import sys, time
from pathlib import Path
from recallseg.engines.durable import replace_folder
with replace_folder(Path({str(tmp_path / "place")!r})) as work:
    (work / "half").touch()
    print("there", flush=True)
    time.sleep(3600)
"""
    killed, living = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    )
    try:
        for process in (killed, living):
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(os.listdir(tmp_path)) == 2
        with replace_folder(tmp_path / "place") as work:
            fill(work, "mine")
        left = [name for name in os.listdir(tmp_path) if name != "place"]
        assert len(left) == 1
        living.terminate()
        living.wait()
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()
    assert read(tmp_path / "place") == "mine"


def test_no_pattern_is_compiled_for_each_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python keeps hundreds of them, and compiling one takes longer than all else here."""
    monkeypatch.setattr(durable.re, "compile", lambda *_: pytest.fail("compiled"))
    (tmp_path / ".7.new-00c0ffee.new-00c0ffee").mkdir()  # of another place
    (tmp_path / ".7.new-00c0ffee").mkdir()
    with replace_folder(tmp_path / "7") as work:
        fill(work, "new")
    assert sorted(os.listdir(tmp_path)) == [".7.new-00c0ffee.new-00c0ffee", "7"]


def test_what_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with replace_folder(place) as work:
        fill(work, "old")
    place.rename(tmp_path / ".place.old-00c0ffee")
    (tmp_path / ".place.new-00c0ffee").mkdir()
    (tmp_path / ".place.new-yours").mkdir()  # no name of ours
    with pytest.raises(ZeroDivisionError), replace_folder(place):
        raise ZeroDivisionError
    assert read(place) == "old"
    assert sorted(os.listdir(tmp_path)) == [".place.new-yours", "place"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replace_folder(tmp_path / "link") as work:
        fill(work, "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == "new"


def test_a_file_system_that_cannot_sync_a_folder_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(durable.os, "fsync", refuse)
    replace_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_file_that_a_killed_process_left_is_removed_and_a_living_one_is_waited_for(
    tmp_path: Path,
) -> None:
    place = tmp_path / "file"
    code = f"""
import os, sys, time
from pathlib import Path
from recallseg.engines import durable
def slow(source, target, replace=os.replace):
    print("there", flush=True)
    sys.stdin.readline()
    replace(source, target)
os.replace = slow
durable.replace_file(Path({str(place)!r}), b"theirs")
"""

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        return process

    process = start()
    process.kill()
    process.communicate()
    assert len(os.listdir(tmp_path)) == 1
    replace_file(place, b"mine")
    assert os.listdir(tmp_path) == ["file"]
    process = start()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replace_file, place, b"last")
        assert not wait([waiting], 0.2).done
        assert place.read_bytes() == b"mine"
        process.communicate(b"\n")
        waiting.result(10)
    assert place.read_bytes() == b"last"
    assert os.listdir(tmp_path) == ["file"]


def test_many_threads_replace_one_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda n: replace_file(place, bytes([n]) * (1000 + n)), range(60))]
    data = place.read_bytes()
    assert data == data[:1] * (1000 + data[0])
    assert os.listdir(tmp_path) == ["file"]


def test_where_nothing_can_be_locked_names_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".file.tmp").write_bytes(b"another's")
    replace_file(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert sorted(os.listdir(tmp_path)) == [".file.tmp", "file"]


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_an_error_of_the_system_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*values: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space") as caught:
        replace_file(tmp_path / "file", b"data")
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_the_names_of_new_folders_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)),
    )
    make_folder(tmp_path / "a" / "b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
    with pytest.raises(OSError, match="x"):
        make_folder_inside(tmp_path, "sources/000000")
    assert not (tmp_path / "sources").exists()  # so that the next one syncs its name


def test_a_file_that_cannot_be_made_in_full_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="key"):
            create_file(path, b"secret", mode=0o600)
    assert not path.exists()
    create_file(path, b"secret", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"secret", 0o600)
    with pytest.raises(FileExistsError):
        create_file(path, b"another")
    assert path.read_bytes() == b"secret"


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
def test_a_process_that_dies_leaves_no_half_of_a_new_file(tmp_path: Path, call: str) -> None:
    path = tmp_path / "key"
    child = os.fork()
    if child == 0:
        done = getattr(os, call)

        def last(*arguments: Any, **options: Any) -> None:
            done(*arguments, **options)
            os._exit(3)

        setattr(os, call, last)
        create_file(path, b"secret", mode=0o600)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert path.exists() == (call == "replace")
    if call != "replace":
        create_file(path, b"secret", mode=0o600)
    assert path.read_bytes() == b"secret"
    assert [*tmp_path.iterdir()] == [path]


def test_of_two_that_create_a_file_the_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    done: list[str] = []

    def second() -> None:
        try:
            with creating(path, b"second"):
                done.append("second was in the block")
        except FileExistsError:
            done.append("refused")

    with creating(path, b"first"):
        other = Thread(target=second)
        other.start()
        other.join(0.2)
        assert not done
    other.join()
    assert done == ["refused"]
    assert path.read_bytes() == b"first"
    with pytest.raises(KeyError), creating(tmp_path / "other", b""):
        raise KeyError
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_could_not_be_looked_at_keeps_nobody_out(tmp_path: Path) -> None:
    place = tmp_path / "place"
    replace_file(place, b"old")
    with ungiven(tmp_path / ".place.tmp"), pytest.raises(OSError, match="Input/output"):
        replace_file(place, b"new")
    assert place.read_bytes() == b"old"
    again = Thread(target=replace_file, args=(place, b"newest"), daemon=True)
    again.start()
    again.join(20)
    assert place.read_bytes() == b"newest"
    assert os.listdir(tmp_path) == ["place"]


def test_a_disk_that_does_not_say_what_is_there_is_not_taken_for_nothing(tmp_path: Path) -> None:
    create_file(tmp_path / "key", b"old")
    with ungiven(tmp_path / "key"), pytest.raises(OSError, match="Input/output"):
        create_file(tmp_path / "key", b"new")
    assert (tmp_path / "key").read_bytes() == b"old"


def test_a_folder_that_cannot_be_listed_is_not_said_to_be_on_the_disk(tmp_path: Path) -> None:
    place = filled(tmp_path)

    def replace() -> None:
        with replace_folder(place) as work:
            fill(work, "new")
            refused.enter_context(ungiven(work / "below"))

    with ExitStack() as refused, pytest.raises(OSError, match="Input/output"):
        replace()
    assert read(place) == "old"


def test_what_was_moved_aside_comes_back_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    with replace_folder(place) as work:
        fill(work, "old")
    monkeypatch.setattr(durable.secrets, "token_hex", lambda count: "0" * 8)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)

    def replace() -> None:
        with ungiven(tmp_path / ".place.old-00000000"), replace_folder(place) as work:
            fill(work, "new")

    with pytest.raises(OSError, match="Input/output"):
        replace()
    assert read(place) == "old"


def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path) -> None:
    """As root, ``--output /dev/null`` would take that away from every process of the machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OSError, match="it is no file, so none is put in its place") as told:
            replace_file(path, b"text")
        assert told.value.filename == str(path)
    with pytest.raises(IsADirectoryError) as told:
        replace_file(tmp_path, b"text")
    assert told.value.filename == str(tmp_path)  # and not a hidden name beside it
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]
