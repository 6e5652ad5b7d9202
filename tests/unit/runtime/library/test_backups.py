"""A copy of a library in use, and what it may replace."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_library import HashEncoder, StubBundle, add, create, draw, embedding
from support.ungiven import ungiven

from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
    LibraryNotFoundError,
    LibraryWriteError,
)
from recallseg.runtime.library import Library, backups


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = create(tmp_path / "library", shard_bytes=4096 + 3 * 320)
    for n in range(8):
        add(library, n, key=str(n))
    library.remove("3")
    library.retire("4")
    return library


def _state(library: Library) -> list[object]:
    keys = [e.key for e in library]
    return [keys, [e.key for e in library.retired], library.digest, library.history()]


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096 + 10 if len(data) > 4106 else -1] ^= 1  # in the first memory of a shard
    file.write_bytes(data)


def _beside(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


@pytest.mark.parametrize("mode", ["write", "read"])
def test_a_backup_is_the_library(library: Library, tmp_path: Path, mode: str) -> None:
    source = library if mode == "write" else Library.open(library.path)
    report = source.backup(tmp_path / "deep" / "copy")
    assert report.ok
    assert report.exemplars == 7
    copy = Library.open(tmp_path / "deep" / "copy", mode="write", encoder=HashEncoder())
    assert _state(copy) == _state(library)
    assert copy.search(embedding(1), "nucleus", 9) == library.search(embedding(1), "nucleus", 9)
    copy.reinstate("4")
    add(copy, 20)
    assert copy.path.stat().st_mode & 0o777 == 0o700
    assert _beside(tmp_path / "deep") == {"copy"}


def test_a_backup_goes_on_while_another_process_writes(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that deletes files happens after the catalog was copied, and before they are."""
    before = _state(library)
    copied: list[int] = []
    once = backups._copy_file

    def meanwhile(*args: Any, **options: Any) -> None:
        if not copied:
            copied.append(1)
            library.remove("0")
            library.compact()
        once(*args, **options)

    monkeypatch.setattr(backups, "_copy_file", meanwhile)
    Library.open(library.path).backup(tmp_path / "copy")
    copy = Library.open(tmp_path / "copy")
    assert _state(copy) == _state(library) != before
    assert copy.verify().problems == ()


def test_additions_meanwhile_are_in_or_not(library: Library, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        n = 100
        while not stop.is_set():
            add(library, n, key=str(n))
            n += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reader = Library.open(library.path)
        for n in range(3):
            reader.backup(tmp_path / f"copy {n}")
    finally:
        stop.set()
        writer.join()
    sizes = [len(Library.open(tmp_path / f"copy {n}")) for n in range(3)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 6


def test_an_unfinished_rebuild_is_not_copied(library: Library, tmp_path: Path) -> None:
    class Stops(HashEncoder):
        left = 3

        def encode(self, *args: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().encode(*args)

    with pytest.raises(KeyboardInterrupt):
        library.rebuild(StubBundle(identity="cd" * 32), encoder=Stops())
    library.backup(tmp_path / "copy")
    copy = Library.open(tmp_path / "copy", mode="write", encoder=HashEncoder())
    assert _state(copy) == _state(library)
    copy.rebuild(StubBundle(identity="cd" * 32), encoder=HashEncoder())
    assert copy.verify().problems == ()


@pytest.mark.parametrize("lost", ["memories", "sources"])
@pytest.mark.parametrize("how", ["missing", "changed"])
def test_of_a_damaged_library_there_is_no_backup(
    library: Library, tmp_path: Path, lost: str, how: str
) -> None:
    file = sorted(item for item in (library.path / lost).rglob("*") if item.is_file())[-1]
    if how == "missing":
        file.unlink()
    else:
        _damage(file)
    with pytest.raises(LibraryCorruptError, match="no copy was made"):
        Library.open(library.path).backup(tmp_path / "copy")
    assert _beside(tmp_path) == {"library"}


def test_where_no_backup_goes(library: Library, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(LibraryError, match="is there already"):
        library.backup(tmp_path / "full")
    with pytest.raises(InputError, match="in the library itself"):
        library.backup(library.path / "copy")
    library.backup(tmp_path / "empty")
    with pytest.raises(LibraryError, match="is there already"):
        library.backup(tmp_path / "empty")


def test_restoring_brings_back_what_was_lost(library: Library, tmp_path: Path) -> None:
    library.backup(tmp_path / "copy")
    before = _state(library)
    library.close()
    (library.path / "library.sqlite").write_bytes(b"damaged")
    with pytest.raises(LibraryError, match="nobody can tell what would be lost"):
        Library.restore(tmp_path / "copy", library.path)
    Library.restore(tmp_path / "copy", library.path, over_newer=True)
    Library.restore(tmp_path / "copy", tmp_path / "new" / "place")
    for path in (library.path, tmp_path / "new" / "place"):
        with Library.open(path, mode="write", encoder=HashEncoder()) as restored:
            assert _state(restored)[:3] == before[:3]
            assert restored.history()[:-1] == before[3]
            assert restored.history()[-1].what == "restore"
            add(restored, 30)
    assert _beside(tmp_path) == {"library", "copy", "new"}
    assert _state(Library.open(tmp_path / "copy")) == before


@pytest.mark.parametrize("since", ["added", "removed", "retagged", "other"])
def test_nothing_newer_is_replaced_unless_told(
    library: Library, tmp_path: Path, since: str
) -> None:
    library.backup(tmp_path / "copy")
    library.close()
    Library.restore(tmp_path / "copy", library.path)  # nothing has changed
    Library.restore(tmp_path / "copy", library.path)
    if since == "other":  # with fewer changes, so its revision is below
        shutil.rmtree(library.path)
        changed = create(library.path)
        add(changed, 99, key="99")
    else:
        changed = Library.open(library.path, mode="write", encoder=HashEncoder())
        if since == "added":
            add(changed, 50, key="50")
        elif since == "removed":
            changed.remove("1")
        else:
            changed.retag("1", {"view": "top"})
    before = _state(changed)
    message = {
        "added": "1 exemplars .*'50'",
        "removed": "is newer than the backup",
        "retagged": "'1'",
        "other": "'99'",
    }
    with pytest.raises(LibraryLockedError):
        Library.restore(tmp_path / "copy", library.path)
    changed.close()
    with pytest.raises(LibraryError, match=message[since]):
        Library.restore(tmp_path / "copy", library.path)
    assert _state(Library.open(library.path)) == before
    Library.restore(tmp_path / "copy", library.path, over_newer=True)
    assert _state(Library.open(library.path))[2] == Library.open(tmp_path / "copy").digest


@pytest.mark.parametrize("other", ["head", "calibration", "group", "retired"])
def test_what_lies_beside_exemplars_is_not_lost_unless_told(
    library: Library, tmp_path: Path, other: str
) -> None:
    """At the same revision: what is not an exemplar's does not count as a change, or is a fork."""
    library.backup(tmp_path / "copy")
    library.close()
    if other == "retired":
        with Library.open(tmp_path / "copy", mode="write", encoder=HashEncoder()) as copy:
            copy.retire("1")
    with Library.open(library.path, mode="write", encoder=HashEncoder()) as changed:
        if other == "head":
            changed.heads._write("heads", 1, {"format_version": 3}, b"")
        elif other == "calibration":
            changed.store_calibrations("ab" * 32, {"nucleus": {"iou": 0.5}}, "7")
        elif other == "group":
            changed.set_group("1", "patient 1")
        else:
            changed.retire("2")
    message = {
        "head": "lost: the head",
        "calibration": "lost: the calibration of 'nucleus' for recipe abababababab",
        "group": "lost: the group of exemplar '1'",
        "retired": "whether exemplar '1' is in use; whether exemplar '2' is in use",
    }
    with pytest.raises(LibraryError, match=message[other]):
        Library.restore(tmp_path / "copy", library.path)
    Library.restore(tmp_path / "copy", library.path, over_newer=True)
    Library.restore(tmp_path / "copy", library.path)  # nothing has changed


def test_what_is_no_backup_or_no_library_stays(library: Library, tmp_path: Path) -> None:
    library.backup(tmp_path / "copy")
    library.close()
    with pytest.raises(LibraryNotFoundError):
        Library.restore(tmp_path / "nothing", library.path)
    with pytest.raises(InputError, match="the library itself"):
        Library.restore(library.path, library.path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(LibraryError, match="no library"):
        Library.restore(tmp_path / "copy", tmp_path / "photos", over_newer=True)
    _damage(next((tmp_path / "copy" / "memories").glob("*")))
    before = _state(Library.open(library.path))
    with pytest.raises(LibraryCorruptError, match="no copy was made"):
        Library.restore(tmp_path / "copy", library.path)
    assert _state(Library.open(library.path)) == before
    assert draw(1)[0].shape == Library.open(library.path).source("1")[0].shape


def test_what_identifies_is_not_copied_and_survives_a_restore(tmp_path: Path) -> None:
    library = create(tmp_path / "library")
    add(library, 1, key="1", tags={"PatientID": "4711"})
    library.backup(tmp_path / "copy")
    assert not [file for file in (tmp_path / "copy").rglob("*") if b"4711" in _bytes(file)]
    library.close()
    Library.restore(tmp_path / "copy", library.path)
    restored = Library.open(library.path)
    assert restored.whois("1").tags == {"PatientID": "4711"}
    assert (library.path / "identifiers.jsonl").stat().st_mode & 0o777 == 0o600


def test_what_identifies_is_not_lost_where_the_disk_does_not_give_it(tmp_path: Path) -> None:
    library = create(tmp_path / "library")
    add(library, 1, key="1", tags={"PatientID": "4711"})
    library.backup(tmp_path / "copy")
    library.close()
    with (
        ungiven(library.path / "identifiers.jsonl"),
        pytest.raises(LibraryWriteError, match="Input/output"),
    ):
        Library.restore(tmp_path / "copy", library.path)
    assert Library.open(library.path).whois("1").tags == {"PatientID": "4711"}


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def test_what_the_disk_does_not_give_is_not_told_as_a_backup_that_cannot_be_written(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads of the backup's folder looks at the wrong disk."""

    class Broken(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(descriptor: int, mode: str) -> Any:
        return os.fdopen(descriptor, mode) if mode == "wb" else Broken(descriptor)

    monkeypatch.setattr(backups, "os", SimpleNamespace(**{**vars(os), "fdopen": opened}))
    with pytest.raises(LibraryError, match=r"library/memories/000001\.shard cannot be read: Inp"):
        library.backup(tmp_path / "copy")
    assert _beside(tmp_path) == {"library"}


def test_a_backup_that_finds_no_room_is_not_told_as_the_library(
    library: Library, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (8192, 100_000):  # within the catalog, and in the first shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(
                LibraryWriteError, match=r"cannot write .*/\.?copy[^/]*(/library|:)"
            ):
                library.backup(tmp_path / "copy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert _beside(tmp_path) == {"library"}
    assert library.verify().ok
