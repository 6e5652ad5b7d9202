"""NumPy archives (.npz) that may come from a stranger: read within a limit, and nothing executed.

A zip entry says how many bytes it unpacks to, an array how many it takes; both are compared with
the limit and with each other before anything is unpacked.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.limits import describe_bytes, max_bytes
from recallseg.engines.reading import reason

__all__ = ["MOST_ARRAYS", "read_arrays"]

MOST_ARRAYS = 4096
_LISTED = b"PK\x01\x02"  # begins an entry of the list
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, IndexError, TypeError),
    # NumPy reads an array's header with tokenize and ast.literal_eval.
    *(SyntaxError, tokenize.TokenError, RecursionError, OverflowError, NotImplementedError),
    RuntimeError,
)


def read_arrays(data: bytes, limit: int | None = None) -> dict[str, NDArray[Any]]:
    """Return every array of an archive by name.

    Parameters
    ----------
    data : the file.
    limit : most bytes that all arrays together may take; by default ``limits.max_bytes()``.

    Raises
    ------
    ValueError
        If it is no such archive, is damaged, holds Python objects, or would take more.
    """
    most = max_bytes() if limit is None else limit
    try:
        if data.count(_LISTED) > MOST_ARRAYS:  # each takes much more memory than the file
            raise ValueError(f"it lists more than {MOST_ARRAYS} arrays")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > most:
                raise ValueError(
                    f"it unpacks to {total} bytes; at most {describe_bytes(most)} are read"
                )
            arrays = {}
            for entry in entries:
                if entry.compress_type not in _METHODS or entry.flag_bits & 1:
                    raise ValueError(f"'{entry.filename}' is encrypted or packed in another way")
                # Asked for so many bytes, it unpacks no more; asked for all, up to 2 GiB at once.
                with archive.open(entry) as file:
                    content = file.read(entry.file_size)
                arrays[entry.filename.removesuffix(".npy")] = _array(content)
            return arrays
    except _FAULTS as error:
        raise ValueError(reason(error)) from error


def _array(data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of NumPy's format {version}")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    rest = len(data) - stream.tell()
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"an array that declares {shape} of {dtype} and has {rest} bytes")
    array: NDArray[Any] = np.empty(shape[::-1] if fortran else shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, offset=stream.tell())
    return array.T if fortran else array
