"""Finds a text in files, in whatever encoding and packing it may stand there."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["forms", "leaks", "unpacked"]


def forms(text: str) -> dict[str, bytes]:
    """Return the encodings of a text, lower case where case does not count, by name."""
    raw = text.encode()
    found = {
        "UTF-8": raw,
        "UTF-16": text.encode("utf-16-le"),
        "UTF-32": text.encode("utf-32-le"),
        "hexadecimal": raw.hex().encode(),
        "its SHA-256": hashlib.sha256(raw).hexdigest()[:16].encode(),
        "its MD5": hashlib.md5(raw).hexdigest()[:16].encode(),
    }
    return {name: form.lower() for name, form in found.items()}


def leaks(paths: Iterable[Path], texts: Iterable[str]) -> list[str]:
    """Return where any of the texts stands: file, how it was packed, how encoded."""
    wanted = {(text, name): form for text in texts for name, form in forms(text).items()}
    found = []
    for path in paths:
        for how, data in [("name", str(path.name).encode()), *unpacked(path.read_bytes(), "file")]:
            low = data.lower()
            found += [
                f"{path} ({how}): {text} in {name}"
                for (text, name), form in wanted.items()
                if form in low
            ]
    return found


def unpacked(data: bytes, how: str, depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield bytes as they are, and whatever is packed in them."""
    yield how, data
    if depth > 4:
        return
    for name, inner in _inside(data):
        yield from unpacked(inner, f"{how}/{name}", depth + 1)


def _inside(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data.startswith(b"\x1f\x8b"):
        yield "gzip", gzip.decompress(data)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                yield entry.filename, archive.read(entry)
    if data.startswith(b"\x89PNG"):
        yield from _chunks(data)
    if data.startswith(b"SQLite format 3"):
        database = sqlite3.connect(":memory:")
        database.deserialize(data)
        for line in database.iterdump():
            yield "SQL", line.encode()
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master")]
        for table in tables:
            with suppress(sqlite3.Error):
                for row in database.execute(f"SELECT * FROM {table}"):
                    yield from ((table, value) for value in row if isinstance(value, bytes))
        database.close()
    for match in re.finditer(rb"[A-Za-z0-9+/]{16,}={0,2}", data):
        with suppress(ValueError):
            yield "base64", base64.b64decode(match[0][: len(match[0]) // 4 * 4], validate=True)


def _chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what is compressed in text chunks of a PNG, or follows its end."""
    place = 8
    while place + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            for start in range(min(len(body), 120)):
                with suppress(zlib.error):
                    yield kind.decode(), zlib.decompress(body[start:])
                    break
        place += 12 + size
        if kind == b"IEND":
            break
    if data[place:]:
        yield "after the picture", data[place:]
