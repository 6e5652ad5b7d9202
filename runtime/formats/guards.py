"""Limits that keep a hostile or damaged file from taking the machine with it."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.limits import describe_bytes, max_bytes
from recallseg.engines.machine_fault import SHORT_OF_MEMORY, machine_fault
from recallseg.runtime.formats.packed import HEAD_BYTES, packing

__all__ = [
    "BoundedReader",
    "check_finite",
    "check_given",
    "check_length",
    "check_size",
    "expand",
    "of_file",
]

_STEP = 2**20
_MOST_PACKED = 2**22  # bytes of a gzip file beside twice what they unpack to


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Say of which file an InputError is, unless it does."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def check_given(path: Path, error: BaseException) -> None:
    """Refuse to call a file damaged that the machine did not give.

    Raises
    ------
    InputError
        If ``error`` is of the disk or of memory, see
        :func:`recallseg.engines.machine_fault.machine_fault`, which it causes.
    """
    number = machine_fault(error)
    if number == SHORT_OF_MEMORY:
        raise InputError(f"{path} needs more memory than there is.") from error
    if number:
        raise InputError(
            f"{path} cannot be read: {os.strerror(number)}. The file may be as it should: see to "
            "the machine, and try again."
        ) from error


def check_size(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return the bytes that an array declared by a file will take.

    Raises
    ------
    InputError
        If an axis is not positive, or all of it is more than ``limits.max_bytes()``.
    """
    if not shape or any(size <= 0 for size in shape):
        raise InputError(f"{path} declares the size {tuple(shape)}: it is empty or damaged.")
    count = math.prod(int(size) for size in shape) * dtype.itemsize
    if count > (most := max_bytes()):
        raise InputError(
            f"{path} declares {count / 2**30:.1f} GiB of pixels; at most {describe_bytes(most)} "
            "are read. Crop or split it."
        )
    return count


def check_length(path: Path) -> None:
    """Refuse a file that is longer than what it may become, before any of it is read: InputError.

    A file of holes takes no room on the disk, and all of it in memory. OSError as it comes.
    """
    size, most = path.stat().st_size, max_bytes()
    if size > most:
        raise InputError(
            f"{path} has {size} bytes; at most {describe_bytes(most)} are read. Crop or split it."
        )


def expand(data: bytes, encoding: str, wanted: int, path: Path) -> bytes:
    """Decompress ``gzip`` or ``bz2`` data to exactly ``wanted`` bytes, and never to more.

    Raises
    ------
    InputError
        If it is damaged, cut off, or holds another number of bytes.
    """
    engine: Any = zlib.decompressobj(wbits=47) if encoding == "gzip" else bz2.BZ2Decompressor()
    parts: list[bytes] = []
    have = 0
    try:
        while have <= wanted and not engine.eof:
            part = engine.decompress(data, max_length=min(_STEP, wanted + 1 - have) or 1)
            data = engine.unconsumed_tail if encoding == "gzip" else b""
            if not part and not data:
                break
            parts.append(part)
            have += len(part)
    except (zlib.error, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be decompressed: {error}. Export it again.") from error
    if have != wanted:
        if inner := packing(b"".join(parts)[:HEAD_BYTES]):
            raise InputError(
                f"{path} holds pixels that are packed twice, inside with {inner.name}. Export it "
                "again."
            )
        relation = "more" if have > wanted else "less"
        raise InputError(
            f"{path} holds {relation} pixels than the {wanted} bytes that its header states: it is "
            "cut off or damaged. Export or copy it again."
        )
    return b"".join(parts)


class BoundedReader(io.RawIOBase):
    """A gzip file whose content is read up to ``limits.max_bytes()``, headers and gaps included.

    Raises
    ------
    InputError
        When more is read or skipped, or where it goes on and on and unpacks to little.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = path.open("rb")
        self._taken = self._position = 0
        self._file = gzip.GzipFile(fileobj=cast(Any, _Source(self._take, self._rewind)))
        self._most = max_bytes()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        self._check(self._position)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a compressed file has no known end")
        self._check(offset)
        if offset < self._position:
            self._position = self._file.seek(0)
        while self._position < offset and self._next(offset - self._position):
            pass
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        self._packed.close()
        super().close()

    def _next(self, size: int) -> bytes:
        data = self._file.read(min(size, _STEP))
        self._position += len(data)
        return data

    def _take(self, size: int) -> bytes:
        data = self._packed.read(size)
        self._taken += len(data)
        if self._taken > 2 * self._position + _MOST_PACKED:
            raise InputError(
                f"{self._path} has {self._taken} packed bytes that unpack to next to nothing: it "
                "is made to take long."
            )
        return data

    def _rewind(self, offset: int) -> int:
        self._taken = 0
        return self._packed.seek(offset)

    def _check(self, position: int) -> None:
        if position > self._most:
            raise InputError(
                f"{self._path} expands to more than {describe_bytes(self._most)}. Crop or split it."
            )


class _Source(NamedTuple):
    """What gzip asks of the file that it unpacks."""

    read: Callable[[int], bytes]
    seek: Callable[[int], int]


def check_finite(path: Path, array: NDArray[Any]) -> None:
    """Refuse NaN and infinite voxels.

    Raises
    ------
    InputError
        Saying how many there are.
    """
    if np.issubdtype(array.dtype, np.floating):
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            raise InputError(
                f"{path} has {wrong} NaN or infinite voxels of {array.size}. Replace them by what "
                "lies around the patient, e.g. with numpy.nan_to_num."
            )
