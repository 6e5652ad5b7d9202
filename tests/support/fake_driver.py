"""A device in the host's memory, on any machine: for tests of everything above the driver.

Work is done when it is queued, or, as late as a driver may, when somebody waits for it; in a stream
that is being captured it is recorded. Every call is checked as a driver checks it (addresses inside
live allocations, handles that exist), and any call can be told to fail.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any, ClassVar, Union

import numpy as np

from recallseg.engines.device.driver import LOST, OUT_OF_MEMORY, Driver, DriverError

__all__ = ["FakeDriver"]

_INVALID_VALUE, _INVALID_HANDLE, _NOT_FOUND, _INVALID_IMAGE = 1, 400, 500, 200
_CAPTURE_UNSUPPORTED, _CAPTURE_INVALIDATED = 900, 901
_SPOILING = frozenset(
    {
        *("allocate", "free", "allocate_pinned", "free_pinned", "load_module", "unload_module"),
        *("synchronize", "synchronize_stream", "synchronize_event", "elapsed_ms"),
        *("create_stream", "create_event", "destroy_stream", "destroy_event"),
        *("destroy_executable", "launch_graph"),
    }
)
"""What CUDA may refuse every thread of a process in which something is being recorded, and which
spoils that (cudaThreadExchangeStreamCaptureMode; it lists none): all that waits, takes or frees."""

Kernel = Callable[[tuple[int, int, int], tuple[int, int, int], Sequence[Any]], None]
"""What stands in for a kernel: grid, block, and its arguments (ctypes scalars)."""


@dataclass
class _Mark:
    """A place in a stream's queue that an event was recorded at."""

    stream: int
    reached: bool = False


@dataclass(frozen=True)
class _Wait:
    """Nothing behind it runs before the mark is reached."""

    mark: _Mark


_Queued = Union[Callable[[], object], _Mark, _Wait]


class FakeDriver(Driver):
    """See the module.

    Parameters
    ----------
    memory : bytes of the device.
    capability : compute capability, 87 being 8.7.
    integrated : whether it says that it shares the host's memory.
    cuda : CUDA version of the driver.
    devices : how many there are.
    kernels : by name; an image is loaded if it contains their names.
    deferred : do queued work when somebody waits for it and no sooner: whatever is reused too early
        on the host, or not ordered between streams, comes out wrong.

    Attributes
    ----------
    calls : the names of all calls, in order.
    recording : stream and thread of somebody else who records, as ONNX Runtime does.
    """

    name: ClassVar[str] = "fake"

    def __init__(
        self,
        *,
        memory: int = 1 << 30,
        capability: int = 87,
        integrated: bool = False,
        cuda: int = 12060,
        devices: int = 1,
        kernels: dict[str, Kernel] | None = None,
        deferred: bool = False,
    ) -> None:
        self.total = memory
        self.calls: list[str] = []
        self._facts = (capability, integrated, cuda, devices)
        self._kernels = kernels or {}
        self._blocks: dict[int, np.ndarray[Any, Any]] = {}
        self._pinned: dict[int, np.ndarray[Any, Any]] = {}
        # The default streams are always there.
        self._things: dict[int, Any] = {1: ("default stream", []), 2: ("default stream", [])}
        self._deferred = deferred
        self._lock = RLock()  # several threads may call a driver
        self._pending: dict[int, deque[_Queued]] = {}
        self._next = 1000
        self._context = 0
        self._faults: dict[str, tuple[int, int]] = {}
        self._dead = 0
        self._capturing: int | None = None
        self.recording: tuple[int, int] | None = None
        self._spoilt = False
        self._clock = 0.0

    def fail(self, call: str, status: int, after: int = 0) -> None:
        """Let a call fail once, after it has worked ``after`` times; fatal statuses stay."""
        self._faults[call] = (status, after)

    @property
    def live(self) -> dict[str, int]:
        """How many things of each kind have not been given back."""
        kinds = [kind for kind, *_ in self._things.values() if kind != "default stream"]
        return {
            "buffers": len(self._blocks),
            "pinned": len(self._pinned),
            **{kind: kinds.count(kind) for kind in sorted(set(kinds))},
        }

    def _enter(self, call: str, *, needs_context: bool = True) -> None:
        self.calls.append(call)
        if self._dead:
            raise DriverError(self._dead, call, "the device is lost")
        if call in self._faults:
            status, after = self._faults[call]
            if after:
                self._faults[call] = (status, after - 1)
            else:
                del self._faults[call]
                self._dead = status if status in LOST else 0
                raise DriverError(status, call, "injected")
        if call in _SPOILING and (self.recording or self._capturing is not None):
            self._spoilt = True
            raise DriverError(_CAPTURE_UNSUPPORTED, call, "not while capturing")
        if needs_context and not self._context:
            raise DriverError(201, call, "invalid device context")

    def _new(self, kind: str, *values: Any) -> int:
        self._next += 1
        self._things[self._next] = (kind, *values)
        return self._next

    def _get(self, handle: int, kind: str, call: str) -> Any:
        found = self._things.get(handle)
        if found is None or not str(found[0]).endswith(kind):
            raise DriverError(_INVALID_HANDLE, call, f"{handle} is no {kind}")
        return found

    def _drop(self, handle: int, kind: str, call: str) -> None:
        self._enter(call)
        self._get(handle, kind, call)
        del self._things[handle]

    def _inside(self, address: int, size: int, call: str) -> None:
        for blocks in (self._blocks, self._pinned):
            for start, block in blocks.items():
                if start <= address and address + size <= start + block.nbytes:
                    return
        raise DriverError(
            _INVALID_VALUE, call, f"{size} bytes at {address:#x} are not in device memory"
        )

    def _queue(self, stream: int, work: Callable[[], object], call: str) -> None:
        if self.recording and self.recording[0] == stream and self.recording[1] != get_ident():
            self._spoilt = True  # it would be recorded
        with self._lock:
            if stream:
                self._get(stream, "stream", call)
            if self._capturing is not None and self._capturing == stream:
                self._things[stream][1].append(work)
            elif self._deferred:
                self._pending.setdefault(stream, deque()).append(work)
            else:
                work()

    def _drain(self, stream: int, until: _Mark | None = None) -> None:
        """Do what is pending in a stream, and in others as far as it waits for them."""
        with self._lock:
            pending = self._pending.get(stream, deque())
            while pending and not (until is not None and until.reached):
                work = pending.popleft()
                if isinstance(work, _Mark):
                    work.reached = True
                elif not isinstance(work, _Wait):
                    work()
                elif not work.mark.reached:
                    self._drain(work.mark.stream, work.mark)

    def _drain_all(self) -> None:
        for stream in list(self._pending):
            self._drain(stream)

    def _is_pinned(self, host: int) -> bool:
        return any(start <= host < start + block.nbytes for start, block in self._pinned.items())

    # Device and context

    def version(self) -> int:
        self._enter("version", needs_context=False)
        return self._facts[2]

    def device_count(self) -> int:
        self._enter("device_count", needs_context=False)
        return self._facts[3]

    def device_name(self, ordinal: int) -> str:
        return "Stand-in"

    def device_attribute(self, ordinal: int, attribute: int) -> int:
        capability, integrated = self._facts[:2]
        return {75: capability // 10, 76: capability % 10, 18: int(integrated)}[attribute]

    def current_context(self) -> int:
        self._enter("current_context", needs_context=False)
        return self._context

    def retain_primary_context(self, ordinal: int) -> int:
        self._enter("retain_primary_context", needs_context=False)
        return 1

    def context_device(self) -> int:
        self._enter("context_device")
        return 0

    def set_context(self, context: int) -> None:
        self._enter("set_context", needs_context=False)
        self._context = context

    def synchronize(self) -> None:
        self._enter("synchronize")
        self._drain_all()

    # Memory

    def memory(self) -> tuple[int, int]:
        self._enter("memory")
        return self.total - sum(block.nbytes for block in self._blocks.values()), self.total

    def allocate(self, size: int) -> int:
        self._enter("allocate")
        if size > self.total - sum(block.nbytes for block in self._blocks.values()):
            raise DriverError(OUT_OF_MEMORY, "allocate", "out of memory")
        return _keep(self._blocks, size)

    def free(self, address: int) -> None:
        self._enter("free")
        self._drain_all()
        if self._blocks.pop(address, None) is None:
            raise DriverError(_INVALID_VALUE, "free", f"{address:#x} is not allocated")

    def allocate_pinned(self, size: int) -> int:
        self._enter("allocate_pinned")
        return _keep(self._pinned, size)

    def free_pinned(self, address: int) -> None:
        self._enter("free_pinned")
        self._drain_all()
        if self._pinned.pop(address, None) is None:
            raise DriverError(_INVALID_VALUE, "free_pinned", f"{address:#x} is not allocated")

    def device_address(self, address: int) -> int:
        self._enter("device_address")
        if address not in self._pinned:
            raise DriverError(_INVALID_VALUE, "device_address", f"{address:#x} is not pinned")
        return address

    def ordinal_of(self, address: int) -> int:
        self._enter("ordinal_of")
        self._inside(address, 1, "ordinal_of")
        return 0

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        self._enter("copy_in")
        self._inside(address, size, "copy_in")
        source: Any = host
        if self._deferred and not self._is_pinned(host):
            source = ctypes.string_at(host, size)  # CUDA has such memory staged when it returns
        self._queue(stream, lambda: ctypes.memmove(address, source, size), "copy_in")

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        self._enter("copy_out")
        self._inside(address, size, "copy_out")
        self._queue(stream, lambda: ctypes.memmove(host, address, size), "copy_out")
        if not self._is_pinned(host) and self._capturing != stream:
            self._drain(stream)  # CUDA returns when such memory is filled

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._enter("copy")
        self._inside(target, size, "copy")
        self._inside(source, size, "copy")
        self._queue(stream, lambda: ctypes.memmove(target, source, size), "copy")

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        self._enter("fill")
        self._inside(address, size, "fill")
        self._queue(stream, lambda: ctypes.memset(address, value, size), "fill")

    # Streams and events

    def create_stream(self) -> int:
        self._enter("create_stream")
        return self._new("stream", [], self._context)

    def context_of(self, stream: int) -> int | None:
        self._enter("context_of")
        found: int = self._get(stream, "stream", "context_of")[2]
        return found

    def destroy_stream(self, stream: int) -> None:
        self._drop(stream, "stream", "destroy_stream")

    def synchronize_stream(self, stream: int) -> None:
        self._enter("synchronize_stream")
        self._get(stream, "stream", "synchronize_stream")
        self._drain(stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._enter("wait_event")
        self._get(stream, "stream", "wait_event")
        mark = self._get(event, "event", "wait_event")[1][1]
        if mark is not None:
            self._pending.setdefault(stream, deque()).append(_Wait(mark))

    def create_event(self) -> int:
        self._enter("create_event")
        return self._new("event", [None, None])

    def destroy_event(self, event: int) -> None:
        self._drop(event, "event", "destroy_event")

    def record_event(self, event: int, stream: int) -> None:
        self._enter("record_event")
        self._clock += 1.0
        self._get(stream, "stream", "record_event")
        mark = _Mark(stream) if self._deferred else None
        self._get(event, "event", "record_event")[1][:] = self._clock, mark
        if mark is not None:
            self._pending.setdefault(stream, deque()).append(mark)

    def synchronize_event(self, event: int) -> None:
        self._enter("synchronize_event")
        mark = self._get(event, "event", "synchronize_event")[1][1]
        if mark is not None:
            self._drain(mark.stream, mark)

    def elapsed_ms(self, start: int, end: int) -> float:
        self._enter("elapsed_ms")
        times = [self._get(event, "event", "elapsed_ms")[1][0] for event in (start, end)]
        if None in times:
            raise DriverError(_INVALID_HANDLE, "elapsed_ms", "an event was not recorded")
        return float(times[1] - times[0])

    # Graphs

    def begin_capture(self, stream: int) -> None:
        self._enter("begin_capture")
        self._get(stream, "stream", "begin_capture")[1].clear()
        self._capturing, self._spoilt = stream, False

    def end_capture(self, stream: int) -> int:
        self._capturing = None
        self._enter("end_capture")
        if self._spoilt:
            raise DriverError(_CAPTURE_INVALIDATED, "end_capture", "the capture was invalidated")
        return self._new("graph", list(self._get(stream, "stream", "end_capture")[1]))

    def instantiate(self, graph: int) -> int:
        self._enter("instantiate")
        work = self._get(graph, "graph", "instantiate")[1]
        del self._things[graph]
        return self._new("executable", work)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._enter("launch_graph")
        for work in self._get(executable, "executable", "launch_graph")[1]:
            self._queue(stream, work, "launch_graph")

    def destroy_executable(self, executable: int) -> None:
        self._drop(executable, "executable", "destroy_executable")

    # Kernels

    def load_module(self, image: bytes) -> int:
        self._enter("load_module")
        if not any(name.encode() in image for name in self._kernels):
            raise DriverError(_INVALID_IMAGE, "load_module", "device kernel image is invalid")
        return self._new("module", image)

    def unload_module(self, module: int) -> None:
        self._drop(module, "module", "unload_module")

    def function(self, module: int, name: str) -> int:
        self._enter("function")
        self._get(module, "module", "function")
        if name not in self._kernels:
            raise DriverError(_NOT_FOUND, "function", f"named symbol not found: {name}")
        return sorted(self._kernels).index(name)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        self._enter("launch")
        kernel = self._kernels[sorted(self._kernels)[function]]
        values = [type(argument)(argument.value) for argument in arguments]
        self._queue(stream, lambda: kernel(grid, block, values), "launch")


def _keep(blocks: dict[int, np.ndarray[Any, Any]], size: int) -> int:
    """Allocate as a GPU does, on a boundary of 256 bytes; 0xcd as nobody has written it yet."""
    raw = np.full(size + 256, 0xCD, np.uint8)
    start = -raw.ctypes.data % 256
    block = raw[start : start + size]
    address = int(block.ctypes.data)
    blocks[address] = block
    return address
