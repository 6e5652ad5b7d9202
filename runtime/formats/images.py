"""Image files in, mask files out.

PNG, JPEG, BMP and TIFF (1 to 16 bits, TIFF also float; grey or colour) and NumPy arrays. OpenCV
decompresses; what the values mean is read from the header here, and one rule holds for images and
masks of every format: they come as a viewer shows them. The orientation in a file (EXIF, TIFF) is
applied, where white is zero the values are inverted, palettes become their colours. Nothing is
rescaled or converted else. With ``as_stored`` orientation and inversion are left alone.
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

from recallseg.engines.device.memory import on_gpu
from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError
from recallseg.engines.limits import describe_bytes, max_bytes
from recallseg.runtime.arrays import as_array
from recallseg.runtime.checks import check_image
from recallseg.runtime.formats.guards import check_given, check_length
from recallseg.runtime.formats.headers import (
    Meaning,
    declared_bytes,
    declared_size,
    is_complete,
    meaning,
    most_parts,
    plain,
)
from recallseg.runtime.formats.kinds import FORMATS, kind_by_name
from recallseg.runtime.formats.packed import packed_file, packing
from recallseg.runtime.json_text import printable

__all__ = [
    "IMAGE_SUFFIXES",
    "open_image",
    "read_colours",
    "read_image",
    "read_label_map",
    "write_label_map",
]

MOST_NPY_HEADER = 10_000
IMAGE_SUFFIXES = FORMATS["image"].suffixes
_SILENT = 0
_NO_MEMORY = -4  # cv::Error::StsNoMem
# NumPy reads the header with tokenize and ast.literal_eval; these are what both may raise.
_NPY_ERRORS = (
    *(OSError, ValueError, EOFError, OverflowError, TypeError),
    *(SyntaxError, tokenize.TokenError, RecursionError),
)
MAX_PIXELS = 2**28
"""16384 x 16384: above every scanner's images, below what exhausts a small machine's memory."""


def read_image(path: str | Path, *, as_stored: bool = False) -> NDArray[Any]:
    """Read an image file.

    Parameters
    ----------
    as_stored : neither turn it as its header says, nor invert it where white is zero.

    Returns
    -------
    HxW (grey) or HxWx3 (RGB) in the file's own dtype; of 12 bits and the like in uint16. An opacity
    channel is dropped if all of it is opaque.

    Raises
    ------
    InputError
        If the file is missing, damaged, cut off, too large, of another format, or has several pages
        or a transparent part.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix.lower() == ".npy":
        image = _read_array(path)
    else:
        image = _without_opacity(path, *_decode(path, as_stored))
    try:
        return check_image(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def open_image(image: Any) -> Any:
    """Return a caller's image as an array: the one way in, for queries and exemplars alike.

    Parameters
    ----------
    image : a path, see :func:`read_image`; what :func:`recallseg.runtime.arrays.as_array` takes; or
        an array on a GPU, which is returned as it is.

    Raises
    ------
    InputError
        If it cannot be read, or is none of these.

    Examples
    --------
    >>> write_label_map("image.png", np.zeros((48, 64), np.uint8))
    >>> open_image("image.png").shape
    (48, 64)
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image))
    return image if on_gpu(image) else as_array(image, "an image")


def read_label_map(path: str | Path, *, as_stored: bool = False) -> NDArray[Any]:
    """Read a label map; of a palette picture its numbers, not its colours.

    Parameters
    ----------
    as_stored : see :func:`read_image`; what holds for an image holds for its mask.

    Returns
    -------
    HxW uint8 or uint16; 0 is background.

    Raises
    ------
    InputError
        As :func:`read_image`, or if the pixels are colours or no whole numbers from 0 to 65535.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix.lower() == ".npy":
        values = _read_array(path)
    else:
        image, means = _decode(path, as_stored, numbers=True)
        if means.palette:  # a grey ramp by now, of three channels or, from BMP, of one
            values = image if image.ndim == 2 else image[..., 0]
        else:
            values = _without_opacity(path, image, means)
        if means.grey and means.bits < 8:  # the decoder spreads them over 0 to 255
            values = values // (255 // (2**means.bits - 1))
    if values.dtype == np.bool_:  # of one structure
        values = values.view(np.uint8)
    if values.dtype.kind not in "iuf":
        raise InputError(
            f"{path}: a label map must have whole numbers from 0 to 65535, this file has "
            f"{values.dtype}. Save it as a grey PNG whose pixel values are the labels."
        )
    if values.ndim == 3 and values.shape[2] == 3 and not np.ptp(values, axis=2).any():
        values = values[..., 0]
    if values.ndim != 2 or not values.size:
        channels = values.shape[2] if values.ndim == 3 else values.shape
        raise InputError(
            f"{path}: a label map must have one channel, whole numbers from 0 to 65535; this file "
            f"has {channels} channels of {values.dtype}. Say which colour is which "
            "structure with --legend '#ff0000=liver', or save it as a grey PNG whose values are "
            "the labels."
        )
    if values.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(values)
    whole = values.astype(np.uint16) if _are_labels(values) else None
    if whole is None:
        raise InputError(
            f"{path}: a label map must have whole numbers from 0 to 65535, this file has "
            f"{values.dtype} from {values.min():g} to {values.max():g}. Save it as a grey PNG "
            "whose pixel values are the labels."
        )
    return whole


def read_colours(path: str | Path, *, as_stored: bool = False) -> NDArray[np.uint8]:
    """Read a picture of structures, each in a colour of its own.

    Returns
    -------
    HxWx3 uint8 RGB; black where the picture is fully transparent.

    Raises
    ------
    InputError
        As :func:`read_image`, or if it has more than 8 bits or is partly transparent in places.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix.lower() == ".npy":
        image = _read_array(path)
    else:
        image, means = _decode(path, as_stored)
        if image.ndim == 3 and image.shape[2] == 4:
            opacity = image[..., 3]
            if not np.isin(opacity, (0, 255)).all():
                raise InputError(f"{path} has half transparent pixels: structures end sharply.")
            image = np.where(opacity[..., None] == 0, image.dtype.type(0), image)
        image = _without_opacity(path, image, means, opaque=True)
    if image.dtype != np.uint8:
        raise InputError(f"{path} has {image.dtype} values; colours of a legend have 8 bits.")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return check_image(image)


def write_label_map(path: str | Path, label_map: NDArray[np.uint8]) -> None:
    """Write a label map HxW uint8 as PNG: in full, or not at all."""
    done, data = cv2.imencode(".png", label_map)
    if not done:
        raise InputError(
            f"a label map of shape {label_map.shape}, {label_map.dtype} cannot be PNG."
        )
    replace_file(Path(path), data.tobytes())


def _check_suffix(path: Path) -> None:
    suffix, kind = path.suffix.lower(), kind_by_name(path)
    if kind is None and (found := packed_file(path)):
        raise InputError(f"{path} is {found.told}.")
    if kind not in (None, "image"):
        raise InputError(
            f"{path}: a {suffix} file is a volume, not an image; images are "
            f"{', '.join(IMAGE_SUFFIXES)}. Read it with "
            "recallseg.read_volume, and segment it with recallseg.segment_volume."
        )
    if kind is None:
        raise InputError(
            f"{path}: '{suffix}' is not a known image format; expected {', '.join(IMAGE_SUFFIXES)}."
        )


def _decode(path: Path, as_stored: bool, *, numbers: bool = False) -> tuple[NDArray[Any], Meaning]:
    """Return the channels as OpenCV orders them (BGR, opacity last), and what they mean."""
    data = _bytes_of(path)
    if found := packing(data):
        raise InputError(f"{path} is {found.told}.")
    if excess := most_parts(data):
        raise InputError(f"{path} has {excess}. Save it anew without them.")
    size = declared_size(data)
    if size is None:  # a decoder that goes by content would take any format, of any size
        raise InputError(
            f"{path} cannot be decoded: it is damaged, cut off, or no PNG, JPEG, BMP or TIFF, "
            "or not what its name says. Export or copy it again."
        )
    _check_pixels(path, size[0] * size[1], declared_bytes(data))
    if not is_complete(data):
        raise InputError(f"{path} is cut off: its end is missing. Export or copy it again.")
    means = meaning(data)
    if means.pages > 1:
        raise InputError(
            f"{path} has {means.pages} pages; expected one image. Save each page as a file, or a "
            "stack with its spacing as NIfTI or NRRD."
        )
    if means.unreadable:
        raise InputError(f"{path} would be read wrongly: {means.unreadable}.")
    encoded = np.frombuffer(plain(data, numbers=numbers), np.uint8)
    with _quiet_decoder():
        try:
            image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            if error.code == _NO_MEMORY:
                raise MemoryError(f"{path} needs more memory than there is") from error
            raise InputError(f"{path} cannot be decoded: {error.err}. Export it again.") from error
    if image is None:
        # Of too little memory OpenCV says no more than that: then this finds none either.
        np.empty(2 * size[0] * size[1] * declared_bytes(data), np.uint8)
        raise InputError(
            f"{path} cannot be decoded: it is damaged, cut off, of a compression that is not read, "
            "or not what its name says. Export or copy it again."
        )
    if 8 < means.bits < 16 and image.dtype == np.uint16:  # OpenCV moves 12 bits up to fill 16
        image = np.right_shift(image, 16 - means.bits)
    if not as_stored:
        if means.inverted:
            highest = 2**means.bits - 1 if means.bits > 1 else 255
            image = np.subtract(highest, image, dtype=image.dtype)
        image = _turned(image, means.orientation)
    return image, means


def _turned(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an image as EXIF and TIFF number it (1 to 8), so that it stands as it was taken."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _without_opacity(
    path: Path, image: NDArray[Any], means: Meaning, *, opaque: bool = False
) -> NDArray[Any]:
    """Return HxW or HxWx3 RGB; raise InputError unless all of it is ``opaque``."""
    if image.ndim == 2:
        return image
    if image.shape[2] == 4:
        if not opaque and not _opaque(image[..., 3]):
            raise InputError(
                f"{path} is partly transparent: what lies below is unknown. Save it without "
                "opacity."
            )
        image = image[..., :3]
    grey = means.grey or (means.palette and not np.ptp(image, axis=2).any())
    return np.ascontiguousarray(image[..., 0] if grey else image[..., ::-1])


def _are_labels(values: NDArray[Any]) -> bool:
    if not np.isfinite(values).all() or not 0 <= float(values.min()) <= float(values.max()) < 65536:
        return False
    return bool((np.rint(values) == values).all())


def _opaque(opacity: NDArray[Any]) -> bool:
    full = np.iinfo(opacity.dtype).max if np.issubdtype(opacity.dtype, np.integer) else 1.0
    return bool((opacity == full).all())


def _read_array(path: Path) -> NDArray[Any]:
    start = _bytes_of(path, count=12)
    if not start.startswith(np.lib.format.MAGIC_PREFIX):  # NumPy would open an archive of arrays
        raise InputError(f"{path} is not a NumPy array file. Save it with numpy.save.")
    # Checked here, because NumPy reads as much as the file states before it looks at its own limit.
    header = int.from_bytes(start[8:10] if start[6:7] == b"\x01" else start[8:12], "little")
    if header > MOST_NPY_HEADER:
        raise InputError(
            f"{path} is not a NumPy array file: it states a header of {header} bytes, NumPy reads "
            f"{MOST_NPY_HEADER}. Save it with numpy.save."
        )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        pixels = array.size // 3 if array.ndim == 3 else array.size
        _check_pixels(path, pixels, -(-array.nbytes // max(1, pixels)))
        return np.array(array)
    except _NPY_ERRORS as error:
        if isinstance(error, InputError):
            raise
        check_given(path, error)
        raise InputError(
            f"{path} is not a NumPy array file: {error}. Save it with numpy.save."
        ) from error


def _bytes_of(path: Path, count: int = -1) -> bytes:
    try:
        check_length(path)
        with path.open("rb") as file:
            data = file.read(count)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}.") from None
    except ValueError as error:  # a name that no file can have: a NUL, half a character
        if isinstance(error, InputError):
            raise
        raise InputError(f"there is no file {printable(path)}: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if not data:
        raise InputError(f"{path} is an empty file.")
    return data


def _check_pixels(path: Path, pixels: int, size: int) -> None:
    if pixels * size > (most := max_bytes()):
        raise InputError(
            f"{path} declares {pixels} pixels, or {pixels * size} bytes; at most "
            f"{describe_bytes(most)} are read. Crop or tile it."
        )
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
