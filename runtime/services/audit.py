"""An append-only record of every segmentation: JSON lines, each bound to the one before.

An entry holds the digest of the entry before it and its own, so a change, a removal or a change of
order anywhere but at the very end breaks the chain. Whoever can write the file can make another
chain, though: with a key (``audit_keys``) every entry is sealed, and only who has the key can. What
was cut off the end, or swapped for an older copy, can only be seen by somebody who knows an entry
that was there: a head, written elsewhere with every entry, is such a witness.

A long log is rotated: the old file is put aside, and the new one's first entry goes on from its
last. Format 1 had no seals; such logs are still checked, and go on as they are or sealed.

No entry names a patient or a file. An image is known by the digest of its pixels.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file, sync_folder, write_file
from recallseg.engines.errors import AuditError
from recallseg.engines.reading import is_there
from recallseg.runtime.services.audit_keys import AuditKey, read_audit_key

__all__ = ["AuditLog", "AuditSummary", "Bookmark", "open_audit", "verify_audit_log"]

FORMAT_VERSION = 2
_READ = (1, 2)
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
    sealed : how many entries have a seal; each was checked if a key was given.
    keys : ids of the keys that sealed them.
    continues : digest of the last entry of the file before, where a log begins with a rotation.
    """

    entries: int
    newest: str
    first_time: str | None
    last_time: str | None
    unfinished: int
    sealed: int = 0
    keys: tuple[str, ...] = ()
    continues: str | None = None


@dataclass
class Bookmark:
    """How far a log was read: where, how many lines, and the last of these."""

    offset: int = 0
    lines: int = 0
    last: bytes = b""


class AuditLog:
    """Appends to a log, which is made when it does not exist. Processes may share one.

    Parameters
    ----------
    path : the file; its folder must exist.
    key : seals every entry; needed once a log is sealed.
    head : file, best in another place, that gets number and digest of the newest entry each time.

    Raises
    ------
    AuditError
        If what is there is no audit log, was changed, is sealed by another key or is not the one of
        the head, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: AuditKey | None = None,
        head: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._key = key
        self._head = None if head is None else Path(head)
        if key is not None and not key.seals:
            raise AuditError(
                "a public key only checks an audit log; sealing takes the private one."
            )
        try:
            os.close(_open(self.path, os.O_RDWR | os.O_CREAT))
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written: {error.strerror}. Choose a file "
                "in a folder that exists and can be written."
            ) from error
        if self._head is not None:
            folder = self._head.absolute().parent
            if not os.access(folder, os.W_OK | os.X_OK):
                why = "cannot be written" if folder.is_dir() else "is not there"
                raise AuditError(
                    f"the head {self._head} of the audit log cannot be written: its folder "
                    f"{folder} {why}."
                )
        walk = _Walk(key, [] if head is None else _read_if_there(Path(head)))
        walk.read(self.path)
        walk.need(self.path)
        if walk.sealed and key is None:
            raise AuditError(
                f"the audit log {self.path} is sealed by the key {' '.join(walk.keys)}. Give it "
                "with --audit-key."
            )

    def record(
        self, image: NDArray[Any], label_map: NDArray[Any], fields: Mapping[str, Any]
    ) -> str:
        """Append an entry about one segmentation, durably; return its digest.

        Parameters
        ----------
        image, label_map : pixels as they were segmented, and what came out. Only their digests are
            kept.
        fields : JSON values that say how, see ``Result.to_audit``; nothing that names a patient or
            a file.

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

    def note(self, event: str, fields: Mapping[str, Any]) -> str:
        """Append an entry about something else than a segmentation, durably; return its digest.

        Parameters
        ----------
        event : what was done, e.g. ``accept``.
        fields : JSON values; nothing that names a patient or a file.

        Raises
        ------
        AuditError
            If the entry cannot be written: then do not do it.
        """
        return self._append({"event": event, **fields})

    def entries(self, event: str, mark: Bookmark | None = None) -> Iterator[dict[str, Any]]:
        """Yield the entries of an event, the oldest first; those since the log was last rotated.

        Parameters
        ----------
        mark : of a former call that read to the end: only what came since is read. All is, where
            the log was rotated.

        Raises
        ------
        AuditError
            If it cannot be read.
        """
        for entry, _ in _entries(self.path, mark):
            if entry.get("event") == event:
                yield entry

    def _append(self, fields: dict[str, Any]) -> str:
        try:
            with self._locked() as file:
                number, previous, end = _last_entry(file.fileno(), self.path)
                entry = self._entry(number, previous, fields)
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
                self._write_head(entry)
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written: {error.strerror}. What it held is "
                "unharmed. Free some space or grant permission; a result that is not in the log "
                "must not be used."
            ) from error
        return str(entry["digest"])

    def rotate(self) -> Path:
        """Put the file aside as ``NAME.NUMBER`` and go on in a new one; return where the old is.

        The new file's first entry is the rotation, and follows the old one's last.

        Raises
        ------
        AuditError
            If it cannot be done; nothing is lost then.
        """
        try:
            with self._locked() as file:
                number, previous, _ = _last_entry(file.fileno(), self.path)
                aside = self.path.with_name(f"{self.path.name}.{number:09d}")
                if number == 0:
                    raise AuditError(
                        f"the audit log {self.path} is empty: there is nothing to put aside."
                    )
                if is_there(aside) and not os.path.samefile(aside, self.path):
                    raise AuditError(
                        f"{aside} is there already, so {self.path} cannot take its name."
                    )
                entry = self._entry(number, previous, {"event": "rotate", "file": aside.name})
                fresh = self.path.with_name(f".{self.path.name}.new")
                fresh.unlink(missing_ok=True)
                try:
                    write_file(fresh, _canonical(entry) + b"\n", mode=0o600)
                    aside.unlink(missing_ok=True)  # of a rotation that was cut off: the same file
                    os.link(self.path, aside)  # at every moment both names are of a whole log
                    os.replace(fresh, self.path)
                finally:
                    fresh.unlink(missing_ok=True)
                sync_folder(self.path.parent)
                self._write_head(entry)
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be rotated: {error.strerror}."
            ) from error
        return aside

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """Open the file that has the name now, and keep others from it."""
        while True:
            with os.fdopen(_open(self.path, os.O_RDWR), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
                if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:
                    yield file
                    return
                # Rotated by another process while this one waited.

    def _entry(self, number: int, previous: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "number": number,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "previous": previous,
            **({} if self._key is None else {"key": self._key.id}),
            **fields,
        }
        entry["digest"] = _digest_entry(entry)
        if self._key is not None:
            entry["seal"] = self._key.seal(entry["digest"])
        return entry

    def _write_head(self, entry: Mapping[str, Any]) -> None:
        if self._head is not None:
            head = {name: entry[name] for name in ("number", "digest", "time")}
            try:
                replace_file(self._head, _canonical(head) + b"\n", mode=0o600)
            except OSError as error:
                raise AuditError(
                    f"the head {self._head} of the audit log {self.path} cannot be written: "
                    f"{error.strerror}. The log has the entry; nobody outside of it has, so a "
                    "result of it must not be used."
                ) from error

    def __repr__(self) -> str:
        return f"AuditLog({str(self.path)!r})"


def open_audit(
    log: str | Path, key: str | Path | None = None, head: str | Path | None = None
) -> AuditLog:
    """Open a log whose seals' key lies in a file; arguments and errors as :class:`AuditLog`."""
    return AuditLog(log, key=None if key is None else read_audit_key(key), head=head)


def verify_audit_log(
    path: str | Path,
    known: str | None = None,
    *,
    key: AuditKey | None = None,
    head: str | Path | None = None,
    before: Sequence[str | Path] = (),
) -> AuditSummary:
    """Check every entry and the chain between them.

    Parameters
    ----------
    known : digest of an entry that must be there, or any beginning of it of at least 8 digits.
    key : of the seals: from the first sealed entry on, each must have its seal, and one must.
    head : file that :class:`AuditLog` wrote: its entry must be there.
    before : files that were put aside before this one, oldest first; all are checked as one log.

    Raises
    ------
    AuditError
        Naming the first entry that was changed, forged, lost or put elsewhere.
    """
    if known is not None and len(known) < 8:
        raise AuditError(f"a digest must be given with at least 8 digits, got '{known}'.")
    wanted = None if head is None else _read_head(Path(head))
    walk = _Walk(key, [d for d in (known, wanted) if d is not None])
    for file in (*before, path):
        walk.read(Path(file))
    walk.need(Path(path))
    if key is not None and not walk.sealed:
        raise AuditError(
            f"{path}: no entry is sealed, so the key {key.id} says nothing of it: it was never "
            "sealed, or was swapped for a log that is not."
        )
    return AuditSummary(
        walk.entries,
        walk.previous,
        walk.first_time,
        walk.last_time,
        walk.unfinished,
        walk.sealed,
        tuple(walk.keys),
        walk.continues,
    )


class _Walk:
    """Reads entries one after the other, over the files of one log."""

    def __init__(self, key: AuditKey | None, missing: list[str]) -> None:
        self._key = key
        self.missing = missing
        self.previous, self._number, self.entries = NOTHING, 0, 0
        self.first_time: str | None = None
        self.last_time: str | None = None
        self.unfinished = self.sealed = 0
        self.keys: dict[str, None] = {}
        self.continues: str | None = None

    def read(self, path: Path) -> None:
        """Check a file that follows what was read."""
        if self.unfinished:
            raise AuditError(f"{path} follows a file whose last entry is cut off.")
        for line_number, (entry, unfinished) in enumerate(_entries(path)):
            if entry:
                self._take(entry, path, line_number)
            self.unfinished = unfinished

    def need(self, path: Path) -> None:
        """Raise AuditError if an entry that must be there was not."""
        if self.missing:
            raise AuditError(
                f"{path}: there is no entry with digest {self.missing[0]}: entries were cut off "
                "its end, or it is another log, or an older copy of it."
            )

    def _take(self, entry: dict[str, Any], path: Path, line: int) -> None:
        if self.entries == 0 and line == 0 and entry.get("event") == "rotate":
            self._number, self.previous = entry["number"], entry["previous"]
            self.continues = self.previous
            self._find()  # the last of the file before, which a head names until this one is there
        if entry["number"] != self._number or entry["previous"] != self.previous:
            raise AuditError(
                f"{path}: line {line + 1} does not follow the one before: entries were removed, "
                "added or put in another order."
            )
        self._check_seal(entry, path, line)
        self.previous = entry["digest"]
        self._number += 1
        self.entries += 1
        self.last_time = str(entry.get("time"))
        self.first_time = self.first_time or self.last_time
        self._find()

    def _find(self) -> None:
        self.missing = [d for d in self.missing if not self.previous.startswith(d)]

    def _check_seal(self, entry: dict[str, Any], path: Path, line: int) -> None:
        seal, by = entry.get("seal"), entry.get("key")
        if not isinstance(seal, str) or not isinstance(by, str):
            if self.sealed:
                raise AuditError(
                    f"{path}: line {line + 1} has no seal, and entries before it have: it was "
                    "added by somebody without the key."
                )
            return
        self.sealed += 1
        self.keys[by] = None
        if len(self.keys) > 1 or (
            self._key is not None
            and not (by == self._key.id and self._key.fits(entry["digest"], seal))
        ):
            raise AuditError(
                f"{path}: line {line + 1} is not sealed by the key "
                f"{next(iter(self.keys)) if self._key is None else self._key.id}: it is forged, or "
                "was sealed by another key."
            )


def _read_if_there(path: Path) -> list[str]:
    """Return what a head names, if there is one; a disk that does not say is no answer."""
    try:
        there = is_there(path)
    except OSError as error:
        raise AuditError(f"the head {path} cannot be read: {error.strerror}.") from error
    return [_read_head(path)] if there else []


def _read_head(path: Path) -> str:
    """Return the digest of the entry that a head names."""
    try:
        with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
            digest = json.loads(file.read(2**16))["digest"]
    except OSError as error:
        raise AuditError(f"the head {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AuditError(
            f"{path} is no head of an audit log: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(digest, str) or len(digest) != len(NOTHING):
        raise AuditError(f"{path} is no head of an audit log: its digest is {digest!r:.80}.")
    return digest


def _entries(path: Path, mark: Bookmark | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield entries; after them, if the last is cut off, an empty one with its bytes.

    ``mark`` is where to begin, and moves along.
    """
    mark = mark or Bookmark()
    try:
        with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
            begin = mark.offset - len(mark.last)
            if os.pread(file.fileno(), len(mark.last), begin) != mark.last:  # another file
                mark.offset, mark.lines, mark.last = 0, 0, b""
            file.seek(mark.offset)
            while line := file.readline(LONGEST):
                if not line.endswith(b"\n"):
                    if len(line) == LONGEST:
                        raise AuditError(f"{path} is not an audit log: a line never ends.")
                    yield {}, len(line)
                    return
                entry = _parse(line, path, mark.lines)
                mark.offset, mark.lines = mark.offset + len(line), mark.lines + 1
                mark.last = line
                yield entry, 0
    except OSError as error:
        raise AuditError(f"the audit log {path} cannot be read: {error.strerror}.") from error


def _open(path: Path, flags: int) -> int:
    """Open a log, which is a file and no link (in which place somebody else's would grow)."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return descriptor


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
    except (ValueError, RecursionError) as error:
        raise AuditError(f"{path}: {where} is not an entry of an audit log: {error}.") from error
    if (
        not isinstance(entry, dict)
        or not {"number", "previous", "digest"} <= entry.keys()
        or type(entry["number"]) is not int
        or not isinstance(entry["previous"], str)
        or entry.get("format") not in _READ
    ):
        raise AuditError(
            f"{path}: {where} is not an entry of an audit log, or of a newer RecallSeg's."
        )
    if entry["digest"] != _digest_entry(entry) or _canonical(entry) + b"\n" != line:
        raise AuditError(f"{path}: {where} was changed: its digest does not fit.")
    return entry


def _digest_entry(entry: dict[str, Any]) -> str:
    unsealed = {k: v for k, v in entry.items() if k not in ("digest", "seal")}
    return sha256(_canonical(unsealed)).hexdigest()


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _digest_pixels(pixels: NDArray[Any]) -> str:
    """Digest of dtype, shape and values; whether they are contiguous makes no difference."""
    ordered = pixels.dtype.newbyteorder("<")
    head = f"{ordered.str} {'x'.join(map(str, pixels.shape))}\n".encode()
    return sha256(head + np.ascontiguousarray(pixels, ordered).tobytes()).hexdigest()
