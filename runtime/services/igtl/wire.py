"""OpenIGTLink's messages: header, image, label descriptions, status.

Source: the protocol's specification, versions 2 and 3 (openigtlink.org). Big-endian throughout;
only an image's voxels say their own order of bytes. A message is kept as it came, so that what is
passed on is what was sent.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.services.igtl.checksum import crc64
from recallseg.runtime.services.listening import ClosedError, receive_into

__all__ = ["Image", "Message", "label_descriptions", "make", "read", "status"]

_HEADER = struct.Struct(">H12s20sQQQ")
assert _HEADER.size == 58
_EXTENDED = struct.Struct(">HHIi")
IMAGE_BYTES = 72
_SLOWEST = 1_000_000
"""Bytes a second below which a message is not waited for."""
TYPES: Mapping[int, str] = {
    2: "i1",
    3: "u1",
    4: "i2",
    5: "u2",
    6: "i4",
    7: "u4",
    10: "f4",
    11: "f8",
}
OK, UNKNOWN, NOT_FOUND, TIME_OUT, CHECKSUM, ILLEGAL = 1, 2, 4, 7, 9, 12


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes
    ----------
    type, device : from the header.
    timestamp : as it came, 64 bits.
    raw : all of it.
    """

    type: str
    device: str
    timestamp: int
    raw: bytes | bytearray

    @property
    def content(self) -> memoryview:
        """The body, without the extended header and the metadata of version 3.

        Raises
        ------
        InputError
            If their lengths cannot be.
        """
        body = memoryview(self.raw)[_HEADER.size :]
        (version,) = struct.unpack_from(">H", self.raw)
        if version < 2:
            return body
        if len(body) < _EXTENDED.size:
            raise InputError("the extended header is cut off.")
        head, index, meta, _ = _EXTENDED.unpack_from(body)
        if head < _EXTENDED.size or head + index + meta > len(body):
            raise InputError("the lengths of the extended header and the metadata cannot be.")
        return body[head : len(body) - index - meta]

    @property
    def is_whole(self) -> bool:
        """Whether its checksum fits."""
        stated: int = _HEADER.unpack_from(self.raw)[5]
        return crc64(memoryview(self.raw)[_HEADER.size :]) == stated


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes
    ----------
    array : K x J x I, or K x J x I x 3, in this machine's order of bytes.
    geometry : the 72 bytes that say how large it is and where it lies, as they came.
    affine : index (i, j, k, 1) -> mm; None if its axes do not span space.
    frame : ``RAS`` or ``LPS``.
    """

    array: NDArray[Any]
    geometry: bytes
    affine: NDArray[np.float64] | None
    frame: str

    @classmethod
    def of(cls, content: memoryview) -> Image:
        """Read the content of an IMAGE.

        Raises
        ------
        InputError
            If it cannot be one, or is a part of one.
        """
        if len(content) < IMAGE_BYTES:
            raise InputError("an image's header is cut off.")
        geometry = bytes(content[:IMAGE_BYTES])
        _, components, kind, order, frame = struct.unpack_from(">HBBBB", geometry)
        size = struct.unpack_from(">3H", geometry, 6)
        matrix = np.array(struct.unpack_from(">12f", geometry, 12), np.float64).reshape(4, 3)
        offset, part = (
            struct.unpack_from(">3H", geometry, 60),
            struct.unpack_from(">3H", geometry, 66),
        )
        if kind not in TYPES or order not in (1, 2) or frame not in (1, 2):
            raise InputError(
                f"an image of type {kind}, byte order {order}, frame {frame} is not one."
            )
        if components not in (1, 3):
            raise InputError(f"an image has 1 or 3 values for each voxel, got {components}.")
        if 0 in size or offset != (0, 0, 0) or part != size:
            raise InputError(
                f"parts of images are not read: this one has {part} at {offset} of {size}."
            )
        dtype = np.dtype(TYPES[kind]).newbyteorder(">" if order == 1 else "<")
        count = size[0] * size[1] * size[2] * components
        if len(content) - IMAGE_BYTES != count * dtype.itemsize:
            raise InputError(
                f"an image of {size} has {len(content) - IMAGE_BYTES} bytes of voxels, not "
                f"{count * dtype.itemsize}."
            )
        array = np.frombuffer(content, dtype, count, IMAGE_BYTES).astype(dtype.newbyteorder("="))
        shape = (size[2], size[1], size[0], *((3,) if components == 3 else ()))
        return cls(
            array.reshape(shape), geometry, _affine(matrix, size), "RAS" if frame == 1 else "LPS"
        )

    def labels(self, label_map: NDArray[np.uint8]) -> bytes:
        """Return the content of an IMAGE of labels (K x J x I) with this one's geometry."""
        geometry = bytearray(self.geometry)
        geometry[2:4] = bytes((1, 3))  # one value a voxel, of 8 bits; order and frame stay
        return bytes(geometry) + np.ascontiguousarray(label_map, np.uint8).tobytes()


def read(link: socket.socket, *, idle_s: float, message_s: float, most_bytes: int) -> Message:
    """Return the next message.

    Raises
    ------
    ClosedError
        At the end of the stream, after too long a silence, and for a header that is none: where the
        next message begins is then unknown.
    """
    first = bytearray(1)
    receive_into(link, first, 0, time.monotonic() + idle_s)
    head = first + bytearray(_HEADER.size - 1)
    until = time.monotonic() + message_s
    receive_into(link, head, 1, until)
    version, kind, device, timestamp, length, _ = _HEADER.unpack(head)
    name = kind.split(b"\0", 1)[0]
    if not 1 <= version <= 9 or not name or not all(33 <= letter < 127 for letter in name):
        raise ClosedError("what is no OpenIGTLink")
    if length > most_bytes:
        raise ClosedError(f"a message of {length} bytes, {most_bytes} may be")
    raw = head + bytearray(length)
    receive_into(link, raw, len(head), until + length / _SLOWEST)
    told = device.split(b"\0", 1)[0].decode("utf-8", "replace")
    return Message(name.decode("ascii"), told, timestamp, raw)


def make(kind: str, device: str, content: bytes, timestamp: int = 0) -> Message:
    """Return a message of version 1, which every receiver reads; 0 for a timestamp of now."""
    if not timestamp:
        seconds, rest = divmod(time.time(), 1)
        timestamp = (int(seconds) << 32) | int(rest * 2**32)
    name = device.encode()[:20]
    head = _HEADER.pack(1, kind.encode(), name, timestamp, len(content), crc64(content))
    return Message(kind, device, timestamp, head + content)


def status(device: str, code: int, name: str = "", text: str = "") -> Message:
    """Return a STATUS."""
    told = text.encode() + b"\0"
    return make("STATUS", device, struct.pack(">Hq20s", code, 0, name.encode()[:20]) + told)


def label_descriptions(
    device: str,
    labels: Mapping[str, int],
    colours: Sequence[str],
    size: tuple[int, int, int],
    owner: str,
) -> Message:
    """Return an LBMETA: the name, value and colour of each label of a device's label maps.

    Parameters
    ----------
    colours : ``#rrggbb``, of the labels in their order.
    size : I, J, K.
    owner : device whose images they are of.
    """
    content = b"".join(
        struct.pack(
            ">64s20sBB4B3H20s",
            name.encode()[:63], device.encode()[:20], value, 0,
            *bytes.fromhex(colour[1:]), 255, *size, owner.encode()[:20],
        )
        for (name, value), colour in zip(labels.items(), colours, strict=True)
    )  # fmt: skip
    return make("LBMETA", device, content)


def _affine(matrix: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Return index to mm, of what is sent: the axes times spacing, and the middle of the image."""
    if not np.isfinite(matrix).all():
        return None
    axes, middle = matrix[:3].T, matrix[3]
    lengths = np.linalg.norm(axes, axis=0)
    if (lengths <= 0).any() or abs(np.linalg.det(axes / np.where(lengths > 0, lengths, 1))) < 1e-3:
        return None
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = middle - axes @ ((np.array(size) - 1) / 2)
    return affine
