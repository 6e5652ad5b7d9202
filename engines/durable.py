"""Files and folders that are there in full or not at all, also after a crash.

Everything that replaces something on the disk does it here: what was there stays until the new
stands, and a process that dies leaves at most a hidden file or folder beside it, which the next one
that replaces the same removes. Errors of the system name the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from recallseg.engines.reading import is_there, naming, walk

__all__ = [
    "create_file",
    "creating",
    "make_folder",
    "replace_file",
    "replace_folder",
    "replacing",
    "sync_folder",
    "write_file",
]

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What file systems say that cannot sync a folder: some of those on a network."""
_REMAINS = re.compile(r"\.(.+)\.(new|old)-([0-9a-f]{8})", re.DOTALL)
"""One for all names: Python keeps each pattern that it compiles."""


def write_file(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a new file and wait until the disk has it; OSError as the system gives it.

    ``mode`` are its permissions, less the user's mask.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, mode)
    try:
        with naming(path):
            _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def create_file(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a file that is not there yet, in full or not at all; OSError as the system gives it.

    ``FileExistsError`` if there is one, or anything else of that name.
    """
    with creating(path, data, mode=mode):
        pass


@contextmanager
def creating(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> Iterator[None]:
    """Write a file as :func:`create_file` does, which is at ``path`` when the block ends.

    One process after the other is in the block. If it raises, nothing is at ``path``.
    """

    def check() -> None:
        if is_there(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    with _becoming(path, mode, check) as descriptor:
        check()
        _write(descriptor, data)
        yield
    try:
        sync_folder(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Replace ``path``: a reader sees all old bytes or all new ones; OSError as the system does."""
    with replacing(path, mode=mode) as descriptor:
        _write(descriptor, data)


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[int]:
    """Yield the descriptor of a new file to write, which takes the place of ``path`` at the end.

    If the block raises, what was there stays; OSError as the system gives it, and for what is no
    file: a device (``/dev/null``) would be none any more, for every process.
    """
    with suppress(FileNotFoundError):
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is no file, so none is put in its place", str(path))
    with _becoming(path, mode) as descriptor:
        yield descriptor
    sync_folder(path.parent)


@contextmanager
def _becoming(path: Path, mode: int, check: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Yield the descriptor of a file that gets the name ``path``, if ``check`` does not raise."""
    with naming(path, always=True):
        temporary, descriptor = _claim(path.with_name(f".{path.name}.tmp"), mode)
    try:
        with naming(path):
            yield descriptor
            os.fsync(descriptor)
            check()
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # still locked: it is nobody else's
        raise
    finally:
        os.close(descriptor)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path`` to fill, which takes its place when the block ends.

    What was at ``path`` is moved aside only when the new one is on the disk, comes back if that
    cannot take its place, and is deleted last. If the block raises, nothing has changed. What
    processes that died have left of this is removed before; a folder that one of them had moved
    aside comes back.

    Raises
    ------
    OSError
        As the system gives it; what was at ``path`` is there then.
    """
    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    token = secrets.token_hex(4)
    work, before = (path.with_name(f".{path.name}.{kind}-{token}") for kind in ("new", "old"))
    with ExitStack() as stack:
        with _locked(path.parent):  # or another would remove the new one, not yet locked
            _remove_remains(path)
            work.mkdir()
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            stack.callback(os.close, _lock(work))
        yield work
        _sync_tree(work)
        with suppress(FileNotFoundError):
            path.rename(before)
        try:
            work.rename(path)
        except BaseException:
            with suppress(FileNotFoundError):
                before.rename(path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(before, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make new, renamed and removed names in ``folder`` survive a power loss, where that is known.

    OSError as the system gives it, but not where the file system has no such thing.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make a folder, and those above it, whose names survive a power loss; there may be one.

    OSError as the system gives it. ``mode`` are the permissions of ``path``, less the user's mask.
    """
    missing = []
    place = path.absolute()
    while not place.is_dir():
        missing.append(place)
        place = place.parent
    for place in reversed(missing):
        try:
            place.mkdir(mode if place is missing[0] else 0o777)
        except FileExistsError as error:
            if not place.is_dir():
                what = os.strerror(errno.ENOTDIR)
                raise NotADirectoryError(errno.ENOTDIR, what, str(place)) from error
        with suppress(PermissionError):  # a folder above that others may only pass through
            sync_folder(place.parent)


def _claim(temporary: Path, mode: int) -> tuple[Path, int]:
    """Make and lock a new file; return its path and descriptor.

    What a process that died has left there goes; one that lives is waited for. Where nothing can be
    locked, as on some file systems of a network, it gets a name that no other process uses.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    while True:
        try:
            descriptor, left = os.open(temporary, new, mode), False
        except FileExistsError:
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                continue
            left = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            if not left:
                temporary.unlink(missing_ok=True)
            other = temporary.with_name(f"{temporary.stem}.{secrets.token_hex(4)}.tmp")
            return other, os.open(other, new, mode)
        claimed = False
        try:
            # Else it took its place, or was removed, while it was waited for.
            if _is_at(descriptor, temporary):
                if left:
                    temporary.unlink(missing_ok=True)
                claimed = not left
        finally:
            if not claimed:
                os.close(descriptor)  # whatever was said: locked, it would keep this process out
        if claimed:
            return temporary, descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view, offset = memoryview(data).cast("B"), 0
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    _write(descriptor, data)
    os.fsync(descriptor)


def _sync_tree(folder: Path) -> None:
    for place, _, names in walk(folder):
        for name in names:
            descriptor = os.open(Path(place, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                with naming(Path(place, name)):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(place))


def _lock(folder: Path) -> int:
    """Lock a folder for this process, and return a descriptor that keeps it locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # some file systems on a network lock no folders: nor is one removed
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _remove_remains(path: Path) -> None:
    """Remove what processes that died left beside ``path``; bring back what they moved aside."""
    for name in sorted(os.listdir(path.parent), reverse=True):  # the old, if it is needed, first
        found = _REMAINS.fullmatch(name)
        if found is None or found[1] != path.name:
            continue
        if _is_locked(path.with_name(f".{path.name}.new-{found[3]}")):
            continue
        if found[2] == "old" and not is_there(path):
            path.with_name(name).rename(path)
        else:
            shutil.rmtree(path.with_name(name), ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    """Whether a process that lives is filling ``folder``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # no folder of ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
