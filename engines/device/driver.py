"""As much of CUDA's driver API as RecallSeg needs, as an interface for providers to fill.

Handles and addresses are plain integers, which is what TensorRT and ONNX Runtime take. A call that
fails raises :class:`DriverError`; :func:`explain` turns it into one of RecallSeg's errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from recallseg.engines.errors import (
    DeviceLostError,
    DeviceMemoryError,
    EngineError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
)

__all__ = ["Driver", "DriverError", "explain"]

OUT_OF_MEMORY = 2
LEGACY_STREAM = 1  # CU_STREAM_LEGACY
DEFAULT_STREAMS = (LEGACY_STREAM, 2)  # and CU_STREAM_PER_THREAD: of whichever context is current
LOST = {
    46: "the device is busy or was taken away",
    214: "an uncorrectable memory error (ECC)",
    700: "a kernel touched memory that is not its own",
    702: "a kernel ran longer than the system allows",
    709: "the context was destroyed",
    714: "a hardware stack error",
    715: "an illegal instruction",
    716: "a kernel touched a misaligned address",
    717: "a kernel touched an address of the wrong kind",
    718: "an invalid program counter",
    719: "a kernel failed",
    999: "an unknown failure of the driver",
}
"""Statuses after which the context is dead for the rest of the process (cuda.h, ``CUresult``)."""

_UNAVAILABLE = {
    3: "the driver has been shut down",
    34: "a stub of the driver is loaded, not the driver: take the CUDA toolkit's 'stubs' folder "
    "out of LD_LIBRARY_PATH",
    35: "the driver is too old for this CUDA: update it",
    36: "the driver is too old for this CUDA call: update it",
    100: "there is no NVIDIA GPU that this process may use: see CUDA_VISIBLE_DEVICES, and the "
    "container's --gpus",
    101: "there is no GPU of that number",
    801: "this GPU or driver does not support that",
    802: "the system is not ready: NVIDIA's fabric manager has to run",
    803: "kernel module and driver library are of different versions: restart the machine",
    804: "the driver's compatibility package does not support this GPU",
}
_IMAGES = {200, 209, 218, 221, 222, 223}


class DriverError(Exception):
    """What a provider raises: CUDA's status, the call, and the driver's own words."""

    def __init__(self, status: int, call: str, said: str) -> None:
        super().__init__(f"CUDA {call} failed with {status}: {said}")
        self.status, self.call, self.said = status, call, said


def explain(error: DriverError) -> EngineError:
    """Return the error that a caller gets: what happened, and how to mend it."""
    status = error.status
    if status in LOST:
        return DeviceLostError(
            f"the GPU was lost in {error.call} ({status}, {error.said}): {LOST[status]}. Nothing "
            "more can be run on it by this process. Libraries are unharmed: go on with engine "
            "onnxruntime-cpu, or start the process again."
        )
    if status == OUT_OF_MEMORY:
        return DeviceMemoryError(
            f"{error}. Close other programs that use the GPU, or ask for a smaller k, fewer "
            "structures or a lower precision; 'recallseg doctor --budget' says what is needed."
        )
    if status in _UNAVAILABLE:
        return EngineUnavailableError(
            f"no GPU can be used: {_UNAVAILABLE[status]} ({error}). Or choose engine "
            "onnxruntime-cpu."
        )
    if status in _IMAGES:
        return EngineRunError(
            f"the GPU does not take these kernels: {error}. Build them for its compute capability, "
            "with a CUDA that is no newer than the driver (docs/contribute/native-kernels.md)."
        )
    return EngineRunError(f"{error}.")


class Driver(ABC):
    """One provider. Calls act on the context that is current in the calling thread."""

    name: ClassVar[str]
    graphs: ClassVar[bool] = True
    """Whether work can be captured into CUDA graphs."""
    foreign_streams: ClassVar[bool] = True
    """Whether a stream can be used of which only the handle is known."""

    # Device and context

    @abstractmethod
    def version(self) -> int:
        """CUDA version of the driver, 12060 being 12.6."""

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def device_name(self, ordinal: int) -> str: ...

    @abstractmethod
    def device_attribute(self, ordinal: int, attribute: int) -> int:
        """``attribute`` is a number of ``CUdevice_attribute``."""

    @abstractmethod
    def current_context(self) -> int:
        """0 if there is none."""

    @abstractmethod
    def retain_primary_context(self, ordinal: int) -> int: ...

    @abstractmethod
    def context_device(self) -> int:
        """Which GPU the current context is on."""

    @abstractmethod
    def set_context(self, context: int) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything in the context."""

    # Memory

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes free, bytes in all."""

    @abstractmethod
    def allocate(self, size: int) -> int: ...

    @abstractmethod
    def free(self, address: int) -> None: ...

    @abstractmethod
    def allocate_pinned(self, size: int) -> int:
        """Page-locked memory of the host, mapped for the device."""

    @abstractmethod
    def free_pinned(self, address: int) -> None: ...

    @abstractmethod
    def device_address(self, address: int) -> int:
        """Where the device sees pinned memory."""

    @abstractmethod
    def ordinal_of(self, address: int) -> int:
        """Which device an address belongs to."""

    @abstractmethod
    def copy_in(self, address: int, host: int, size: int, stream: int) -> None: ...

    @abstractmethod
    def copy_out(self, host: int, address: int, size: int, stream: int) -> None: ...

    @abstractmethod
    def copy(self, target: int, source: int, size: int, stream: int) -> None: ...

    @abstractmethod
    def fill(self, address: int, value: int, size: int, stream: int) -> None: ...

    # Streams and events

    @abstractmethod
    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""

    def adopt_stream(self, stream: Any) -> int:
        """Return the handle of a caller's stream; InputError if it is none."""
        if hasattr(stream, "__cuda_stream__"):
            stream = stream.__cuda_stream__()[1]
        for name in ("handle", "ptr", "cuda_stream"):
            stream = getattr(stream, name, stream)
        try:
            # 0 is what libraries take for "none was given": ONNX Runtime would make its own. The
            # default stream's other name says what is meant.
            return int(stream) or LEGACY_STREAM
        except (TypeError, ValueError) as error:
            raise InputError(f"{type(stream).__name__} is no CUDA stream.") from error

    def context_of(self, stream: int) -> int | None:
        """The context that a stream belongs to; None where the provider cannot tell."""
        return None

    @abstractmethod
    def destroy_stream(self, stream: int) -> None: ...

    @abstractmethod
    def synchronize_stream(self, stream: int) -> None: ...

    @abstractmethod
    def wait_event(self, stream: int, event: int) -> None: ...

    @abstractmethod
    def create_event(self) -> int: ...

    @abstractmethod
    def destroy_event(self, event: int) -> None: ...

    @abstractmethod
    def record_event(self, event: int, stream: int) -> None: ...

    @abstractmethod
    def synchronize_event(self, event: int) -> None: ...

    @abstractmethod
    def elapsed_ms(self, start: int, end: int) -> float: ...

    # Graphs: a provider that knows none says so in `graphs`, and these are not called

    def begin_capture(self, stream: int) -> None:
        raise NotImplementedError

    def end_capture(self, stream: int) -> int:
        """Return a graph; raises if the capture was spoilt by something that cannot be captured."""
        raise NotImplementedError

    def instantiate(self, graph: int) -> int:
        """Return an executable graph; ``graph`` itself is destroyed."""
        raise NotImplementedError

    def launch_graph(self, executable: int, stream: int) -> None:
        raise NotImplementedError

    def destroy_executable(self, executable: int) -> None:
        raise NotImplementedError

    # Kernels

    @abstractmethod
    def load_module(self, image: bytes) -> int: ...

    @abstractmethod
    def unload_module(self, module: int) -> None: ...

    @abstractmethod
    def function(self, module: int, name: str) -> int: ...

    @abstractmethod
    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        """``arguments`` are ctypes scalars of exactly the declared types."""
