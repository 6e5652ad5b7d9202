"""What a library does when others write, disks are full and files are damaged."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import pytest
from support.fake_library import (
    HashEncoder,
    StubBundle,
    add,
    buffers,
    create,
    descriptors_of,
    embedding,
)

from recallseg.engines.errors import (
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
    LibraryNotFoundError,
    LibraryVersionError,
    LibraryWriteError,
)
from recallseg.runtime.library import Library, catalog_file
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.catalog_file import Hold


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def test_one_writer_many_readers(library: Library) -> None:
    add(library, 1)
    with pytest.raises(LibraryLockedError, match=r"written by process \d+ on"):
        Library.open(library.path, mode="write")
    reader = Library.open(library.path)
    for change in (lambda: add(reader, 2), lambda: reader.remove("x"), reader.compact):
        with pytest.raises(LibraryWriteError, match="open for reading"):
            change()
    library.close()
    with pytest.raises(LibraryError, match="has been closed"):
        library.get("x")
    library.close()
    with Library.open(library.path, mode="write", encoder=HashEncoder()) as writer:
        add(writer, 2)
    assert len(reader) == 2


def test_not_a_library(tmp_path: Path, library: Library) -> None:
    with pytest.raises(LibraryNotFoundError, match="there is no library"):
        Library.open(tmp_path / "nowhere")
    with pytest.raises(LibraryError, match="there is a library"):
        create(tmp_path / "library2").close() or create(tmp_path / "library2")
    add(library, 1)
    with pytest.raises(LibraryError, match="already: 1 exemplars, made with bundle"):
        create(library.path)  # open elsewhere in this process, and filled
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(LibraryError, match=r"not empty: it holds 'thesis\.tex'"):
        create(tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LibraryError, match="is a file"):
        create(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    sqlite3.connect(other / "library.sqlite").execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(LibraryCorruptError, match="not a RecallSeg library"):
        Library.open(other)
    half = tmp_path / "half"
    half.mkdir()
    (half / "library.sqlite").touch()
    with pytest.raises(LibraryNotFoundError):
        Library.open(half)
    assert len(create(half)) == 0  # an interrupted creation can be repeated


def test_a_newer_format_is_refused(library: Library) -> None:
    library.close()
    connection = sqlite3.connect(library.path / "library.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LibraryVersionError, match=r"format 99.*Update RecallSeg"):
        Library.open(library.path)


def damage(path: Path, offset: int, length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for i in range(offset, offset + length):
        data[i] ^= 0xFF
    path.write_bytes(data)


def test_damage_is_found(library: Library) -> None:
    keys = [add(library, n) for n in range(3)]
    shard = next((library.path / "memories").iterdir())
    damage(shard, 4096 + 320 + 5)
    report = library.verify()
    assert report.problems == (
        f"memory of 'nucleus' of exemplar '{keys[1]}' does not match its digest",
    )
    source = sorted((library.path / "sources").rglob("*.npz"))[2]
    damage(source, 50)
    assert len(library.verify().problems) == 2
    with pytest.raises(LibraryCorruptError, match=f"source of exemplar '{keys[2]}'"):
        library.source(keys[2])
    source.unlink()
    with pytest.raises(LibraryCorruptError, match="No such file"):
        library.source(keys[2])
    library.close()
    shard.write_bytes(shard.read_bytes()[: 4096 + 2 * 320 - 1])
    reader = Library.open(library.path)
    reader.gather(reader.memories(keys[:1], "nucleus"), *buffers(1))
    with pytest.raises(LibraryCorruptError, match="cut off"):
        reader.memories(keys[2:], "nucleus")
    damage(shard, 0)
    with pytest.raises(LibraryCorruptError, match="not a shard"):
        Library.open(library.path).memories(keys[:1], "nucleus")
    damage(shard, 0)
    damage(shard, 8)
    with pytest.raises(LibraryVersionError, match="shard format"):
        Library.open(library.path).memories(keys[:1], "nucleus")


def test_a_damaged_catalog_is_found(library: Library) -> None:
    for n in range(40):
        add(library, n)
    library.close()
    catalog = library.path / "library.sqlite"
    whole = catalog.read_bytes()
    catalog.write_bytes(b"not a database" + whole[14:])
    with pytest.raises(LibraryCorruptError, match="damaged"):
        Library.open(library.path)
    catalog.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LibraryCorruptError):
        Library.open(library.path).verify()
    catalog.write_bytes(whole)
    connection = sqlite3.connect(catalog)
    connection.execute("UPDATE exemplars SET content = 'x' WHERE id = 7")
    connection.execute("DELETE FROM memories WHERE exemplar = 8")
    connection.commit()
    connection.close()
    problems = Library.open(library.path).verify().problems
    assert len(problems) == 2
    assert "content or tags" in problems[0]
    assert "0 memories of 1" in problems[1]


def run(code: str, path: Path) -> str:
    """Run a script, with a library's path and as an ordinary user if we are root."""
    script = f"""
import os, resource, sys
sys.path[:0] = {[*sys.path, str(Path(__file__).parents[3])]!r}
import numpy as np
from recallseg.engines.errors import *
from recallseg.runtime.library import Library
from support.fake_library import *
path = {str(path)!r}
def add(library, n, **options):
    return library.add(draw(n, 64, 64)[0], {{"nucleus": draw(n, 64, 64)[1]}}, key=str(n), **options)
{code}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_loses_nothing(library: Library) -> None:
    keys = [add(library, n) for n in range(3)]
    library.close()
    out = run(
        """
library = Library.open(path, mode="write", encoder=HashEncoder())
refused, known = 0, {e.key for e in library}
for limit in range(0, 300_000, 3000):  # the limit hits every file in turn
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        add(library, 1000 + limit)
    except LibraryWriteError as error:
        refused += 1
        assert "full" in str(error) or "I/O" in str(error), error
    else:
        known.add(str(1000 + limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {e.key for e in library} == known
assert library.verify().ok, library.verify()
add(library, 5)
sources = sum(len(files) for _, _, files in os.walk(path + "/sources"))
assert sources == len(library), (sources, len(library))
print(refused, len(library))
""",
        library.path,
    )
    refused, stored = map(int, out.split())
    assert refused > 40
    assert stored > 14
    reader = Library.open(library.path)
    assert reader.verify().ok
    assert all(key in reader for key in keys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=640k", "none", str(disk)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode != 0
    ):
        pytest.skip("this user may not mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x")
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


def test_a_disk_that_really_fills_up(small_disk: Path) -> None:
    keys = []
    with create(small_disk / "library") as library:
        refused = []
        for n in range(60):
            try:
                keys.append(add(library, n))
            except LibraryWriteError as error:
                refused.append(str(error))
        assert len(refused) > 5
        assert all("full" in message for message in refused)
        assert [e.key for e in library] == keys
        assert library.verify().ok
        fill(small_disk / "rest")
        library.remove(keys.pop(3))  # removing must be possible on a full disk
        fill(small_disk / "rest")
    with Library.open(small_disk / "library", mode="write", encoder=HashEncoder()) as library:
        library.remove(keys.pop(3))
        (small_disk / "rest").unlink()
        keys.append(add(library, 3))
    with Library.open(small_disk / "library") as reader:
        assert [e.key for e in reader] == keys
        assert reader.verify().ok
    assert len(keys) > 5


def test_a_folder_that_cannot_be_written(library: Library) -> None:
    key = add(library, 1)
    library.close()
    for item in [library.path, *library.path.rglob("*")]:
        item.chmod(0o555 if item.is_dir() else 0o444)
    seen = [parent for parent in library.path.parents if parent.stat().st_uid == os.getuid()]
    for parent in seen:
        parent.chmod(parent.stat().st_mode | 0o055)
    try:
        out = run(
            """
warm = Library.open(path)  # imports what an ordinary user may not read here
warm.verify()
warm.search(HashEncoder().encode(draw(1)[0], {}).embedding, "nucleus", 1)
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
reader = Library.open(path)
assert reader.verify().ok and len(reader) == 1
assert reader.search(HashEncoder().encode(draw(1)[0], {}).embedding, "nucleus", 1)[0].key in reader
for call in (
    lambda: Library.open(path, mode="write"),
    lambda: Library.create(path + "/below", StubBundle(), encoder=HashEncoder()),
):
    try:
        call()
    except LibraryWriteError as error:
        assert "permission" in str(error), error
        print("refused")
""",
            library.path,
        )
    finally:
        for item in [library.path, *library.path.rglob("*")]:
            item.chmod(0o755)
    assert out == "refused\nrefused\n"
    assert key in Library.open(library.path)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_cannot_be_seen(library: Library) -> None:
    library.close()
    library.path.parent.chmod(0o700)
    out = run(
        """
Library.open(path).verify()  # imports what an ordinary user may not read here
os.setgid(65534); os.setuid(65534)
try:
    Library.open(path)
except LibraryError as error:
    assert path in str(error), error
    print("told")
""",
        library.path,
    )
    assert out == "told\n"


def test_threads_may_share_a_library(library: Library) -> None:
    from concurrent.futures import ThreadPoolExecutor

    reader = Library.open(library.path)
    add(library, 0, key="0")

    def read(n: int) -> None:
        found = reader.recall(embedding(0), ["nucleus"], 1).found["nucleus"]
        reader.gather([*found.memories.values()], *buffers(1))

    with ThreadPoolExecutor(4) as pool:
        readings = pool.map(read, range(200))
        for n in range(1, 15):
            add(library, n, key=str(n))
        list(readings)
    assert len(reader) == 15


def test_a_second_look_gives_up_no_lock(library: Library) -> None:
    """Closing a descriptor of a file drops the process's POSIX locks on it, SQLite's too."""
    add(library, 1)
    catalog = library.path / "library.sqlite"
    attempt = (
        "import sqlite3, sys; one = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None);"
        "one.execute('BEGIN IMMEDIATE')"
    )
    database = library._store.catalog.database
    with database.transaction():
        database.execute("UPDATE state SET revision = revision")
        for _ in range(3):
            Library.open(library.path).close()
            with pytest.raises(LibraryError):
                Library.create(library.path, StubBundle(), encoder=HashEncoder())
        other = subprocess.run(
            [sys.executable, "-c", attempt, catalog], capture_output=True, text=True, check=False
        )
        assert "database is locked" in other.stderr
    before = descriptors_of(library.path / "library.sqlite")
    for _ in range(3):
        Library.open(library.path).close()
    assert descriptors_of(library.path / "library.sqlite") == before
    library.close()
    assert descriptors_of(library.path / "library.sqlite") == 0


def test_the_garbage_collector_may_close_a_library_wherever_another_is_opened(
    tmp_path: Path,
) -> None:
    """It runs on the thread that is at work, which may have the guard of all holds."""
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(100))

    def opened_with_a_collection_at(step: int, garbage: Path) -> int:
        """Open the first file, and let a hold of ``garbage`` go at that line; return all lines."""
        dropped, lines = Hold(garbage), 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != catalog_file.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == step:
                    dropped.give_back()
            return trace

        sys.settrace(trace)
        try:
            hold = Hold(files[0])
        finally:
            sys.settrace(None)
        if lines < step:
            dropped.give_back()
        assert hold.header() == bytes(100)
        assert descriptors_of(files[0]) == 1
        hold.give_back()
        assert [descriptors_of(file) for file in files] == [0, 0]
        return lines

    def every_line() -> None:
        for garbage in files:
            step, lines = 1, 1
            while step <= lines:
                lines = opened_with_a_collection_at(step, garbage)
                done.append(lines)
                step += 1

    done: list[int] = []
    thread = Thread(target=every_line, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), f"it waits for itself after {len(done)} of them"
    assert len(done) > 20


def test_whatever_read_of_a_catalog_fails_names_it_and_gives_its_hold_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with create(tmp_path / "library"):
        pass
    catalog, real, failing = tmp_path / "library" / "library.sqlite", os.pread, [0]

    def pread(*arguments: Any) -> bytes:
        failing[0] -= 1
        if not failing[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    for number in (1, 2):
        failing[0] = number
        with suppress(LibraryError):
            Library.open(tmp_path / "library").close()
        assert descriptors_of(catalog) == 0
    failing[0] = 1
    with pytest.raises(LibraryError, match="library"):
        Library.open(tmp_path / "library")


@pytest.mark.parametrize("what", ["rename_structure", "remove", "retire"])
def test_what_was_committed_is_not_done_again_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    # The journal was deleted, which is the commit, and the folder could not be synced.
    with create(tmp_path / "library") as library:
        add(library, 1)
        add(library, 2)
        (structure,), key = library.structures, next(iter(library)).key
        given = (structure, "membrane") if what == "rename_structure" else (key,)
        calls, real = [], getattr(Catalog, what)

        def failing(*arguments: Any, **options: Any) -> None:
            calls.append(real(*arguments, **options))
            raise LibraryWriteError("disk I/O error")

        monkeypatch.setattr(Catalog, what, failing)
        with pytest.raises(LibraryWriteError, match="disk I/O error"):
            getattr(library, what)(*given)
        assert len(calls) == 1
    with Library.open(tmp_path / "library", mode="write", encoder=HashEncoder()) as found:
        assert found.verify().ok
        renamed = what == "rename_structure"
        assert found.structures == (("membrane",) if renamed else (structure,))
        assert len(found) == (2 if renamed else 1)
