"""What librecallseg calls: the runtime with nothing but numbers, text, tuples and memory.

The C library (``engines/native/capi``) holds the objects that these functions return, looks into
none of them, and calls one function for each of its own. ``INTERFACE`` is the number that both must
have: raise it, there too, whenever a signature here changes.

Pixels come as :data:`~recallseg.runtime.services.c_pixels.Pixels`; the C library takes its memory
back when a call is over, so nothing here may keep an array.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional
from weakref import WeakValueDictionary

import recallseg
from recallseg.engines import errors
from recallseg.engines.device import Device, open_device
from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.registry import engine_class
from recallseg.engines.session_log import send_session_logs
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.model.model import GpuOptions, Model
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog, open_audit
from recallseg.runtime.services.audited import AuditedSegmenter
from recallseg.runtime.services.c_errors import Stopped, status_of
from recallseg.runtime.services.c_pixels import Pixels, array_of, check_place, release
from recallseg.runtime.services.c_results import LEFT_OUT, Query, Tags, record
from recallseg.runtime.services.scheduling import Scheduling
from recallseg.runtime.services.stream import Frame, Stream, close_streams

__all__ = [
    "INTERFACE",
    "add",
    "calibrate",
    "close_library",
    "close_stream",
    "close_streams",
    "count_frames",
    "create_library",
    "describe",
    "drain_stream",
    "library_facts",
    "list_exemplars",
    "open_audit",
    "open_library",
    "open_segmenter",
    "open_stream",
    "pause_stream",
    "push_frame",
    "reinstate",
    "release",
    "remove",
    "restart_stream",
    "resume_stream",
    "retire",
    "segment",
    "set_log",
    "status_of",
    "verify",
    "warm_up",
]

INTERFACE = 5

Gpu = tuple[int, int, str, bool, int]
"""Ordinal, stream (0: one of its own), provider, whether with CUDA graphs, bytes of the cache (0:
the default)."""

Names = tuple[str, ...]

log = logging.getLogger("recallseg.embedding")
# A host without a callback has not asked for lines on its stderr.
logging.getLogger("recallseg").addHandler(logging.NullHandler())


def describe() -> Names:
    """Return Python's version, executable and prefix, the package's version and folder."""
    folder = str(Path(recallseg.__file__).parent)
    return platform.python_version(), sys.executable, sys.prefix, recallseg.__version__, folder


class _Handler(logging.Handler):
    def __init__(self, emit: Callable[[int, str, str], None]) -> None:
        super().__init__()
        self._pass_on = emit
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                told = f"{self._lost} lines could not be passed on: too little memory"
                self._pass_on(logging.WARNING, log.name, told)
                self._lost = 0
            self._pass_on(record.levelno, record.name, record.getMessage())
        except Exception:  # logging never stops a query, and stderr is the host's
            self._lost += 1


_handlers: list[_Handler] = []


def set_log(emit: Callable[[int, str, str], None] | None, level: int, library: str) -> None:
    """Send what RecallSeg logs to ``emit`` (level, logger, message), instead of any earlier one.

    ``library`` is librecallseg, which ONNX Runtime's sessions log to.
    """
    send_session_logs(Path(library), level if emit is not None else logging.WARNING)
    logger = logging.getLogger("recallseg")
    while _handlers:
        logger.removeHandler(_handlers.pop())
    if emit is not None:
        handler = _Handler(emit)
        _handlers.append(handler)
        logger.addHandler(handler)
    logger.setLevel(level if emit is not None else logging.NOTSET)


def open_library(
    folder: str,
    bundle: str | None,
    writable: bool,
    engine: str,
    precision: str,
    threads: int,
    gpu: Gpu | None,
) -> Library:
    """Open a library."""
    library = Library.open(
        folder,
        bundle,
        mode="write" if writable else "read",
        engine=engine,
        precision=precision,
        threads=threads or None,
        gpu=gpu_options(gpu, engine),
    )
    log.info("opened %r", library)
    return library


def create_library(
    folder: str,
    bundle: str | None,
    writable: bool,
    engine: str,
    precision: str,
    threads: int,
    gpu: Gpu | None,
) -> Library:
    """Make an empty library, open for writing whatever ``writable`` says."""
    if bundle is None:
        raise errors.InputError("a new library needs a bundle: its folder, or the name of one.")
    return Library.create(
        folder,
        bundle,
        engine=engine,
        precision=precision,
        threads=threads or None,
        gpu=gpu_options(gpu, engine),
    )


_devices: WeakValueDictionary[tuple[int, int, str], Device] = WeakValueDictionary()


def gpu_options(gpu: Gpu | None, engine: str) -> GpuOptions | None:
    """Return how a GPU is used; equal values give one device, so that models are shared."""
    if gpu is None:
        return None
    if not issubclass(engine_class(engine), DeviceEngine):
        raise errors.InputError(
            f"engine '{engine}' runs on the CPU: leave gpu null, or choose another engine."
        )
    ordinal, stream, provider, graphs, cache_bytes = gpu
    key = ordinal, stream, provider
    device = _devices.get(key)
    if device is None or device.lost or not device.serves_this_thread:
        device = open_device(provider, ordinal, stream or None)  # type: ignore[arg-type]
        _devices[key] = device
    return GpuOptions(device, graphs, cache_bytes or GpuOptions.cache_bytes)


def library_facts(library: Library) -> tuple[bool, int, int, str, str, str, str]:
    """Return writable, exemplars, structures; bundle's name and identity, digest, notice."""
    bundle = library.bundle
    return (
        library.writable,
        len(library),
        len(library.structures),
        bundle.name,
        library.bundle_identity,
        library.digest,
        bundle.notice,
    )


def close_library(library: Library) -> None:
    """Close a library that nothing uses any more; nobody is left to be told but the log."""
    try:
        library.close()
    except (errors.RecallSegError, OSError) as error:
        log.error("%r was not closed well: %s", library, error)


def add(
    library: Library,
    image: Pixels,
    masks: Sequence[tuple[str, Pixels]],
    absent: Names,
    tags: Tags,
    key: str | None,
) -> str:
    """Add an exemplar and return its key."""
    _refuse_repeats([name for name, _ in masks], "mask of")
    _refuse_repeats([name for name, _ in tags], "tag")
    if isinstance(image[0], int):
        raise errors.InputError(
            "an exemplar's image must lie on the host, where it is stored from, and this one has "
            "location RECALLSEG_CUDA: copy it to the host."
        )
    return library.add(
        array_of(image),
        {name: array_of(mask) for name, mask in masks},
        absent=absent,
        tags=dict(tags),
        key=key,
    )


def remove(library: Library, key: str) -> None:
    """Erase an exemplar."""
    library.remove(key)


def retire(library: Library, key: str) -> None:
    """Recall an exemplar no more."""
    library.retire(key)


def reinstate(library: Library, key: str) -> None:
    """Recall a retired exemplar again."""
    library.reinstate(key)


def list_exemplars(library: Library) -> tuple[tuple[Any, ...], ...]:
    """Return all exemplars, the retired ones last, as the C library's ``Listed`` reads them."""

    def listed(one: Exemplar) -> tuple[Any, ...]:
        tags = tuple(text for tag in one.tags.items() for text in tag)
        return (
            *(one.key, one.created, one.content, tuple(one.structures), tuple(one.absent), tags),
            *(one.height, one.width, one.has_source, one.retired),
        )

    return tuple(listed(one) for one in (*library, *library.retired))


def verify(library: Library, report: Report, address: int) -> tuple[int, int, int, int, int, str]:
    """Return how many exemplars, memories, sources, indexes were read; what is wrong, how much."""
    found = library.verify(follow(report, address))
    counts = found.exemplars, found.memories, found.sources, found.indexes
    return (*counts, len(found.problems), "\n".join(found.problems))


def open_segmenter(
    library: Library,
    k: int,
    structures: Names | None,
    engine: str,
    precision: str,
    threads: int,
    memories: int,
    tags: Tags,
    reach: float,
    audit: AuditLog | None,
    gpu: Gpu | None,
    scheduling: tuple[tuple[int, ...], int, int],
) -> tuple[Query, Names]:
    """Return what :func:`segment` takes, and the structures in the order of their labels.

    A ``reach`` of 0 stands for the default.
    """
    _refuse_repeats([name for name, _ in tags], "tag")
    settings: dict[str, Any] = {
        "k": k,
        "structures": structures,
        "engine": engine,
        "precision": precision,
        "threads": threads or None,
        "tags": dict(tags),
        "frames": memories,
        "reach": reach or REACH,
        "gpu": gpu_options(gpu, engine),
    }
    how = Scheduling(*scheduling)

    def opened() -> Segmenter:
        if how and not on_device:  # threads that are there already would stay as they are
            settings["model"] = Model.open(
                library.bundle, engine=engine, precision=precision, threads=threads or None
            )
        if audit is None:
            return Segmenter(library, **settings)
        return AuditedSegmenter(library, audit=audit, **settings)

    on_device = issubclass(engine_class(engine), DeviceEngine)
    # The context of a GPU is that of the calling thread.
    segmenter = opened() if on_device else how.run(opened)
    if segmenter.bundle.notice:
        log.warning("%s", segmenter.bundle.notice)
    log.info("opened %r", segmenter)
    return Query(segmenter, how), segmenter.structures


def warm_up(query: Query, runs: int) -> None:
    """Run on a blank image."""
    query.segmenter.warm_up(runs)


Report = Callable[[int, int, int], int]
"""Is told an address, how many are done and of how many; returns 0 to stop."""


def follow(report: Report, address: int) -> Callable[[int, int], None]:
    """Return a progress callback that tells the caller, and stops when it is told to."""

    def progress(done: int, total: int) -> None:
        if not report(address, done, total):
            raise Stopped(f"stopped by the progress callback, after {done} of {total}.")

    return progress


def cancelled_since(begun: tuple[int, int]) -> Callable[[], bool]:
    """Return what tells whether a call was cancelled since it began.

    Parameters
    ----------
    begun : address of the number of cancels (uint64), which outlives the call, and what it was.
    """
    address, before = begun
    cancels = ctypes.c_uint64.from_address(address)
    return lambda: cancels.value != before


def calibrate(
    query: Query, report: Report, address: int, begun: tuple[int, int]
) -> tuple[tuple[Any, ...], ...]:
    """Calibrate, and return what ``recallseg_calibration`` holds, for each structure.

    ``report`` and ``address``: see :func:`follow`; ``begun``: see :func:`cancelled_since`.
    """
    told, cancelled = follow(report, address), cancelled_since(begun)

    def progress(done: int, total: int) -> None:
        if cancelled():
            raise errors.CancelledError(f"cancelled after {done} of {total}.")
        told(done, total)

    found = query.segmenter.calibrate(progress)

    def number(value: float | None) -> float:
        return float("nan") if value is None else value

    return tuple(
        (
            limits.iou is not None,
            limits.exemplars,
            number(limits.distance),
            number(limits.iou),
            number(limits.dice),
            LEFT_OUT[limits.left_out],
        )
        for limits in (found[name] for name in query.segmenter.structures)
    )


def segment(
    query: Query,
    image: Pixels,
    label_map: Optional[Pixels],
    masks: Optional[Pixels],
    deadline_ms: float | None,
    pixel_area: float,
    wanted: bool,
    begun: tuple[int, int],
) -> tuple[Any, ...] | None:
    """Segment an image into caller-owned memory.

    Parameters
    ----------
    label_map, masks : rows x columns, and structures x rows x columns, of bytes.
    pixel_area : in square millimetres, NaN if unknown.
    wanted : whether the caller reads :func:`record`; otherwise None is returned.
    begun : see :func:`cancelled_since`.
    """
    for what, pixels in (("image", image), ("output", label_map or masks)):
        check_place(query.segmenter, what, pixels)
    result = query.segmenter.segment(
        array_of(image),
        deadline_ms=deadline_ms,
        out=(
            None if label_map is None else array_of(label_map),
            None if masks is None else array_of((masks[0], "?", *masks[2:])),
        ),
        cancelled=cancelled_since(begun),
    )
    return record(query, result, pixel_area) if wanted else None


def open_stream(
    query: Query, emit: Callable[..., None], deadline_ms: float | None, queue: int
) -> Stream:
    """Return a stream whose frames go to ``emit``, as the C library's ``read_frame`` takes them."""

    def on_result(frame: Frame) -> None:
        if frame.result is None:
            status, message = status_of(frame.error or RuntimeError("a frame without a result"))
            emit(frame.number, frame.waited_ms, frame.latency_ms, status, message)
            return
        label_map = frame.result.label_map
        emit(
            *(frame.number, frame.waited_ms, frame.latency_ms, 0, ""),
            record(query, frame.result, float("nan")),
            *(label_map.ctypes.data, *label_map.shape),
        )

    return query.scheduling.run(
        lambda: Stream(query.segmenter, on_result, deadline_ms=deadline_ms, queue=queue)
    )


def push_frame(stream: Stream, query: Query, image: Pixels) -> int:
    """Hand over a frame, which the stream copies; return its number."""
    check_place(query.segmenter, "image", image)
    return stream.push(array_of(image))


def pause_stream(stream: Stream) -> None:
    """Ignore what is pushed."""
    stream.pause()


def resume_stream(stream: Stream) -> None:
    """Take frames again."""
    stream.resume()


def restart_stream(stream: Stream) -> None:
    """Forget the frames so far."""
    stream.restart()


def drain_stream(stream: Stream, timeout_s: float) -> bool:
    """Wait until nothing waits; False if that took too long."""
    return stream.drain(timeout_s)


def count_frames(stream: Stream) -> tuple[int, ...]:
    """Return pushed, segmented, dropped, late, failed, ignored."""
    s = stream.statistics
    return s.pushed, s.segmented, s.dropped, s.late, s.failed, s.ignored


def close_stream(stream: Stream) -> None:
    """Stop a stream."""
    stream.close()


def _refuse_repeats(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise errors.InputError(f"the {what} '{name}' is given twice.")
