"""An append-only record of every segmentation: JSON lines, each bound to the one before.

An entry holds the digest of the entry before it and its own, so a change, a removal or a change of
order anywhere but at the very end breaks the chain. What was cut off the end can only be seen by
somebody who knows a digest that was there: keep the newest one elsewhere from time to time.

No entry names a patient or a file. An image is known by the digest of its pixels.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import AuditError

__all__ = ["AuditLog", "AuditSummary", "verify_audit_log"]

FORMAT_VERSION = 1
NOTHING = "0" * 64  # stands for the entry before the first
LONGEST = 2**20  # bytes of one entry; far above 255 structures with 32 exemplars each


@dataclass(frozen=True)
class AuditSummary:
    """What :func:`verify_audit_log` found.

    Attributes
    ----------
    entries : how many.
    newest : digest of the last one; 64 zeros when there is none.
    first_time, last_time : UTC, ISO 8601; None when there is none.
    unfinished : bytes after the last entry, of one whose writer died. It was never acknowledged,
        and the next entry takes its place.
    """

    entries: int
    newest: str
    first_time: str | None
    last_time: str | None
    unfinished: int


class AuditLog:
    """Appends to a log, which is made when it does not exist. Processes may share one.

    Parameters
    ----------
    path : the file; its folder must exist.

    Raises
    ------
    AuditError
        If what is there is no audit log, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written: {error.strerror}. Choose a file "
                "in a folder that exists and can be written."
            ) from error
        verify_audit_log(self.path)

    def record(
        self, image: NDArray[Any], label_map: NDArray[Any], fields: Mapping[str, Any]
    ) -> str:
        """Append an entry about one segmentation, durably; return its digest.

        Parameters
        ----------
        image, label_map : pixels as they were segmented, and what came out. Only their digests are
            kept.
        fields : JSON values that say how, see ``Result.to_json``; nothing that names a patient.

        Raises
        ------
        AuditError
            If the entry cannot be written: then do not use the result.
        """
        return self._append(
            {
                "event": "segment",
                "image": _digest_pixels(image),
                "label_map": _digest_pixels(label_map),
                **fields,
            }
        )

    def _append(self, fields: dict[str, Any]) -> str:
        try:
            with self.path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                number, previous, end = _last_entry(file.fileno(), self.path)
                entry = {
                    "format": FORMAT_VERSION,
                    "number": number,
                    "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                    "previous": previous,
                    **fields,
                }
                entry["digest"] = _digest_entry(entry)
                line = _canonical(entry) + b"\n"
                file.truncate(end)
                file.seek(end)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written: {error.strerror}. What it held is "
                "unharmed. Free some space or grant permission; a result that is not in the log "
                "must not be used."
            ) from error
        return str(entry["digest"])

    def __repr__(self) -> str:
        return f"AuditLog({str(self.path)!r})"


def verify_audit_log(path: str | Path, known: str | None = None) -> AuditSummary:
    """Check every entry and the chain between them.

    Parameters
    ----------
    known : digest of an entry that must be there, or any beginning of it of at least 8 digits.

    Raises
    ------
    AuditError
        Naming the first entry that was changed, lost or put elsewhere.
    """
    previous, number, found = NOTHING, 0, known is None
    first_time: str | None = None
    last_time: str | None = None
    unfinished = 0
    if known is not None and len(known) < 8:
        raise AuditError(f"a digest must be given with at least 8 digits, got '{known}'.")
    try:
        with Path(path).open("rb") as file:
            while line := file.readline(LONGEST):
                if not line.endswith(b"\n"):
                    if len(line) == LONGEST:
                        raise AuditError(f"{path} is not an audit log: a line never ends.")
                    unfinished = len(line)
                    break
                entry = _parse(line, path, number)
                _check_link(entry, path, number, previous)
                previous = entry["digest"]
                number += 1
                last_time = str(entry.get("time"))
                first_time = first_time or last_time
                found = found or previous.startswith(str(known))
    except OSError as error:
        raise AuditError(f"the audit log {path} cannot be read: {error.strerror}.") from error
    if not found:
        raise AuditError(
            f"{path}: there is no entry with digest {known}: entries were cut off its end, or it "
            "is another log."
        )
    return AuditSummary(number, previous, first_time, last_time, unfinished)


def _last_entry(descriptor: int, path: Path) -> tuple[int, str, int]:
    """Return the next entry's number, the last one's digest, and where it ends in the file."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - 2 * LONGEST)
    tail = os.pread(descriptor, size - start, start)
    end = tail.rfind(b"\n") + 1  # what follows is an entry whose writer died
    if end == 0:
        if start:
            raise AuditError(f"{path} is not an audit log: a line never ends.")
        return 0, NOTHING, 0
    begin = tail.rfind(b"\n", 0, end - 1) + 1
    entry = _parse(tail[begin:end], path, None)
    return int(entry["number"]) + 1, str(entry["digest"]), start + end


def _parse(line: bytes, path: str | Path, number: int | None) -> dict[str, Any]:
    where = "its last line" if number is None else f"line {number + 1}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise AuditError(f"{path}: {where} is not an entry of an audit log: {error}.") from error
    if not isinstance(entry, dict) or not {"number", "previous", "digest"} <= entry.keys():
        raise AuditError(f"{path}: {where} is not an entry of an audit log.")
    if entry["digest"] != _digest_entry(entry) or _canonical(entry) + b"\n" != line:
        raise AuditError(f"{path}: {where} was changed: its digest does not fit.")
    return entry


def _check_link(entry: dict[str, Any], path: str | Path, number: int, previous: str) -> None:
    if entry["number"] != number or entry["previous"] != previous:
        raise AuditError(
            f"{path}: line {number + 1} does not follow the one before: entries were removed, "
            "added or put in another order."
        )


def _digest_entry(entry: dict[str, Any]) -> str:
    return sha256(_canonical({k: v for k, v in entry.items() if k != "digest"})).hexdigest()


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _digest_pixels(pixels: NDArray[Any]) -> str:
    """Digest of dtype, shape and values; whether they are contiguous makes no difference."""
    ordered = pixels.dtype.newbyteorder("<")
    head = f"{ordered.str} {'x'.join(map(str, pixels.shape))}\n".encode()
    return sha256(head + np.ascontiguousarray(pixels, ordered).tobytes()).hexdigest()
