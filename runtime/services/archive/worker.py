"""What one process does: it has one model, looks into sources and segments.

It never raises: what happened is what it answers, and whoever asked decides.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Union

from recallseg.engines.errors import (
    AuditError,
    BundleError,
    EngineError,
    InputError,
    LibraryError,
    OutputError,
    RecallSegError,
)
from recallseg.engines.machine_fault import machine_fault
from recallseg.engines.reading import naming
from recallseg.runtime.formats.finding import Finding, Item
from recallseg.runtime.json_text import printable
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.archive.journal import Task
from recallseg.runtime.services.archive.objects import fetched
from recallseg.runtime.services.archive.sources import Source, find
from recallseg.runtime.services.audit import AuditLog, open_audit
from recallseg.runtime.services.decoding import IsolatedDecoder
from recallseg.runtime.services.items import request_of, segment_item, volumes_of
from recallseg.runtime.services.memory import FreeMemory
from recallseg.runtime.services.outputs import is_done, output_base, record_file
from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = [
    "Answer",
    "AuditFiles",
    "Done",
    "Failed",
    "Looked",
    "Opened",
    "Order",
    "Setup",
    "Worker",
]

_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EILSEQ)
"""Faults of one output; others (a full disk) are of all."""
_OF_THE_WORKER = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
"""What a worker ran out of, and the next one may have."""


@dataclass(frozen=True)
class AuditFiles:
    """Where segmentations are recorded, see :class:`recallseg.runtime.services.audit.AuditLog`."""

    log: Path
    key: Path | None = None
    head: Path | None = None

    def open(self) -> AuditLog:
        """Open the log; raises AuditError."""
        return open_audit(self.log, self.key, self.head)


@dataclass(frozen=True)
class Setup:
    """What every worker is told when it starts; paths are absolute.

    Attributes
    ----------
    asking : keyword arguments of :class:`recallseg.Segmenter`.
    volumes, kind : how images are treated, and which are taken.
    """

    library: Path
    output: Path
    asking: Mapping[str, Any]
    volumes: VolumeSettings
    kind: str | None = None
    audit: AuditFiles | None = None

    def with_threads(self, threads: int) -> Setup:
        """Return the same, with so many CPU threads of a worker."""
        return replace(self, asking={**self.asking, "threads": threads})


@dataclass(frozen=True)
class Opened:
    """A worker is ready: where it runs, and what makes its results."""

    where: str
    node: str
    provenance: str
    structures: tuple[str, ...]
    notice: str


@dataclass(frozen=True)
class Looked:
    """What is in a source."""

    found: Finding


@dataclass(frozen=True)
class Done:
    """An input is segmented.

    Attributes
    ----------
    rows : of the summary, by place of the output.
    fresh : how many were not there before.
    passed, failed : of what was fetched, what is no image and what could not be segmented: why.
    """

    rows: Mapping[str, Mapping[str, Any]]
    fresh: int
    passed: tuple[tuple[str, str], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Failed:
    """What was asked for could not be done.

    Attributes
    ----------
    again : whether another attempt may go otherwise.
    all : whether no other input could go otherwise.
    ends : whether the worker should be replaced.
    error : where ``all``, what to raise.
    """

    why: str
    again: bool = False
    all: bool = False
    ends: bool = False
    error: Exception | None = None


Order = Union[Source, Task]
Answer = Union[Opened, Looked, Done, Failed]


class Worker:
    """Opens library and model once, then does what it is given.

    Parameters
    ----------
    setup : what to open, and how to segment.

    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._decoder = IsolatedDecoder()
        self._segmenter: Segmenter | None = None
        self._log: AuditLog | None = None
        self._provenance = ""
        self._free = FreeMemory()

    def open(self, node: str = "") -> Opened | Failed:
        """Open everything, and answer a query that nobody asked: the first one is slower."""
        from recallseg.runtime.services.logs import silence_libraries

        silence_libraries()
        try:
            setup = self._setup
            library = Library.open(setup.library)
            self._segmenter = Segmenter(library, **setup.asking)
            self._log = None if setup.audit is None else setup.audit.open()
            self._segmenter.warm_up(1)
            made = self._segmenter.provenance
            self._provenance = made.digest
        except (RecallSegError, MemoryError, OSError) as error:
            why = f"the worker on {socket.gethostname()} cannot start: {_told(error)}"
            return Failed(why, all=True, ends=True, error=_saying(error, why))
        return Opened(
            f"{socket.gethostname()} {os.getpid()}",
            node,
            made.digest,
            made.structures,
            self._segmenter.bundle.notice,
        )

    def do(self, order: Order) -> Answer:
        """Look into a source, or segment an input."""
        self._free.give_back()
        try:
            if isinstance(order, Source):
                return Looked(find(order, self._setup.kind, self._decoder.read_header))
            return self._segment(order)
        except OutputError as error:
            everywhere = isinstance(error.__cause__, OSError)
            return Failed(_told(error), all=everywhere, error=error if everywhere else None)
        except (LibraryError, BundleError, AuditError) as error:
            return Failed(_told(error), all=True, ends=True, error=error)
        except InputError as error:
            return Failed(_told(error), again=bool(machine_fault(error)))
        except OSError as error:
            if error.errno in _OF_THE_WORKER:
                return Failed(_told(error), again=True, ends=True)
            everywhere = error.errno not in _OF_THE_NAME
            return Failed(_told(error), all=everywhere, error=error if everywhere else None)
        except (EngineError, MemoryError) as error:
            return Failed(_told(error), again=True, ends=True)
        except ModuleNotFoundError as error:
            return Failed(_told(error), all=True, ends=True, error=error)
        except Exception as error:  # a defect: of one input, as far as anybody knows
            return Failed(f"defect: {type(error).__name__}: {printable(error)}", again=True)

    def _segment(self, task: Task) -> Done | Failed:
        segmenter = self._segmenter
        assert segmenter is not None
        segmenter.library.refresh()
        if segmenter.provenance.digest != self._provenance:
            return _changed()
        if isinstance(task.what, Source):
            return self._segment_source(task.what)
        rows: dict[str, Mapping[str, Any]] = {}
        fresh = 0
        for place, row, new in self._outputs(task.what, task.place):
            rows[place] = row
            fresh += new
            if row["provenance"] != self._provenance:
                return self._take_back(place)
        return Done(rows, fresh)

    def _segment_source(self, source: Source) -> Done | Failed:
        """Fetch a source, find what is in it, and segment that."""
        rows: dict[str, Mapping[str, Any]] = {}
        failed: list[tuple[str, str]] = []
        fresh = 0
        with fetched(source) as here:
            found = find(here.source, self._setup.kind, self._decoder.read_header)
            if found.not_given:
                return Failed(f"{source.named}: {found.not_given[0].reason}", again=True)
            for item in map(here.signed, found.items):
                named = here.named(str(item.path))
                try:
                    for place, row, new in self._outputs(item, Path(source.place) / item.relative):
                        rows[place] = {**row, "input": named}
                        fresh += new
                        if row["provenance"] != self._provenance:
                            return self._take_back(place)
                except InputError as error:
                    if machine_fault(error):
                        raise
                    failed.append((named, here.named(str(error))))
            passed = tuple((here.named(str(p.path)), p.reason) for p in found.passed)
        if not rows:
            why = failed[0][1] if failed else f"there is no image in {source.named}."
            raise InputError(why)
        return Done(rows, fresh, passed, tuple(failed))

    def _outputs(self, item: Item, place: Path) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """Yield each output of an image: its place, row, and whether it was made now."""
        assert self._segmenter is not None
        settings = self._setup.volumes
        base = output_base(self._setup.output, place)
        request = request_of(item, settings)
        volumes = volumes_of(
            item, base, settings.time, lambda: self._decoder.count(item, settings.stack)
        )
        for time, target in volumes or ():
            new = not is_done(target, request, self._segmenter.provenance)
            if new:
                image = self._decoder.read(
                    item,
                    voi=settings.voi,
                    as_stored=settings.as_stored,
                    time=time,
                    stack=settings.stack,
                )
                assert image is not None  # nobody stops the decoder here
                segment_item(
                    self._segmenter,
                    item,
                    image,
                    target,
                    settings,
                    log=self._log,
                    extra={"request": request},
                )
            yield str(target.relative_to(self._setup.output)), _row(target, item), new

    def _take_back(self, place: str) -> Failed:
        """Let an output that was made while the library changed not count as done."""
        record_file(self._setup.output / place).unlink(missing_ok=True)
        return _changed()


def _changed() -> Failed:
    why = (
        "the library was changed while the archive was segmented. Outputs that were made before "
        "stay; segment the rest with a copy of the library as it was, or choose another --output."
    )
    return Failed(why, all=True, ends=True, error=InputError(why))


def _saying(error: Exception, why: str) -> Exception:
    """Return an error of the same kind with another text, if it is one of ours."""
    return type(error)(why) if isinstance(error, RecallSegError) else error


def _row(base: Path, item: Item) -> dict[str, Any]:
    """Return what the summary says of an output: all of it from the record."""
    file = record_file(base)
    with naming(file), file.open(encoding="utf-8") as stream:
        record = json.load(stream)
        written = os.fstat(stream.fileno()).st_mtime
    quality = record["quality"]
    flags = quality["flags"] if "flags" in quality else {quality["flag"]: 1}
    sizes = record.get("voxels") or record.get("pixels") or {}
    return {
        "input": str(item.path),
        "series": record["image"],
        "format": item.kind,
        "mask": record["mask"],
        "flags": flags,
        "sizes": sizes,
        "millilitres": record.get("millilitres") or {},
        "square_mm": record.get("square_mm") or {},
        "recipe": record["provenance"]["recipe"]["digest"],
        "provenance": record["provenance"]["digest"],
        "seconds": round(record["timings_ms"]["total"] / 1000, 4),
        "finished": datetime.fromtimestamp(written, timezone.utc).isoformat(),
    }


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename or ''}: {error.strerror}".removeprefix(": "))
    return printable(error) or "it needs more memory than there is"
