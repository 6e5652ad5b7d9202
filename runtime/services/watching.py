"""Segments every image, volume and series that arrives in a folder, once: the simplest integration.

There is no state but the outputs. An item is done when its record is there, which is written last;
so whatever dies at whatever moment, the next run goes on where that one was.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from numpy.typing import NDArray

from recallseg.engines.durable import make_folder, replace_file
from recallseg.engines.errors import (
    InputError,
    LibraryError,
    LibraryLockedError,
    OutputError,
)
from recallseg.engines.machine_fault import (
    SHORT_OF_MEMORY,
    SHORT_OF_MEMORY_ERRORS,
    machine_fault,
)
from recallseg.engines.reading import read_text, walk
from recallseg.runtime.formats.dicom_headers import Header, NotGiven
from recallseg.runtime.formats.finding import Item, PassedOver, file_item
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.library import Library
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.segmenting.current import Current
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.decoding import DecodingLimits, IsolatedDecoder
from recallseg.runtime.services.inbox import Inbox
from recallseg.runtime.services.items import ask_again, segment_item, volumes_of
from recallseg.runtime.services.memory import FreeMemory
from recallseg.runtime.services.outputs import WRITTEN, output_base, record_file, time_base
from recallseg.runtime.services.patience import MOST_TIMES, Patience
from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["FAILURE_SCHEMA", "LEFT_OUT_SCHEMA", "Arrival", "Watcher"]

FAILURE_SCHEMA = "recallseg-failure/1"
LEFT_OUT_SCHEMA = "recallseg-left-out/1"
LOCK = ".recallseg-watch.lock"
_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EILSEQ)
"""Faults of one output; others (a full disk) are of all, and end the watch."""
_TEMPORARY = re.compile(  # of replace_file
    rf"\..+({'|'.join(map(re.escape, WRITTEN))})(\.[0-9a-f]+)?\.tmp"
)


@dataclass(frozen=True)
class Arrival:
    """What became of one item: a ``record`` as in NAME.json, or why there is none.

    ``path`` is its file, or the folder that a series lies in; ``name`` as in ``Item``.
    """

    path: Path
    name: str
    record: dict[str, Any] | None
    error: str | None


class Watcher:
    """Watches one folder and those below it.

    An item has arrived when nothing of it has changed for ``settle_s``; what counts as one, see
    :class:`recallseg.runtime.services.inbox.Inbox`. What changed after it was segmented (another
    image under a name, slices that came late) is segmented again, whole; a series of which files
    were taken away is not. What cannot be segmented leaves NAME.error.json, and is
    tried again when a file of it changes. What the disk did not give, or found no room for, says
    nothing of the item: it is tried again after a while, and by the next watch. So is what found
    too little memory, a few times: then it may be the item that needs too much. A series waits
    while a file beside its slices is not given, which may be one; after as many times it is
    segmented without, and again when that file is given.

    Parameters
    ----------
    segmenter : what segments.
    source, output : folders; neither may lie in the other. Only one watcher may write to an output.
    settle_s : seconds without a change.
    volumes : how volumes are treated.
    kind : one of :data:`recallseg.runtime.formats.kinds.FORMATS`: only such images are taken.
    audit : log in which every segmentation is recorded.
    limits : what one item may take while it is decoded.
    renewed : returns what segments from now on: of the segmenter's library, when a head was fitted
        or a structure came, say; or, given None, of another library that is found where that one
        was (after ``library install``); the former is closed then. None: the segmenter stays, and
        the watch ends when its library is replaced.

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
        volumes: VolumeSettings | None = None,
        kind: str | None = None,
        audit: AuditLog | None = None,
        limits: DecodingLimits | None = None,
        renewed: Callable[[Library | None], Segmenter] | None = None,
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
        make_folder(output)
        try:
            self._lock = WriterLock(output / LOCK)
        except LibraryLockedError as error:
            raise InputError(
                f"another process already watches into {output}. Stop it, or choose another folder."
            ) from error
        self._renewed = renewed
        self._segmenter: Segmenter
        self._current: Current
        self._use(segmenter)
        self._output = output
        self._decoder = IsolatedDecoder(limits)
        self._source = source
        self._inbox = Inbox(source, settle_s, self._header, kind)
        self._volumes = volumes or VolumeSettings()
        self._audit = audit
        self._set_aside: dict[str, str] = {}
        self._patience = Patience()
        self._header_patience = Patience()
        try:
            for folder, _, names in walk(output):  # of a watch that was killed: the lock is ours
                for name in filter(_TEMPORARY.fullmatch, names):
                    Path(folder, name).unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def run(self, stop: Event, *, once: bool = False, poll_s: float = 0.5) -> Iterator[Arrival]:
        """Segment what arrives, and yield what became of it, until ``stop`` is set.

        Parameters
        ----------
        stop : looked at between items and while one is decoded; one that is being segmented is
            finished.
        once : end when all that is there now is done.
        poll_s : seconds between two looks at the folder.

        Raises
        ------
        OSError, EngineError, LibraryError, AuditError
            What concerns more than one item ends the watch; what was done stays done.
        """
        self._decoder.stop = stop.is_set
        free = FreeMemory()
        while not stop.is_set():
            free.give_back()
            self._set_aside = {}
            arrived, unsettled = self._inbox.look(self._is_done)
            idle = True
            for item in arrived:
                if stop.is_set():
                    return
                if not item.as_found:
                    continue  # it is written to after all: the next look finds it anew
                idle = False
                self._renew()
                for arrival in self._segment(item):
                    if arrival is None:
                        return
                    yield arrival
            if once and not arrived and not unsettled:
                return
            if idle:
                stop.wait(poll_s)

    @property
    def passed(self) -> tuple[PassedOver, ...]:
        """What the last look at the folder passed over, with reasons."""
        return self._inbox.passed

    @property
    def not_given(self) -> tuple[PassedOver, ...]:
        """Those of them that the machine did not let be looked at: what they are is not known."""
        return self._inbox.not_given

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Names of what the last look found set aside already, by this watch or another: why."""
        return self._set_aside

    def close(self) -> None:
        """Let another process watch into the output folder."""
        self._decoder.close()
        self._lock.release()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _renew(self) -> None:
        """Ask the library that is there now."""
        former = self._segmenter.library
        if former.replaced:
            if self._renewed is None:
                raise LibraryError(
                    f"another library, or none, is found where {former.path} was opened. Start the "
                    "watch anew."
                )
            self._use(self._renewed(None))
            former.close()
            return
        # Where a structure that was asked for is gone, each result of the former says so.
        with suppress(InputError):
            self._segmenter = self._current.get()

    def _use(self, segmenter: Segmenter) -> None:
        renewed, library = self._renewed, segmenter.library
        make = (lambda: segmenter) if renewed is None else partial(renewed, library)
        self._segmenter, self._current = segmenter, Current(library, make, segmenter)

    def _header(self, path: Path) -> Header:
        """Read a DICOM header; what was set aside before, and is the same, is not met again."""
        item = file_item(path, self._source, "dicom")
        failure = _read_record(_failure_file(self._base(item), item))
        if failure is not None and _files(failure, "files") == item.signature:
            return str(failure.get("error"))
        waiting = self._header_patience.of(path, item.signature)
        if waiting is not None and waiting.waits:
            return NotGiven(waiting.why, waiting.fault, waiting.times < MOST_TIMES)
        header = self._decoder.read_header(path)
        if not isinstance(header, NotGiven):
            self._header_patience.forget(path)
            return header
        tried = self._header_patience.put_off(path, item.signature, header.why, header.number)
        return replace(header, awaited=tried.times < MOST_TIMES)

    def _is_done(self, item: Item) -> bool:
        base = self._base(item)
        if self._is_written(item, base):
            return True
        several = _read_record(record_file(time_base(base, 1))) or {}
        count = several.get("volumes") if self._volumes.time == "all" else None
        if (
            type(count) is int
            and count > 0
            and all(self._is_written(item, time_base(base, n + 1)) for n in range(count))
        ):
            return True
        put_off = self._patience.of(item.name, item.signature)
        if put_off is not None:
            self._set_aside[item.name] = put_off.why
            return put_off.waits
        failure = _read_record(_failure_file(base, item))
        if failure is None or _files(failure, "files") != item.signature:
            return False
        if any(failure.get(name) != asked for name, asked in self._chosen().items()):
            return False  # of several volumes or stacks another is asked for
        self._set_aside[item.name] = str(failure.get("error"))
        return True

    def _is_written(self, item: Item, base: Path) -> bool:
        record = _read_record(record_file(base))
        if record is None or record.get("image") != item.name:
            return False
        asked, time = self._volumes.time, record.get("time")
        if time is not None and base == self._base(item):  # is that the volume that is asked for?
            if asked == "all":
                if record.get("volumes") != 1:
                    return False
            elif asked not in (None, time):
                return False
        held, made = record.get("files", 1), _files(record, "signature")
        if type(held) is not int:
            return False  # no record of ours
        if held == len(item.files) and made:  # fewer: some were taken away since
            return made == item.signature
        return held >= len(item.files)

    def _chosen(self) -> dict[str, int | str | None]:
        return {"time": self._volumes.time, "stack": self._volumes.stack}

    def _segment(self, item: Item) -> Iterator[Arrival | None]:
        """Yield what became of each volume of an item; None if it is to stop before one."""
        base = self._base(item)
        try:
            volumes = volumes_of(
                item,
                base,
                self._volumes.time,
                lambda: self._decoder.count(item, self._volumes.stack),
            )
            if volumes is None:
                yield None
                return
            for time, target in volumes:
                other = _read_record(record_file(target))
                if other is not None and other.get("image") != item.name:
                    raise InputError(
                        f"{item.path}: {record_file(target)} is of {other.get('image')}. Rename "
                        "one."
                    )
                image = self._decoder.read(
                    item,
                    voi=self._volumes.voi,
                    as_stored=self._volumes.as_stored,
                    time=time,
                    stack=self._volumes.stack,
                )
                if image is None:
                    yield None
                    return
                extra: dict[str, Any] = {} if time is None else {"time": time}
                if self._volumes.time == "all":
                    extra["volumes"] = len(volumes)
                record = self._write(item, image, target, extra)
                yield Arrival(item.path, item.name, record, None)
        except OSError as error:
            if error.errno not in _OF_THE_NAME:
                raise
            yield Arrival(item.path, item.name, None, f"{printable(base)}: {error.strerror}")
            return
        except (InputError, OutputError, *SHORT_OF_MEMORY_ERRORS) as error:
            yield self._failed(item, base, error)
            return
        self._patience.forget(item.name)
        _failure_file(base, item).unlink(missing_ok=True)

    def _failed(self, item: Item, base: Path, error: BaseException) -> Arrival:
        """Put an item off, or aside if that is its own fault; say why."""
        why = str(error) or "it needs more memory than there is"
        fault = machine_fault(error)
        if not fault:
            return self._put_aside(item, base, why)
        tried = self._patience.put_off(item.name, item.signature, why, fault)
        if fault == SHORT_OF_MEMORY and tried.times >= MOST_TIMES:
            return self._put_aside(item, base, f"{why} ({tried.times} attempts)")
        return Arrival(item.path, item.name, None, printable(f"{why} It is tried again."))

    def _put_aside(self, item: Item, base: Path, why: str) -> Arrival:
        self._patience.forget(item.name)
        make_folder(base.parent)
        failure = {
            "schema": FAILURE_SCHEMA,
            "image": item.name,
            "files": list(item.signature),
            **{name: asked for name, asked in self._chosen().items() if asked is not None},
            "error": why,
        }
        replace_file(_failure_file(base, item), json_text(failure).encode())
        return Arrival(item.path, item.name, None, printable(why))

    def _write(
        self, item: Item, image: NDArray[Any] | Volume, base: Path, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Segment an item and write what was found; return the record."""
        segmenter = self._segmenter
        _, record = ask_again(
            segmenter,
            lambda: segment_item(
                segmenter,
                item,
                image,
                base,
                self._volumes,
                log=self._audit,
                extra={
                    **({"files": len(item.files)} if isinstance(image, Volume) else {}),
                    "signature": list(item.signature),
                    **extra,
                },
            ),
        )
        return record

    def _base(self, item: Item) -> Path:
        return output_base(self._output, item.relative)


def _failure_file(base: Path, item: Item) -> Path:
    return base.with_name(f"{base.name}{item.suffix}.error.json")


def _files(record: Mapping[str, Any], name: str) -> tuple[object, ...]:
    """Return what a record says of files; nothing where it is not ours to read."""
    found = record.get(name)
    return tuple(found) if isinstance(found, list) else ()


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return a record that was written here, or None; what is no record counts as not there."""
    try:
        record = json.loads(read_text(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
