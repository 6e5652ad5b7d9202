"""Files and folders that a disk does not let be looked at, though they are there."""

from __future__ import annotations

import errno
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["ungiven"]


class _Entry:
    """An entry of a folder, whose status is asked for anew."""

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.name, self.path = entry.name, entry.path
        self.is_symlink, self.is_dir, self.is_file = entry.is_symlink, entry.is_dir, entry.is_file

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(self.path) if follow_symlinks else os.lstat(self.path)


@contextmanager
def ungiven(*paths: Path) -> Iterator[None]:
    """Let every look at these files, and every listing of these folders, fail with ``EIO``."""
    refused = {str(path) for path in paths}

    def asked(real: Any) -> Any:
        def ask(path: Any = ".", **named: Any) -> Any:
            if not isinstance(path, int) and os.fspath(path) in refused:
                raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
            return real(path, **named)

        return ask

    class Listing(list[_Entry]):
        def __enter__(self) -> Listing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __next__(self) -> _Entry:
            if not self:
                raise StopIteration
            return self.pop(0)

        def close(self) -> None:
            pass

    scan = asked(os.scandir)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "lstat", "listdir"):
            patch.setattr(os, name, asked(getattr(os, name)))
        patch.setattr(os, "scandir", lambda path=".": Listing(map(_Entry, scan(path))))
        # Python 3.10's paths look by what these were when pathlib was imported.
        if kept := getattr(pathlib, "_normal_accessor", None):
            for name in ("stat", "listdir", "scandir"):
                patch.setattr(kept, name, getattr(os, name))
        yield
