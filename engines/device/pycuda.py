"""The driver through PyCUDA, which device software that already holds a context often uses.

PyCUDA hands out objects that own what they stand for; they are kept here by handle until what they
stand for is given back. It knows no CUDA graphs, and its exceptions carry words but no status:
those are looked up in the driver itself.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from recallseg.engines.device.driver import Driver, DriverError
from recallseg.engines.errors import InputError
from recallseg.engines.imports import import_needed

__all__ = ["PyCuda"]

_UNKNOWN = 999
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class PyCuda(Driver):
    """See :class:`Driver`.

    Raises
    ------
    EngineUnavailableError
        If PyCUDA or the driver's library is missing.
    """

    name: ClassVar[str] = "pycuda"
    graphs: ClassVar[bool] = False
    foreign_streams: ClassVar[bool] = False

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # It warns and then raises: the error says both.
            warnings.simplefilter("ignore", UserWarning)
            self._api: Any = import_needed(
                "pycuda.driver",
                "device provider 'pycuda'",
                "pip install 'recallseg[pycuda]' beside the NVIDIA driver (docs/device/gpu.md), or "
                "choose engine onnxruntime-cpu",
            )
        self._kept: dict[int, Any] = {}
        self._here = threading.local()  # its `pushed`: see _Pushed
        self._ended = False
        self._statuses = _statuses_by_words()
        self._call("init")

    def _call(self, name: str, *arguments: Any, of: Any = None) -> Any:
        try:
            return getattr(self._api if of is None else of, name)(*arguments)
        except self._api.Error as error:
            # "cuMemAlloc failed: out of memory", sometimes with " - " and more behind it
            call, _, said = str(error).partition(" failed: ")
            status = self._statuses.get(said.split(" - ", 1)[0], _UNKNOWN)
            raise DriverError(status, call, said) from error

    def _keep(self, handle: int, thing: Any) -> int:
        self._kept[handle] = thing
        return handle

    def version(self) -> int:
        return int(self._call("get_driver_version"))

    def device_count(self) -> int:
        return int(self._call("count", of=self._api.Device))

    def device_name(self, ordinal: int) -> str:
        return str(self._call("name", of=self._call("Device", ordinal)))

    def device_attribute(self, ordinal: int, attribute: int) -> int:
        which = self._api.device_attribute.values[attribute]
        return int(self._call("get_attribute", which, of=self._call("Device", ordinal)))

    def current_context(self) -> int:
        context = self._call("get_current", of=self._api.Context)
        return 0 if context is None else self._keep(int(context.handle), context)

    def retain_primary_context(self, ordinal: int) -> int:
        context = self._call("retain_primary_context", of=self._call("Device", ordinal))
        return self._keep(int(context.handle), context)

    def context_device(self) -> int:
        here = self._call("get_device", of=self._api.Context).pci_bus_id()
        count = self.device_count()
        return next(n for n in range(count) if self._api.Device(n).pci_bus_id() == here)

    def set_context(self, context: int) -> None:
        current = self._call("get_current", of=self._api.Context)
        if self._ended or (current is not None and int(current.handle) == context):
            return
        if not hasattr(self._here, "pushed"):
            self._here.pushed = _Pushed(self._api)
            if threading.current_thread() is threading.main_thread():
                atexit.register(self._end)
        self._call("push", of=self._kept[context])
        self._here.pushed.count += 1

    def _end(self) -> None:
        """Leave the main thread's contexts as they were found; nothing is pushed any more."""
        self._ended = True
        self._here.pushed.pop()

    def synchronize(self) -> None:
        self._call("synchronize", of=self._api.Context)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("mem_get_info")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        block = self._call("mem_alloc", size)
        return self._keep(int(block), block)

    def free(self, address: int) -> None:
        self._call("free", of=self._kept.pop(address))

    def allocate_pinned(self, size: int) -> int:
        flags = self._api.host_alloc_flags.PORTABLE | self._api.host_alloc_flags.DEVICEMAP
        array = self._call("pagelocked_empty", size, np.uint8, "C", flags)
        return self._keep(int(array.ctypes.data), array)

    def free_pinned(self, address: int) -> None:
        self._call("free", of=self._kept.pop(address).base)

    def device_address(self, address: int) -> int:
        return int(self._call("get_device_pointer", of=self._kept[address].base))

    def ordinal_of(self, address: int) -> int:
        self._call("mem_get_address_range", address)  # refuses what is nobody's
        return self.context_device()

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        self._call("memcpy_htod_async", address, _bytes_at(host, size), self._kept[stream])

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        self._call("memcpy_dtoh_async", _bytes_at(host, size), address, self._kept[stream])

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("memcpy_dtod_async", target, source, size, self._kept[stream])

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        self._call("memset_d8_async", address, value, size, self._kept[stream])

    def create_stream(self) -> int:
        stream = self._call("Stream", _NON_BLOCKING)
        return self._keep(int(stream.handle), stream)

    def adopt_stream(self, stream: Any) -> int:
        if not isinstance(stream, self._api.Stream):
            raise InputError(
                f"provider pycuda takes pycuda.driver.Stream objects, got {type(stream).__name__}. "
                "Pass one, or use provider cuda-bindings."
            )
        return self._keep(int(stream.handle), stream)

    def destroy_stream(self, stream: int) -> None:
        del self._kept[stream]

    def synchronize_stream(self, stream: int) -> None:
        self._call("synchronize", of=self._kept[stream])

    def wait_event(self, stream: int, event: int) -> None:
        self._call("wait_for_event", self._kept[event], of=self._kept[stream])

    def create_event(self) -> int:
        event = self._call("Event")
        return self._keep(id(event), event)

    def destroy_event(self, event: int) -> None:
        del self._kept[event]

    def record_event(self, event: int, stream: int) -> None:
        self._call("record", self._kept[stream], of=self._kept[event])

    def synchronize_event(self, event: int) -> None:
        self._call("synchronize", of=self._kept[event])

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("time_since", self._kept[start], of=self._kept[end]))

    def load_module(self, image: bytes) -> int:
        module = self._call("module_from_buffer", image)
        return self._keep(id(module), module)

    def unload_module(self, module: int) -> None:
        del self._kept[module]

    def function(self, module: int, name: str) -> int:
        function = self._call("get_function", name, of=self._kept[module])
        return self._keep(id(function), function)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        packed = pack(arguments)
        self._call(
            "_launch_kernel",
            grid,
            block,
            packed,
            shared_bytes,
            self._kept[stream],
            of=self._kept[function],
        )


class _Pushed:
    """The contexts that one thread has pushed, given back when it ends.

    PyCUDA keeps a stack for each thread, and aborts the process if one ends that is not empty.
    """

    def __init__(self, api: Any) -> None:
        self._api, self.count = api, 0

    def pop(self) -> None:
        while self.count:
            self.count -= 1
            with suppress(self._api.Error):  # of a lost device; the rest still has to go
                self._api.Context.pop()

    def __del__(self) -> None:  # with the thread's state, on the thread itself
        self.pop()


def pack(arguments: Sequence[Any]) -> bytes:
    """Lay ctypes scalars out as a kernel's parameters: each at a multiple of its own size."""
    packed = bytearray()
    for argument in arguments:
        packed += b"\0" * (-len(packed) % ctypes.sizeof(argument))
        packed += bytes(argument)
    return bytes(packed)


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_uint8 * size).from_address(address)


def _statuses_by_words() -> dict[str, int]:
    """What the driver calls each status; PyCUDA passes these words on."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    text = ctypes.c_char_p()
    found: dict[str, int] = {}
    for status in range(1, 1000):
        if library.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value:
            found.setdefault(text.value.decode(), status)
    return found
