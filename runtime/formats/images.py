"""Image files in, mask files out.

PNG, JPEG, BMP and TIFF (8 or 16 bits, TIFF also float; grey or colour) and NumPy arrays. Pixels
come as they are stored: nothing is rotated, rescaled or converted, so that a mask drawn on them
fits.
"""

from __future__ import annotations

import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_image
from recallseg.runtime.formats.headers import declared_size, is_complete

__all__ = [
    "IMAGE_SUFFIXES",
    "is_image",
    "read_image",
    "read_label_map",
    "write_atomically",
    "write_label_map",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy")
_VOLUMES = (".dcm", ".dicom", ".nii", ".gz", ".nrrd")
_SILENT = 0
# NumPy reads the header with tokenize and ast.literal_eval; these are what both may raise.
_NPY_ERRORS = (
    *(OSError, ValueError, EOFError, OverflowError, TypeError),
    *(SyntaxError, tokenize.TokenError, RecursionError),
)
MAX_PIXELS = 2**28
"""16384 x 16384: above every scanner's images, below what exhausts a small machine's memory."""


def is_image(path: Path) -> bool:
    """Whether the file's name says that :func:`read_image` can read it."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | Path) -> NDArray[Any]:
    """Read an image file.

    Returns
    -------
    HxW (grey) or HxWx3 (RGB) in the file's own dtype. An opacity channel is dropped if all of it
    is opaque.

    Raises
    ------
    InputError
        If the file is missing, damaged, cut off, too large, of another format, or has several pages
        or a transparent part.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _VOLUMES:
        raise InputError(
            f"{path}: a {suffix} file is a volume, not an image; images are "
            f"{', '.join(IMAGE_SUFFIXES)}. Read it with recallseg.runtime.formats.reading."
        )
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"{path}: '{suffix}' is not a known image format; expected {', '.join(IMAGE_SUFFIXES)}."
        )
    image = _read_array(path) if suffix == ".npy" else _decode(path)
    try:
        return check_image(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_label_map(path: str | Path) -> NDArray[Any]:
    """Read a label map: HxW uint8 or uint16, 0 is background; raises InputError otherwise."""
    label_map = read_image(path)
    if label_map.ndim != 2 or label_map.dtype not in (np.uint8, np.uint16):
        channels = "1 channel" if label_map.ndim == 2 else "3 channels"
        raise InputError(
            f"{path}: a label map must have one channel of 8 or 16 bits, whole numbers without "
            f"sign; this file has {channels} of {label_map.dtype}. Save it as a grey PNG whose "
            "pixel values are the labels, not as a coloured picture of them."
        )
    return label_map


def write_label_map(path: str | Path, label_map: NDArray[np.uint8]) -> None:
    """Write a label map HxW uint8 as PNG: in full, or not at all."""
    done, data = cv2.imencode(".png", label_map)
    if not done:
        raise InputError(
            f"a label map of shape {label_map.shape}, {label_map.dtype} cannot be PNG."
        )
    write_atomically(path, data.tobytes())


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part of it.

    Raises
    ------
    OSError
        If the folder cannot be written; the half-written temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _decode(path: Path) -> NDArray[Any]:
    data = _bytes_of(path)
    size = declared_size(data)
    if size is not None:
        _check_pixels(path, size[0] * size[1])
    if not is_complete(data):
        raise InputError(f"{path} is cut off: its end is missing. Export or copy it again.")
    encoded = np.frombuffer(data, np.uint8)
    with _quiet_decoder():
        try:
            pages = _pages(data, encoded)
            image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise InputError(f"{path} cannot be decoded: {error.err}. Export it again.") from error
    if image is None:
        raise InputError(
            f"{path} cannot be decoded: it is damaged, cut off, or not what its name says. "
            "Export or copy it again."
        )
    if pages > 1:
        raise InputError(f"{path} has {pages} pages; expected one image. Save each page as a file.")
    if image.ndim == 2:
        return image
    if image.shape[2] == 4:
        if not _opaque(image[..., 3]):
            raise InputError(
                f"{path} is partly transparent: what lies below is unknown. Save it without "
                "opacity."
            )
        image = image[..., :3]
    return np.ascontiguousarray(image[..., ::-1])


def _pages(data: bytes, encoded: NDArray[np.uint8]) -> int:
    """Count the pages of a TIFF file; OpenCV alone would give the first one and stay silent."""
    if not data.startswith((b"II*\0", b"MM\0*")):
        return 1
    _, pages = cv2.imdecodemulti(encoded, cv2.IMREAD_UNCHANGED, range=(0, 2))
    return len(pages)


def _opaque(opacity: NDArray[Any]) -> bool:
    full = np.iinfo(opacity.dtype).max if np.issubdtype(opacity.dtype, np.integer) else 1.0
    return bool((opacity == full).all())


def _read_array(path: Path) -> NDArray[Any]:
    _bytes_of(path, count=1)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        _check_pixels(path, array.size // 3 if array.ndim == 3 else array.size)
        return np.array(array)
    except _NPY_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not a NumPy array file: {error}. Save it with numpy.save."
        ) from error


def _bytes_of(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(count)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if not data:
        raise InputError(f"{path} is an empty file.")
    return data


def _check_pixels(path: Path, pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{path} declares {pixels} pixels; at most {MAX_PIXELS} are read. Crop or tile it."
        )


@contextmanager
def _quiet_decoder() -> Iterator[None]:
    """Keep OpenCV from printing: what went wrong is in the error that is raised."""
    logging: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has the functions at its top
    level = logging.getLogLevel()
    logging.setLogLevel(_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)
