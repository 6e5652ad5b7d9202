"""Streams kept for reports of faults, without what names a patient, and sent again.

Kept are pixels, geometry, counters, and what of texts is known to be harmless; all other texts are
left out: a list of what identifies somebody would never be complete.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import numpy as np

from recallseg.engines.durable import make_folder
from recallseg.engines.errors import InputError, OutputError
from recallseg.engines.reading import read_file
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.listening import ClosedError, connect
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.mrd.parameters import PARAMETERS
from recallseg.runtime.services.mrd.wire import (
    ACQUISITION,
    CLOSE,
    CLOSING,
    CONFIG_FILE,
    CONFIG_TEXT,
    HEADER,
    IMAGE,
    NDARRAY,
    TEXT,
    WAVEFORM,
    Image,
    Link,
    Message,
    attributes_of,
    parse_xml,
    with_attributes,
)

__all__ = ["Recording", "replay", "without_identifiers"]

KEPT_SECTIONS = ("encoding", "sequenceParameters", "experimentalConditions")
KEPT_ATTRIBUTES = (
    "DataRole", "ImageRowDir", "ImageColumnDir", "ImageSliceDir", "Keep_image_geometry",
    "RescaleIntercept", "RescaleSlope", "WindowCenter", "WindowWidth", "EchoTime", "InversionTime",
)  # fmt: skip


class Recording:
    """Writes one connection's messages to a file that only this user reads."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
        self.path = folder / f"{stamp}.mrd"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")

    def add(self, message: Message) -> bool:
        """Keep a message; False if that failed, which ends the recording and nothing else."""
        try:
            self._file.write(without_identifiers(message))
        except (OSError, MemoryError) as error:
            ServiceLog("mrd").error("a recording has ended", error=error)
            with suppress(OSError):  # told just now
                self._file.close()
            return False
        return True

    def close(self) -> None:
        """End it. Harmless if repeated."""
        if not self._file.closed:
            try:
                with self._file:
                    self._file.write(CLOSING)
            except OSError as error:
                ServiceLog("mrd").error("a recording has ended", error=error)


def without_identifiers(message: Message) -> bytes | bytearray:
    """Return a message as it is kept."""
    nul = message.ends_with_nul
    if message.id == CONFIG_FILE:
        return bytes(message.raw[:2]) + message.text.encode()[:1023].ljust(1024, b"\0")
    if message.id == HEADER:
        return _text(HEADER, _header(message.text), nul)
    if message.id in (CONFIG_TEXT, TEXT):
        return _text(message.id, _parameters(message.text), nul)
    if message.id == IMAGE:
        return _image(message)
    if message.id in (ACQUISITION, WAVEFORM):
        return _untimed(message)
    return bytes(message.raw) if message.id in (NDARRAY, CLOSE) else b""


def replay(file: Path, host: str, port: int, *, seconds: float = 600.0) -> dict[str, Any]:
    """Send a recording to a service, and tell what came back.

    Returns
    -------
    dict
        ``images`` by series, ``texts``, ``other`` messages, and whether it was ``closed`` properly.

    Raises
    ------
    InputError
        If there is no such recording, or nobody listens.
    OutputError
        If what comes back is no MRD.
    """
    try:
        recorded = read_file(file)
    except OSError as error:
        raise InputError(f"{printable(file)} cannot be read: {error.strerror}.") from error
    try:
        link = connect(host, port, 10.0)
    except OSError as error:
        raise InputError(f"nobody listens on {host}:{port}: {error.strerror or error}.") from error
    images: Counter[int] = Counter()
    texts: list[str] = []
    other = 0
    with link:
        sender = threading.Thread(target=_sent, args=(link, recorded), daemon=True)
        sender.start()
        reader = Link(link, idle_s=seconds, message_s=60.0, most_bytes=2**31)
        try:
            while (message := reader.read()).id != CLOSE:
                if message.id == IMAGE:
                    images[int(Image.of(message.raw).header["image_series_index"])] += 1
                elif message.id == TEXT:
                    texts.append(printable(message.text))
                else:
                    other += 1
        except ClosedError as error:
            why = str(error) or "the service closed the connection"
            raise OutputError(f"what came back ended without CLOSE: {why}.") from error
        sender.join(10.0)
    return {
        "images": {str(series): count for series, count in sorted(images.items())},
        "texts": texts,
        "other": other,
        "closed": True,
    }


def _sent(link: socket.socket, recorded: bytes) -> None:
    with suppress(OSError):  # what came back tells
        link.sendall(recorded)


def _text(kind: int, text: str, nul: bool) -> bytes:
    body = text.encode() + b"\0" * nul
    return struct.pack("<HI", kind, len(body)) + body


def _header(text: str) -> str:
    try:
        root = parse_xml(text)
    except InputError:
        return ""
    for child in list(root):
        if child.tag.rpartition("}")[2] not in KEPT_SECTIONS:
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _parameters(text: str) -> str:
    try:
        found = json.loads(text)
        given = found["parameters"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    kept = {name: value for name, value in given if name in PARAMETERS}
    return json.dumps({"parameters": kept})


def _image(message: Message) -> bytearray:
    image = Image.of(message.raw)
    try:
        attributes = attributes_of(image.attributes)
    except InputError:
        attributes = {}
    kept = {name: attributes[name] for name in KEPT_ATTRIBUTES if name in attributes}
    header = image.header.copy()
    for name in ("measurement_uid", "acquisition_time_stamp", "physiology_time_stamp"):
        header[name] = 0
    for name in ("user_int", "user_float"):
        header[name] = 0
    nul = image.attributes != "" and _attributes_end_with_nul(message)
    return Image(header, with_attributes(kept) if kept else "", image.data).message(nul=nul)


def _attributes_end_with_nul(message: Message) -> bool:
    (length,) = struct.unpack_from("<Q", message.raw, 200)
    return bool(length > 0 and message.raw[208 + length - 1] == 0)


def _untimed(message: Message) -> bytes:
    """Return measured data without numbers of the measurement and times of day."""
    raw = bytearray(message.raw)
    if message.id == ACQUISITION:
        np.frombuffer(raw, "u1", 4, 2 + 10)[:] = 0  # measurement_uid
        np.frombuffer(raw, "u1", 16, 2 + 18)[:] = 0  # times of acquisition and of physiology
        np.frombuffer(raw, "u1", 64, 2 + 276)[:] = 0  # the user's numbers
    else:
        np.frombuffer(raw, "u1", 4, 2 + 16)[:] = 0  # measurement_uid
        np.frombuffer(raw, "u1", 4, 2 + 24)[:] = 0  # time
    return bytes(raw)
