"""What a library does when single calls of the system fail, on a copy of which nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.fake_library import HashEncoder, add, create, descriptors_of, embedding
from support.ungiven import ungiven

from recallseg.engines.errors import (
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
    LibraryWriteError,
)
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.library import Library
from recallseg.runtime.library import index as index_module
from recallseg.runtime.library import retrieval as retrieval_module
from recallseg.runtime.library.catalog_file import Hold
from recallseg.runtime.library.storage import WriterLock


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def reopen(library: Library) -> Library:
    library.close()
    return Library.open(library.path, mode="write", encoder=HashEncoder())


@contextmanager
def failing(name: str, number: int, code: int) -> Iterator[list[int]]:
    """Let the n-th call of a function of ``os`` from now on fail; yield how many there were."""
    real, calls = getattr(os, name), [0]

    def call(*values: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(code, os.strerror(code))
        return real(*values, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield calls


def test_a_lock_that_cannot_be_noted_or_taken_is_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    with failing("pwrite", 1, errno.ENOSPC) as calls:
        lock = WriterLock(path)
    assert calls == [1]
    with pytest.raises(LibraryLockedError, match="written by another process"):
        WriterLock(path)
    lock.release()
    before = descriptors_of(path)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(descriptor: int, how: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(LibraryWriteError, match="No locks available"):
            WriterLock(path)
    assert descriptors_of(path) == before
    again = WriterLock(path)
    with pytest.raises(
        LibraryLockedError, match=rf"written by process {os.getpid()} on [^\0\n]+\. W"
    ):
        WriterLock(path)
    again.release()


def test_an_image_that_could_not_be_deleted_is_told_found_and_deleted(library: Library) -> None:
    keys = [add(library, n) for n in range(4)]
    for key in keys[:2]:
        with (
            failing("unlink", 1, errno.EBUSY),
            pytest.raises(LibraryWriteError, match=f"'{key}' is removed, but its image could not"),
        ):
            library.remove(key)
    before = library.digest
    library.remove(keys[2])  # another removal does not make the ones before forgotten
    assert len(library) == 1
    assert library.digest != before
    with Library.open(library.path) as reader:
        assert reader.digest == library.digest
        problems = reader.verify().problems
    assert [("is the image of a removed exemplar" in each) for each in problems] == [True, True]
    assert "000000001.npz" in problems[0]
    assert len([*library.path.rglob("*.npz")]) == 3
    with reopen(library) as library:
        assert library.verify().ok
        assert len([*library.path.rglob("*.npz")]) == 1
        assert keys[3] in library


def test_images_beyond_a_restored_catalog_are_told_and_kept(library: Library) -> None:
    add(library, 0)
    library.close()
    catalog = library.path / "library.sqlite"
    backup = catalog.read_bytes()
    library = reopen(library)
    add(library, 1)
    add(library, 2)
    library.close()
    catalog.write_bytes(backup)
    with reopen(library) as library:
        (problem,) = library.verify().problems
        assert "000000003.npz is an image that the catalog knows nothing of" in problem


CALLS = ("open", "pwrite", "fsync", "replace", "mkdir", "unlink", "ftruncate", "fstat", "listdir")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_every_call_of_the_system_may_fail(library: Library, name: str, code: int) -> None:
    kept = {add(library, 0, key="0"), add(library, 1, key="1")}

    for removing in (False, True):
        for number in range(2, 40):
            if removing and str(number) not in library:
                add(library, number, key=str(number))
            with failing(name, number - 1, code) as calls:
                try:
                    if removing:
                        library.remove(str(number))
                    else:
                        add(library, number, key=str(number))
                except LibraryError as error:
                    assert str(library.path) in str(error)  # noqa: PT017
                    assert f"{os.strerror(code)}. " in str(error)  # noqa: PT017
                    if code == errno.EMFILE:
                        assert "ulimit" in str(error)  # noqa: PT017
            there = {exemplar.key for exemplar in library}
            assert kept <= there
            assert len(library) == len(there)
            if calls[0] < number - 1:
                break
        else:
            raise AssertionError(f"more than {number} calls of {name}")
        library = reopen(library)
        report = library.verify()
        assert report.ok, report
        assert len(library) == len([*library.path.rglob("*.npz")])
    library.close()


def test_too_many_open_files_are_no_damage(library: Library) -> None:
    key = add(library, 0)
    library.close()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = Library.open(library.path)
    calls: list[Callable[[], object]] = [
        lambda: reader.source(key),
        lambda: reader.memories([key], "nucleus"),
        lambda: Library.open(library.path),
        lambda: Library.open(library.path, mode="write"),
    ]
    for call in calls:
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 4096), limits[1]))
        try:
            while True:
                try:
                    held.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            with pytest.raises(LibraryError, match=r"Too many open files\. .*ulimit") as caught:
                call()
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not isinstance(caught.value, LibraryCorruptError)
        assert "again" not in str(caught.value)
    assert reader.verify().ok


@pytest.mark.parametrize("cut", [1, 200])
def test_an_index_that_was_cut_off_is_never_built(
    library: Library, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """USearch reports a failed write, but not that of its last buffer."""
    for module in (index_module, retrieval_module):
        monkeypatch.setattr(module, "EXACT_LIMIT", 20)
    for n in range(60):
        add(library, n, key=str(n))
    library.rebuild_index()
    (index,) = (library.path / "index").iterdir()
    good = index.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) - cut, limits[1]))
    try:
        with pytest.raises(LibraryWriteError, match="cut off"):
            library.rebuild_index()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*(library.path / "index").iterdir()] == [index]
    assert index.read_bytes() == good
    assert library.verify().ok
    assert library.search(embedding(7), "nucleus", 1)[0].key == "7"


def test_files_that_nothing_names_are_found(library: Library) -> None:
    add(library, 0)
    library.compact()
    (library.path / "index").mkdir()
    left = (
        library.path / "index" / "1-present-1-1-1.usearch",
        library.path / "memories" / "000001.shard",
    )
    for path in left:
        path.write_bytes(b"left")
    (library.path / "index" / "mine.txt").touch()
    problems = library.verify().problems
    assert sorted(each.split()[0] for each in problems) == [str(path) for path in left]
    reopen(library).close()
    assert not any(path.exists() for path in left)
    assert Library.open(library.path).verify().ok


@contextmanager
def not_read(path: Path, instead: Path) -> Iterator[Callable[[], None]]:
    """Let reads of a file that this process has open fail, until the block ends or calls it off."""
    kept: dict[int, int] = {}
    other = os.open(instead, os.O_RDONLY if instead.name == "mem" else os.O_WRONLY)

    def call_off() -> None:
        while kept:
            number, former = kept.popitem()
            os.dup2(former, number)
            os.close(former)

    try:
        for name in os.listdir("/proc/self/fd"):
            number = int(name)
            with suppress(OSError):
                if number != other and os.path.samestat(os.fstat(number), path.stat()):
                    kept[number] = os.dup(number)
        for number in kept:
            os.dup2(other, number)
        assert kept
        yield call_off
    finally:
        call_off()
        os.close(other)


NOT_GIVEN = {
    "disk I/O error": "library.sqlite",  # open for writing alone: EBADF
    "Input/output error": "/proc/self/mem",  # which SQLite calls a malformed image
}


@pytest.mark.parametrize("said", NOT_GIVEN)
@pytest.mark.parametrize(
    "ask",
    [
        lambda library: library.recall(embedding(0), ["nucleus"], 1),
        lambda library: next(iter(library)),
        lambda library: library.heads.kept(1),
        lambda library: library.calibrations,
        lambda library: library.verify(),
    ],
    ids=["recall", "list", "kept logits", "calibrations", "verify"],
)
def test_a_catalog_that_the_disk_does_not_give_is_not_damaged(
    library: Library, ask: Callable[[Library], object], said: str
) -> None:
    add(library, 0)
    library.close()
    with Library.open(library.path, encoder=HashEncoder()) as found:
        ask(found)
        catalog = library.path / "library.sqlite"
        with (
            not_read(catalog, library.path / NOT_GIVEN[said]),
            pytest.raises(LibraryError) as told,
        ):
            ask(found)
        assert type(told.value) is LibraryError
        assert f"library.sqlite cannot be read: {said}. The disk does" in str(told.value)
        assert machine_fault(told.value) == errno.EIO
        ask(found)


def test_what_the_disk_gives_when_asked_again_is_not_damaged(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(library, 0)
    with not_read(library.path / "library.sqlite", Path("/proc/self/mem")) as call_off:
        monkeypatch.setattr(Hold, "read_through", lambda _: call_off())
        with pytest.raises(LibraryError, match="Input/output error") as told:
            next(iter(library))
    assert machine_fault(told.value) == errno.EIO
    assert next(iter(library))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_an_image_that_the_disk_does_not_give_is_not_damaged(library: Library, code: int) -> None:
    key = add(library, 0)
    with failing("open", 2, code), pytest.raises(LibraryError, match=os.strerror(code)) as told:
        library.source(key)  # its folder is the first
    assert isinstance(told.value, LibraryCorruptError) is (code == errno.ENOENT)
    assert machine_fault(told.value) == (0 if code == errno.ENOENT else code)


@pytest.mark.parametrize("name", ["", "library.sqlite"])
def test_a_library_that_cannot_be_looked_at_says_so_and_leaves_nothing_open(
    library: Library, name: str
) -> None:
    add(library, 1)
    library.close()
    before = descriptors_of(library.path)
    with (
        ungiven(library.path / name),
        pytest.raises(LibraryError, match=f"{library.path}.*Input/output") as caught,
    ):
        Library.open(library.path, mode="write", encoder=HashEncoder())
    assert not isinstance(caught.value, LibraryCorruptError)
    del caught
    assert descriptors_of(library.path) == before
    with ungiven(library.path / name), pytest.raises(LibraryError, match="Input/output"):
        create(library.path)
