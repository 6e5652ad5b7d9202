"""Files of a folder that may come from a stranger: by name, inside of it, and never by a link.

A library or a bundle is passed on like a document. A link in it would lead reads to other people's
files, and writes and deletions to the user's own. So every part of a name is opened from the folder
before it (``openat`` with ``O_NOFOLLOW``), what is read or written is a regular file, and what is
written has no second name. The folder's own path is the user's choice, and may be a link.
Errors of the system name the whole path, though the system is given only parts of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recallseg.engines.ownership import foreign
from recallseg.engines.reading import naming, walk

__all__ = [
    "ForeignFileError",
    "list_inside",
    "make_folder_inside",
    "open_folder_inside",
    "open_inside",
    "others_may_write",
    "read_inside",
    "remove_inside",
    "replace_inside",
    "sync_inside",
]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a FIFO must not wait for its writer
_WRITING = os.O_WRONLY | os.O_RDWR


class ForeignFileError(OSError):
    """A link, a device, a pipe or a file with a second name, where a file of ours should be."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            errno.ELOOP,
            f"{what}. Files of a library or bundle are ordinary files inside its folder: "
            "put the file itself there",
            str(path),
        )


@contextmanager
def open_folder_inside(root: Path, name: str = "") -> Iterator[int]:
    """Open a folder by its name inside ``root`` (``""`` is ``root`` itself), as a descriptor.

    Raises
    ------
    ForeignFileError
        If a part of the name is a link or no folder.
    OSError
        As the system gives it.
    """
    descriptor = os.open(root, _DIRECTORY)
    try:
        for part in _parts(root, name):
            try:
                with naming(root / name, always=True):
                    inner = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise ForeignFileError(
                        root / name, f"'{part}' is a link or no folder"
                    ) from None
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def open_inside(root: Path, name: str, flags: int = os.O_RDONLY, mode: int | None = None) -> int:
    """Open a regular file by its name inside ``root`` and return its descriptor.

    A new file (``O_CREAT``) gets the permissions of ``root``, so that what belongs to one user
    stays that user's, and a library that is shared on purpose stays shared; or those of ``mode``.

    Raises
    ------
    ForeignFileError
        If the file or a folder on the way is a link, it is no regular file, or it is to be written
        and has a second name (hard link).
    OSError
        As the system gives it.
    """
    *folders, last = _parts(root, name or ".")
    with open_folder_inside(root, "/".join(folders)) as parent:
        if mode is None:
            mode = root.stat().st_mode & 0o666 if flags & os.O_CREAT else 0
        try:
            with naming(root / name, always=True):
                descriptor = os.open(last, flags & ~os.O_TRUNC | _FILE, mode, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise ForeignFileError(root / name, "it is a link or no file") from None
            raise
    found = os.fstat(descriptor)
    what = ""
    if not stat.S_ISREG(found.st_mode):
        what = "it is not a file"
    elif flags & _WRITING and found.st_nlink > 1:
        what = f"it has {found.st_nlink} names (hard links)"
    if what:
        os.close(descriptor)
        raise ForeignFileError(root / name, what)
    if flags & os.O_TRUNC:
        try:
            with naming(root / name):
                os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def read_inside(root: Path, name: str, limit: int) -> bytes:
    """Return a file's bytes; OSError (``EFBIG``) if there are more than ``limit``."""
    with os.fdopen(open_inside(root, name), "rb") as file, naming(root / name):
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(
                errno.EFBIG, f"it has {size} bytes; at most {limit} are read", str(root / name)
            )
        return file.read(size)


def replace_inside(root: Path, old: str, new: str) -> None:
    """Give a file another name, in place of what has that name, durably."""
    before, _, source = old.rpartition("/")
    after, _, target = new.rpartition("/")
    with (
        open_folder_inside(root, before) as here,
        open_folder_inside(root, after) as there,
        naming(root / new, always=True),
    ):
        os.replace(source, target, src_dir_fd=here, dst_dir_fd=there)
        os.fsync(there)


def remove_inside(root: Path, name: str) -> None:
    """Remove a file if it is there: a link itself, never what it names."""
    folder, _, last = name.rpartition("/")
    try:
        with open_folder_inside(root, folder) as parent, naming(root / name, always=True):
            os.unlink(last, dir_fd=parent)
    except FileNotFoundError:
        return


def make_folder_inside(root: Path, name: str) -> None:
    """Make a folder with the permissions of ``root``, and those above it, where there is none."""
    mode = root.stat().st_mode & 0o777
    done = ""
    for part in _parts(root, name):
        path = root / done / part
        with open_folder_inside(root, done) as parent, naming(path, always=True):
            try:
                os.mkdir(part, mode, dir_fd=parent)
            except FileExistsError:
                pass
            else:
                try:
                    os.fsync(parent)
                except OSError:
                    os.rmdir(part, dir_fd=parent)  # or nobody would make its name durable later
                    raise
        done = f"{done}/{part}".lstrip("/")
    with open_folder_inside(root, name):
        """What was there is a folder too."""


def list_inside(root: Path, name: str = "") -> list[str]:
    """Return the names in a folder, sorted; none if there is no such folder."""
    try:
        with open_folder_inside(root, name) as descriptor, naming(root / name):
            return sorted(os.listdir(descriptor))
    except FileNotFoundError:
        return []


def sync_inside(root: Path, name: str = "") -> None:
    """Make new, renamed and removed names in a folder survive a power loss."""
    with open_folder_inside(root, name) as descriptor, naming(root / name, always=True):
        os.fsync(descriptor)


def others_may_write(root: Path, name: str = "") -> str:
    """Say why what is in a folder may not be one's own word, as OpenSSH looks at keys.

    Looked at are ``root``, ``name`` in it and all below that: each belongs to this user or to the
    superuser, nobody else can write it, and below ``root`` nothing is a link. What lies in a folder
    that nobody else can enter may have any permissions. What is not there is nobody's.

    Returns
    -------
    str
        The path, what is wrong with it, and the command that mends it; empty if nothing is.

    Raises
    ------
    OSError
        If something cannot be looked at.
    """
    closed = False
    path = root
    for part in ("", *_parts(root, name)):
        path = path / part
        try:
            found = path.lstat() if part else path.stat()
        except FileNotFoundError:
            return ""
        if told := foreign(path, found, closed=closed):
            return told
        closed = closed or not found.st_mode & (stat.S_IXGRP | stat.S_IXOTH)
    if not path.is_dir():
        return ""
    for folder, folders, files in walk(path):
        for entry in (*folders, *files):
            below = Path(folder, entry)
            try:
                told = foreign(below, below.lstat(), closed=closed)
            except FileNotFoundError:  # of another process, and gone again
                continue
            if told:
                return told
    return ""


def _parts(root: Path, name: str) -> list[str]:
    parts = name.split("/") if name else []
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ForeignFileError(root / "...", f"{name!r} leads outside of it")
    return parts
