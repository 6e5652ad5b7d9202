"""Reading files so that an error of the system says which.

A call that names no file, as ``read`` does, fails without the name of any: "Input/output error".
What only asks, as ``os.path.exists`` and ``os.walk`` do, takes every error for a no.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_there", "naming", "read_file", "read_text", "reason", "walk"]

_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What is said of a name that nothing has."""


@contextmanager
def naming(path: Path, *, always: bool = False) -> Iterator[None]:
    """Let an error of the system say which file it is about, where it does not.

    Parameters
    ----------
    always : it is this one, whatever the error says: of calls that are given a part of a name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or always:
            error.filename, error.filename2 = str(path), None
        raise


def read_file(path: Path) -> bytes:
    """Return a file's bytes; OSError as the system gives it, always with the file's name."""
    with naming(path):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """Return a file's text, UTF-8; as :func:`read_file`, and UnicodeDecodeError for other bytes."""
    with naming(path):
        return path.read_text(encoding="utf-8")


def is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link; OSError where the disk does not say.

    For who writes, or looks at what was written here. What a person named for reading is asked by
    :func:`recallseg.runtime.formats.walking.mode_of`, which follows links.
    """
    try:
        os.lstat(path)
    except ValueError:  # no name at all
        return False
    except OSError as error:
        if error.errno in _NOTHING:
            return False
        raise
    return True


def reason(error: Exception) -> str:
    """Return what Python found wrong with something that was read, for a message."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) or type(error).__name__


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, but OSError for a folder that is there and cannot be listed."""

    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            raise error

    return os.walk(folder, onerror=stop)
