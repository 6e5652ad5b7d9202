"""Objects of a store are files while they are segmented: fetched, looked into, and let go."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.archive.sources import Source, open_store

__all__ = ["Fetched", "fetched"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Fetched:
    """The files of a source, as they lie on this machine for a while.

    Attributes
    ----------
    source : the same source on this machine.
    """

    def __init__(self, source: Source, folder: Path, keys: dict[Path, str]) -> None:
        one = len(source.paths) == 1 and len(keys) == 1 and next(iter(keys)).parent == folder
        named = one or len(source.paths) > 1
        paths = tuple(map(str, sorted(keys))) if named else (str(folder),)
        self.source = replace(source, paths=paths)
        self._remote, self._folder, self._keys = source.named, folder, keys

    def signed(self, item: Item) -> Item:
        """Return an item whose signature is of the objects, not of the files made of them."""
        keys = sorted(self._keys[file] for file in item.files)
        digest = hashlib.sha256("\n".join(keys).encode()).digest()
        key = int.from_bytes(digest[:7], "big")
        return replace(item, signature=(item.signature[0], item.signature[1], key))

    def named(self, text: str) -> str:
        """Return a message that speaks of the objects, not of the files made of them."""
        return text.replace(str(self._folder), self._remote.rstrip("/"))


@contextmanager
def fetched(source: Source) -> Iterator[Fetched]:
    """Fetch what a source names; it goes when the block ends.

    Raises
    ------
    InputError
        If there is nothing, it cannot be read, has names that lead elsewhere, or needs more room
        than there is, now.
    OSError
        If this machine's disk does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="recallseg-archive-") as name:
        folder = Path(name).resolve()
        keys: dict[Path, str] = {}
        for url in source.paths:
            store, path = open_store(url)
            try:
                wanted = list(_files(store, path))
            except Exception as error:  # of whatever store it is
                raise InputError(f"{url} cannot be read: {_told(error)}") from error
            if not wanted:
                raise InputError(f"there is nothing at {url}.")
            _check_room(folder, url, sum(size for _, _, size in wanted))
            for remote, relative, _ in wanted:
                local = folder.joinpath(*_parts(url, relative))
                try:
                    local.parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(remote, str(local))
                    keys[local] = str(store.ukey(remote))
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in _NO_ROOM:  # on this machine
                        raise
                    raise InputError(f"{url}: {relative} cannot be read: {_told(error)}") from error
        yield Fetched(source, folder, keys)


def _files(store: Any, path: str) -> Iterator[tuple[str, str, int]]:
    """Yield objects: where each is, its path below what was named, and its bytes."""
    if not store.isdir(path):
        about = store.info(path)
        yield path, PurePosixPath(path).name, int(about.get("size") or 0)
        return
    root = path.rstrip("/") + "/"
    for name, about in sorted(store.find(path, detail=True).items()):
        if name.startswith(root) and name != root:
            yield name, name[len(root) :], int(about.get("size") or 0)


def _parts(url: str, relative: str) -> tuple[str, ...]:
    parts = tuple(relative.split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise InputError(f"{url} holds an object {relative!r}, which is no path of a file.")
    return parts


def _check_room(folder: Path, url: str, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{url} has {size / 1e6:.0f} MB, and {folder.parent} {free / 1e6:.0f} MB left. Name "
            "parts of it by a pattern, or give TMPDIR on a larger disk."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # others may take it just now


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(error)}"
