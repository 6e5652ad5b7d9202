"""The driver through NVIDIA's ``cuda-bindings``: wheels for every platform, no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

from recallseg.engines.device.driver import Driver, DriverError
from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.imports import import_needed

__all__ = ["CudaBindings"]

_PORTABLE_MAPPED = 1 | 2  # CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class CudaBindings(Driver):
    """See :class:`Driver`.

    Raises
    ------
    EngineUnavailableError
        If the package, the driver's library or a function of it is missing.
    """

    name: ClassVar[str] = "cuda-bindings"

    def __init__(self) -> None:
        self._api: Any = import_needed(
            "cuda.bindings.driver",
            "device provider 'cuda-bindings'",
            "pip install 'recallseg[cuda]', of the major version that the driver supports",
            "cuda-bindings",
        )
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self._api, name)(*arguments)
        except RuntimeError as error:  # the library, or this function of it, is not there
            raise EngineUnavailableError(
                f"this needs an NVIDIA GPU and a driver that has {name}: "
                f"{str(error).rstrip('.')}. Install or update the driver, or choose engine "
                "onnxruntime-cpu."
            ) from error
        if int(status):
            raise DriverError(int(status), name, self._said(status))
        return values[0] if len(values) == 1 else tuple(values)

    def _said(self, status: Any) -> str:
        _, text = self._api.cuGetErrorString(status)
        return text.decode() if text else "unknown error"

    def version(self) -> int:
        return int(self._call("cuDriverGetVersion"))

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def _device(self, ordinal: int) -> Any:
        return self._call("cuDeviceGet", ordinal)

    def device_name(self, ordinal: int) -> str:
        name: bytes = self._call("cuDeviceGetName", 256, self._device(ordinal))
        return name.split(b"\0", 1)[0].decode()

    def device_attribute(self, ordinal: int, attribute: int) -> int:
        which = self._api.CUdevice_attribute(attribute)
        return int(self._call("cuDeviceGetAttribute", which, self._device(ordinal)))

    def current_context(self) -> int:
        return int(self._call("cuCtxGetCurrent"))

    def retain_primary_context(self, ordinal: int) -> int:
        return int(self._call("cuDevicePrimaryCtxRetain", self._device(ordinal)))

    def context_device(self) -> int:
        return int(self._call("cuCtxGetDevice"))

    def set_context(self, context: int) -> None:
        self._call("cuCtxSetCurrent", context)

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, size: int) -> int:
        return int(self._call("cuMemHostAlloc", size, _PORTABLE_MAPPED))

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def device_address(self, address: int) -> int:
        return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def ordinal_of(self, address: int) -> int:
        which = self._api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(self._call("cuPointerGetAttribute", which, address))

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, host, size, stream)

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", host, address, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, value, size, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def context_of(self, stream: int) -> int | None:
        found = self._call("cuStreamGetCtx", stream)  # and, since CUDA 13, a green context
        return int(found[0] if isinstance(found, tuple) else found)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def create_event(self) -> int:
        return int(self._call("cuEventCreate", 0))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record_event(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        return int(self._call("cuStreamEndCapture", stream))

    def instantiate(self, graph: int) -> int:
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", executable)

    def load_module(self, image: bytes) -> int:
        return int(self._call("cuModuleLoadData", image))

    def unload_module(self, module: int) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: int, name: str) -> int:
        return int(self._call("cuModuleGetFunction", module, name.encode()))

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        where = ctypes.addressof(places)
        self._call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, where, 0)
