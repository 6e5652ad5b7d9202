"""Lossless copies of exemplars' images and masks, one compressed NumPy archive each.

They make it possible to rebuild a library for another bundle and to look at what was recalled.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.storage import write_durably

__all__ = ["SourceStore", "content_digest"]

FILES_PER_FOLDER = 1000


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
        """Store an exemplar durably, replacing what may lie there, and return the file's SHA-256.

        Raises
        ------
        LibraryWriteError
            If the folder cannot be written.
        """
        names = list(masks)
        arrays: dict[str, Any] = {
            f"mask{i}": np.packbits(masks[name]) for i, name in enumerate(names)
        }
        archive = io.BytesIO()
        np.savez_compressed(archive, image=image, names=np.array(json.dumps(names)), **arrays)
        write_durably(self.file(number), archive.getbuffer())
        return hashlib.sha256(archive.getbuffer()).digest()

    def read(
        self, number: int, digest: bytes, key: str
    ) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]]:
        """Return image and masks as they were added.

        Raises
        ------
        LibraryCorruptError
            If the file is missing or not what was written.
        """
        path = self.file(number)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _corrupt(path, key, error.strerror or str(error)) from error
        if hashlib.sha256(data).digest() != digest:
            raise _corrupt(path, key, "its SHA-256 is not the one recorded")
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                image = archive["image"]
                names = json.loads(str(archive["names"]))
                count = image.shape[0] * image.shape[1]
                masks = {
                    name: np.unpackbits(archive[f"mask{i}"], count=count)
                    .astype(bool)
                    .reshape(image.shape[:2])
                    for i, name in enumerate(names)
                }
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise _corrupt(path, key, str(error)) from error
        return image, masks

    def remove(self, number: int) -> None:
        """Delete an exemplar's source if it is there."""
        self.file(number).unlink(missing_ok=True)
        temporary = self.file(number)
        temporary.with_name(temporary.name + ".tmp").unlink(missing_ok=True)


def _corrupt(path: Path, key: str, why: str) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"the source of exemplar '{key}' ({path}) cannot be used: {why}. Restore the file, or "
        "remove the exemplar and add it again."
    )
