"""Lossless copies of exemplars' images and masks, one compressed NumPy archive each.

They make it possible to rebuild a library for another bundle and to look at what was recalled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.archives import read_arrays
from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.engines.inside import (
    list_inside,
    make_folder_inside,
    open_inside,
    read_inside,
    remove_inside,
    sync_inside,
)
from recallseg.engines.limits import describe_bytes, max_bytes
from recallseg.runtime.checks import check_image, check_name
from recallseg.runtime.library.storage import unreadable, write_all, writing

__all__ = ["SourceStore", "check_readable", "content_digest"]

FILES_PER_FOLDER = 1000
_MEND = "Restore the file, or remove the exemplar and add it again."
_NAME = re.compile(r"([0-9]{9,})\.npz(\.tmp)?")
_PACKED_MORE, _ENTRY = 1000, 512
"""What cannot be packed takes a thousandth more, and every array its headers."""


def content_digest(
    image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]], absent: tuple[str, ...]
) -> str:
    """Return the SHA-256 of pixels, masks and absent structures, whatever their order, as hex."""
    state = hashlib.sha256()
    described = {
        "image": [list(image.shape), image.dtype.newbyteorder("<").str],
        "masks": sorted(masks),
        "absent": sorted(absent),
    }
    state.update(json.dumps(described, sort_keys=True).encode())
    state.update(np.ascontiguousarray(image, image.dtype.newbyteorder("<")).data)
    for name in sorted(masks):
        state.update(np.packbits(masks[name]).data)
    return state.hexdigest()


def check_readable(image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """Raise InputError for what is too large to be read again, if it were stored."""
    arrays = 2 + len(masks)
    size = image.nbytes + len(masks) * -(-image.shape[0] * image.shape[1] // 8)
    size += 4 * len(json.dumps([*masks]))  # UTF-32, as NumPy has texts
    size += size // _PACKED_MORE + arrays * _ENTRY
    if size > (most := max_bytes()):
        raise InputError(
            f"an image of {image.nbytes} bytes and its masks ({len(masks)}) make a file of {size} "
            f"bytes; at most {describe_bytes(most)} are read again, so it is not stored. Crop it."
        )


class SourceStore:
    """Writes and reads ``sources/NNNNNN/NNNNNNNNN.npz``, by the catalog's exemplar numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, number: int) -> Path:
        """Return the path of an exemplar's source."""
        return self._folder / f"{number // FILES_PER_FOLDER:06d}" / f"{number:09d}.npz"

    def write(
        self, number: int, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]
    ) -> bytes:
        """Store an exemplar, replacing what may lie there, and return the file's SHA-256.

        It survives a power loss after :meth:`sync`. Nothing names the file before a commit does, so
        it is written in its place.

        Raises
        ------
        LibraryWriteError
            If the folder cannot be written.
        """
        names = list(masks)
        arrays: dict[str, Any] = {
            f"mask{i}": np.packbits(masks[name]) for i, name in enumerate(names)
        }
        data = _packed({"image": image, "names": np.array(json.dumps(names)), **arrays})
        root, name = self._folder.parent, self._name(number)
        with writing(self.file(number)):
            make_folder_inside(root, name.rpartition("/")[0])
            remove_inside(root, name)
            descriptor = open_inside(root, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return hashlib.sha256(data).digest()

    def sync(self, numbers: Iterable[int]) -> None:
        """Make the names of files that were written survive a power loss."""
        for number in {number // FILES_PER_FOLDER: number for number in numbers}.values():
            with writing(self.file(number)):
                sync_inside(self._folder.parent, self._name(number).rpartition("/")[0])

    def read(
        self, number: int, digest: bytes, key: str, names: Mapping[str, str]
    ) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]]:
        """Return image and masks as they were added.

        ``names`` are today's of structures that have been renamed since, by those in the file.

        Raises
        ------
        LibraryCorruptError
            If the file is missing or not what was written.
        LibraryError
            If permission, memory or open files lack to read it.
        """
        path = self.file(number)
        try:
            data = read_inside(self._folder.parent, self._name(number), max_bytes())
        except OSError as error:
            what = f"the source of exemplar '{key}' ({path})"
            raise unreadable(what, error, _MEND) from error
        if hashlib.sha256(data).digest() != digest:
            raise _corrupt(path, key, "its SHA-256 is not the one recorded")
        try:
            arrays = read_arrays(data)
            image = check_image(arrays["image"])
            masks = {
                names.get(check_name(name), name): _mask(arrays[f"mask{i}"], image.shape[:2])
                for i, name in enumerate(json.loads(str(arrays["names"])))
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _corrupt(path, key, str(error)) from error
        return image, masks

    def remove(self, number: int) -> None:
        """Delete an exemplar's source if it is there; LibraryWriteError if that cannot be."""
        with writing(self.file(number)):
            for name in (self._name(number), self._name(number) + ".tmp"):
                remove_inside(self._folder.parent, name)

    def stray(self, kept: Callable[[int, int], set[int]]) -> list[int]:
        """Return the numbers of which a file is here, and no exemplar.

        Parameters
        ----------
        kept : returns the exemplars with a source, from a first to a last number.

        Raises
        ------
        LibraryError
            If a folder cannot be listed.
        """
        found: set[int] = set()
        try:
            for folder in list_inside(self._folder.parent, self._folder.name):
                if not (folder.isascii() and folder.isdigit()):
                    continue
                first = int(folder) * FILES_PER_FOLDER
                names = list_inside(self._folder.parent, f"{self._folder.name}/{folder}")
                here = {int(match[1]) for match in map(_NAME.fullmatch, names) if match}
                last = first + FILES_PER_FOLDER - 1
                ours = {n for n in here if first <= n <= last}
                found |= ours - kept(first, last) if ours else set()
        except OSError as error:
            raise unreadable(str(self._folder), error, "Restore it.") from error
        return sorted(found)

    def _name(self, number: int) -> str:
        return self.file(number).relative_to(self._folder.parent).as_posix()


def _packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a NumPy archive. Level 1 takes a third of the time of NumPy's 6, for some 5 % more."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
    # Not a view of it: when one that an error's traceback kept is collected, Python 3.12.1 ends
    # with a segmentation fault, and 3.13 tells of a BufferError.
    return archive.getvalue()


def _mask(packed: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    count = shape[0] * shape[1]
    if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
        raise ValueError(f"a mask of {packed.shape} {packed.dtype} for an image of {shape}")
    return np.unpackbits(packed, count=count).astype(bool).reshape(shape)


def _corrupt(path: Path, key: str, why: str) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"the source of exemplar '{key}' ({path}) cannot be used: {why}. {_MEND}"
    )
