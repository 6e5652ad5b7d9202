"""Segments every image that arrives in a folder, once: the simplest way to be integrated.

There is no state but the outputs. An image is done when its record is there, which is written last;
so whatever dies at whatever moment, the next run goes on where that one was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic
from types import TracebackType
from typing import Any

from recallseg.engines.errors import InputError, LibraryLockedError
from recallseg.runtime.audit import AuditLog
from recallseg.runtime.formats.images import is_image, read_image, write_atomically
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.outputs import MASK_SUFFIX, output_base, record_file, write_result
from recallseg.runtime.segmenter import Segmenter

__all__ = ["Arrival", "Watcher"]

LOCK = ".recallseg-watch.lock"
Signature = tuple[int, int]  # bytes, nanoseconds of the last change


@dataclass(frozen=True)
class Arrival:
    """What became of one image: a ``record`` as in NAME.json, or why there is none."""

    path: Path
    record: dict[str, Any] | None
    error: str | None


class Watcher:
    """Watches one folder and those below it.

    An image has arrived when its size and time of change have stayed the same for ``settle_s``.
    Hidden files, label maps (NAME.mask.png) and other formats are passed over. What cannot be
    segmented leaves NAME.error.json, and is tried again when the file changes.

    Parameters
    ----------
    segmenter : what segments.
    source, output : folders; neither may lie in the other. Only one watcher may write to an output.
    settle_s : seconds without a change.
    audit : log in which every segmentation is recorded.

    Raises
    ------
    InputError
        If ``source`` is no folder, the folders overlap, or another process watches into ``output``.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        source: Path,
        output: Path,
        *,
        settle_s: float = 2.0,
        audit: AuditLog | None = None,
    ) -> None:
        if not source.is_dir():
            raise InputError(f"{source} is not a folder. Make it before it is watched.")
        here, there = source.resolve(), output.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise InputError(
                f"{source} and {output} lie in each other, so results would be taken for images. "
                "Choose two folders apart."
            )
        if not settle_s >= 0:
            raise InputError(f"seconds to settle must be 0 or more, got {settle_s}.")
        output.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = WriterLock(output / LOCK)
        except LibraryLockedError as error:
            raise InputError(
                f"another process already watches into {output}. Stop it, or choose another folder."
            ) from error
        self._segmenter = segmenter
        self._source, self._output = source, output
        self._settle_s = settle_s
        self._audit = audit
        self._seen: dict[Path, tuple[Signature, float]] = {}

    def run(self, stop: Event, *, once: bool = False, poll_s: float = 0.5) -> Iterator[Arrival]:
        """Segment what arrives, and yield what became of it, until ``stop`` is set.

        Parameters
        ----------
        stop : looked at between images; the one in work is finished.
        once : end when all that is there now is done.
        poll_s : seconds between two looks at the folder.

        Raises
        ------
        OSError, EngineError, LibraryError, AuditError
            What concerns more than one image ends the watch; what was done stays done.
        """
        while not stop.is_set():
            arrived, unsettled = self._look()
            for path, signature in arrived:
                if stop.is_set():
                    return
                yield self._segment(path, signature)
            if once and not arrived and not unsettled:
                return
            if not arrived:
                stop.wait(poll_s)

    def close(self) -> None:
        """Let another process watch into the output folder."""
        self._lock.release()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _look(self) -> tuple[list[tuple[Path, Signature]], bool]:
        """Return complete images that are not done, and whether others are still being written."""
        arrived: list[tuple[Path, Signature]] = []
        unsettled = False
        seen: dict[Path, tuple[Signature, float]] = {}
        now = monotonic()
        for path in sorted(self._source.rglob("*")):
            relative = path.relative_to(self._source)
            if (
                not is_image(path)
                or path.stem.endswith(MASK_SUFFIX)
                or any(part.startswith(".") for part in relative.parts)
            ):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # taken away while we looked
            signature = (status.st_size, status.st_mtime_ns)
            if self._is_done(path, signature):
                continue
            before = self._seen.get(path)
            since = before[1] if before is not None and before[0] == signature else now
            seen[path] = (signature, since)
            if now - since >= self._settle_s:
                arrived.append((path, signature))
            else:
                unsettled = True
        self._seen = seen
        return arrived, unsettled

    def _is_done(self, path: Path, signature: Signature) -> bool:
        base = self._base(path)
        record = _read_record(record_file(base))
        if record is not None and record.get("image") == path.name:
            return True
        failure = _read_record(_failure_file(base, path))
        return failure is not None and tuple(failure.get("file", ())) == signature

    def _segment(self, path: Path, signature: Signature) -> Arrival:
        base = self._base(path)
        try:
            other = _read_record(record_file(base))
            if other is not None:
                raise InputError(
                    f"{path}: {record_file(base)} is of {other.get('image')}. Rename one of them."
                )
            image = read_image(path)
            result = self._segmenter.segment(image)
        except InputError as error:
            base.parent.mkdir(parents=True, exist_ok=True)
            failure = {"image": path.name, "file": list(signature), "error": str(error)}
            write_atomically(
                _failure_file(base, path),
                json.dumps(failure, indent=1, ensure_ascii=False).encode(),
            )
            return Arrival(path, None, str(error))
        if self._audit is not None:
            self._audit.record(image, result)
        record = write_result(base, result, path.name)
        _failure_file(base, path).unlink(missing_ok=True)
        return Arrival(path, record, None)

    def _base(self, path: Path) -> Path:
        return output_base(self._output, path.relative_to(self._source))


def _failure_file(base: Path, path: Path) -> Path:
    return base.with_name(f"{base.name}{path.suffix.lower()}.error.json")


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return a record that was written here, or None; what is no record counts as not there."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None
