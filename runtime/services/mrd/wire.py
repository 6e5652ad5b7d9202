"""The MRD stream: messages with their lengths, image headers, and attributes.

Source: ISMRMRD's ``doc/mrd_messages.md`` and ``ismrmrd.h`` (little-endian, packed). A message is
kept as the bytes that came, so that what is passed on is what was sent.
"""

from __future__ import annotations

import math
import re
import socket
import struct
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.services.listening import ClosedError, receive_into

__all__ = [
    "CLOSE",
    "CONFIG_FILE",
    "CONFIG_TEXT",
    "DTYPES",
    "HEADER",
    "IMAGE",
    "TEXT",
    "Image",
    "Link",
    "Message",
    "attributes_of",
    "parse_xml",
    "text_message",
    "with_attributes",
]

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT = 1, 2, 3, 4, 5
ACQUISITION, IMAGE, WAVEFORM, NDARRAY = 1008, 1022, 1026, 1030
CLOSING = struct.pack("<H", CLOSE)

DTYPES: Mapping[int, str] = {
    1: "<u2", 2: "<i2", 3: "<u4", 4: "<i4", 5: "<f4", 6: "<f8", 7: "<c8", 8: "<c16",
}  # fmt: skip
MAGNITUDE, PHASE, REAL, IMAGINARY, COMPLEX, RGB = range(1, 7)
LONGEST_TEXT = 16 * 2**20
MOST_AXES = 16
"""Of an NDARRAY; numpy takes 64."""
_CONFIG_BYTES = 1024
_SLOWEST = 50_000
"""Bytes a second below which a message is not waited for."""

_IMAGE = np.dtype(
    [
        ("version", "<u2"), ("data_type", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"),
        ("matrix_size", "<u2", 3), ("field_of_view", "<f4", 3), ("channels", "<u2"),
        ("position", "<f4", 3), ("read_dir", "<f4", 3), ("phase_dir", "<f4", 3),
        ("slice_dir", "<f4", 3), ("patient_table_position", "<f4", 3), ("average", "<u2"),
        ("slice", "<u2"), ("contrast", "<u2"), ("phase", "<u2"), ("repetition", "<u2"),
        ("set", "<u2"), ("acquisition_time_stamp", "<u4"), ("physiology_time_stamp", "<u4", 3),
        ("image_type", "<u2"), ("image_index", "<u2"), ("image_series_index", "<u2"),
        ("user_int", "<i4", 8), ("user_float", "<f4", 8), ("attribute_string_len", "<u4"),
    ]
)  # fmt: skip
assert _IMAGE.itemsize == 198
_ACQUISITION_BYTES, _WAVEFORM_BYTES = 340, 40


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes
    ----------
    id : what it is.
    raw : all of it, with the id.
    """

    id: int
    raw: bytes | bytearray

    @property
    def text(self) -> str:
        """The text of a configuration, header or text, with or without NUL at its end."""
        body = self.raw[2:] if self.id == CONFIG_FILE else self.raw[6:]
        return bytes(body).split(b"\0", 1)[0].decode("utf-8", "replace")

    @property
    def ends_with_nul(self) -> bool:
        """Whether its text does, as FIRE's do."""
        return self.id in (CONFIG_TEXT, HEADER, TEXT) and self.raw[-1:] == b"\0"


@dataclass(frozen=True)
class Image:
    """An image.

    Attributes
    ----------
    header : one record; see ISMRMRD's ``ImageHeader``. Lengths in mm, directions in LPS.
    attributes : XML, or empty.
    data : channels x Z x Y x X.
    """

    header: Any
    attributes: str
    data: NDArray[Any]

    @classmethod
    def of(cls, raw: bytes | bytearray) -> Image:
        """Read a message of an image, whose lengths were checked when it came."""
        header = np.frombuffer(raw, _IMAGE, 1, 2)[0]
        (length,) = struct.unpack_from("<Q", raw, 2 + _IMAGE.itemsize)
        start = 2 + _IMAGE.itemsize + 8
        text = bytes(raw[start : start + length]).split(b"\0", 1)[0].decode("utf-8", "replace")
        x, y, z = map(int, header["matrix_size"])
        data = np.frombuffer(raw, DTYPES[int(header["data_type"])], -1, start + length)
        return cls(header, text, data.reshape(int(header["channels"]), z, y, x))

    def message(self, *, nul: bool) -> bytearray:
        """Return the message; ``nul``: attributes end with it."""
        text = self.attributes.encode() + b"\0" * nul
        header = self.header.copy()
        header["attribute_string_len"] = len(text)
        head = struct.pack("<H", IMAGE) + header.tobytes() + struct.pack("<Q", len(text)) + text
        whole = bytearray(len(head) + self.data.nbytes)
        whole[: len(head)] = head
        np.frombuffer(whole, self.data.dtype, -1, len(head))[:] = self.data.reshape(-1)
        return whole

    def answer(self, data: NDArray[Any], attributes: str, **changes: int) -> Image:
        """Return another image at the same place: all of the header but what must differ.

        Parameters
        ----------
        data : channels x Z x Y x X of the same Z, Y, X.
        changes : fields of the header.
        """
        header = self.header.copy()
        kinds = {np.dtype(dtype): number for number, dtype in DTYPES.items()}
        header["data_type"] = kinds[data.dtype]
        header["channels"] = data.shape[0]
        for name, value in changes.items():
            header[name] = value
        return Image(header, attributes, data)


SERIES_AT = 2 + int(_IMAGE.fields["image_series_index"][1])  # type: ignore[index]


class Link:
    """Reads messages from a socket, each within bounds of time and size.

    Parameters
    ----------
    idle_s : most seconds between two messages.
    message_s : most seconds without a byte within one; a whole one may also take what its size
        takes at 50 kB/s.
    most_bytes : of one message.
    """

    def __init__(
        self, link: socket.socket, *, idle_s: float, message_s: float, most_bytes: int
    ) -> None:
        self._link, self._idle_s, self._message_s = link, idle_s, message_s
        self._most = most_bytes
        self._until = math.inf

    def read(self) -> Message:
        """Return the next message.

        Raises
        ------
        ClosedError
            At the end of the stream, within a message or before one; after too long a silence; for
            an unknown id, whose length nobody knows; and for lengths that cannot be.
        """
        self._until = time.monotonic() + self._idle_s
        head = self._some(bytearray(2), 0)
        (number,) = struct.unpack("<H", head)
        self._until = time.monotonic() + self._message_s
        if number == CLOSE:
            return Message(number, head)
        if number == CONFIG_FILE:
            return Message(number, self._more(head, _CONFIG_BYTES))
        if number in (CONFIG_TEXT, HEADER, TEXT):
            head = self._more(head, 4)
            (length,) = struct.unpack_from("<I", head, 2)
            if length > LONGEST_TEXT:
                raise ClosedError(f"a text of {length} bytes")
            return Message(number, self._more(head, length))
        if number == IMAGE:
            return Message(number, self._image(head))
        if number == ACQUISITION:
            head = self._more(head, _ACQUISITION_BYTES)
            samples, _, channels = struct.unpack_from("<3H", head, 2 + 34)
            (axes,) = struct.unpack_from("<H", head, 2 + 176)
            return Message(number, self._more(head, samples * (4 * axes + 8 * channels)))
        if number == WAVEFORM:
            head = self._more(head, _WAVEFORM_BYTES)
            samples, channels = struct.unpack_from("<2H", head, 2 + 28)
            return Message(number, self._more(head, 4 * samples * channels))
        if number == NDARRAY:
            head = self._more(head, 6)
            kind, _, axes = struct.unpack_from("<3H", head, 2)
            if kind not in DTYPES or axes > MOST_AXES:
                raise ClosedError(f"an array of type {kind} with {axes} axes")
            head = self._more(head, 8 * axes)
            shape = struct.unpack_from(f"<{axes}Q", head, 8)
            return Message(number, self._more(head, math.prod(shape) * _item(kind)))
        raise ClosedError(f"a message of unknown kind {number}")

    def _image(self, head: bytearray) -> bytearray:
        head = self._more(head, _IMAGE.itemsize + 8)
        header = np.frombuffer(head, _IMAGE, 1, 2)[0]
        (length,) = struct.unpack_from("<Q", head, 2 + _IMAGE.itemsize)
        kind = int(header["data_type"])
        if kind not in DTYPES:
            raise ClosedError(f"an image of unknown data type {kind}")
        if length > LONGEST_TEXT:
            raise ClosedError(f"attributes of {length} bytes")
        size = math.prod(map(int, header["matrix_size"])) * int(header["channels"]) * _item(kind)
        if size == 0:
            raise ClosedError("an image without pixels")
        return self._more(head, int(length) + size)

    def _more(self, head: bytearray, count: int) -> bytearray:
        if len(head) + count > self._most:
            raise ClosedError(f"a message of {len(head) + count} bytes, {self._most} may be")
        self._until += count / _SLOWEST
        whole = bytearray(len(head) + count)
        whole[: len(head)] = head
        return self._some(whole, len(head))

    def _some(self, buffer: bytearray, at: int) -> bytearray:
        receive_into(self._link, buffer, at, self._until)
        return buffer


def text_message(text: str, *, nul: bool) -> bytes:
    """Return a TEXT, which scanners show in their log."""
    body = text.encode() + b"\0" * nul
    return struct.pack("<HI", TEXT, len(body)) + body


def parse_xml(text: str) -> ElementTree.Element:
    """Parse XML without documents types, so that nothing in it can grow or be fetched.

    Raises
    ------
    InputError
        If it is not well-formed, or has a document type.
    """
    if re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise InputError("XML with a document type is not read.")
    try:
        return ElementTree.fromstring(text)  # noqa: S314  # no entities: see above
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise InputError(f"this is no XML: {error}.") from error


def attributes_of(text: str) -> dict[str, list[str]]:
    """Return an image's attributes: values by name; none if it has none.

    Raises
    ------
    InputError
        If they are no XML.
    """
    found: dict[str, list[str]] = {}
    if text.strip():
        for meta in parse_xml(text).iter("meta"):
            name = (meta.findtext("name") or "").strip()
            found.setdefault(name, []).extend(
                (value.text or "").strip() for value in meta.iter("value")
            )
    return found


def with_attributes(attributes: Mapping[str, Sequence[str]]) -> str:
    """Return attributes as XML."""
    return "".join(_xml(attributes.items()))


def _xml(items: Iterable[tuple[str, Sequence[str]]]) -> Iterable[str]:
    yield '<?xml version="1.0"?>\n<ismrmrdMeta>'
    for name, values in items:
        told = "".join(f"<value>{escape(value)}</value>" for value in values)
        yield f"<meta><name>{escape(name)}</name>{told}</meta>"
    yield "</ismrmrdMeta>\n"


def _item(kind: int) -> int:
    return np.dtype(DTYPES[kind]).itemsize
