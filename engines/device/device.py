"""One GPU, opened through a provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, Literal, TypeVar

import numpy as np

from recallseg.engines.device.context import Context
from recallseg.engines.device.driver import (
    DEFAULT_STREAMS,
    OUT_OF_MEMORY,
    Driver,
    DriverError,
    explain,
)
from recallseg.engines.device.memory import DeviceBuffer, DeviceTensor, PinnedBuffer
from recallseg.engines.device.queues import Event, Kernels, Stream
from recallseg.engines.errors import (
    DeviceLostError,
    DeviceMemoryError,
    EngineError,
    EngineUnavailableError,
    InputError,
)

__all__ = ["PROVIDERS", "Device", "DeviceFacts", "open_device"]

Provider = Literal["auto", "cuda-bindings", "pycuda"]
PROVIDERS = ("cuda-bindings", "pycuda")
OLDEST_DRIVER = 11040
"""CUDA 11.4: JetPack 5, the oldest that TensorRT 8.5 and later and ONNX Runtime still meet."""

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # of CUdevice_attribute

Value = TypeVar("Value")


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU: name, compute capability (87 is 8.7), CUDA version of its driver.

    ``integrated`` tells whether it shares its memory with the CPU, as Jetson's does; ``memory`` is
    what it has, in bytes.
    """

    name: str
    capability: int
    driver: str
    memory: int = 0
    integrated: bool = False

    @property
    def gpu(self) -> str:
        """What a plan for this GPU alone is bound to."""
        return f"sm{self.capability} {self.name}"

    def __str__(self) -> str:
        return f"{self.gpu}, driver {self.driver}"


class Device:
    """A GPU and the context that everything here lives in.

    The context is the one that is current in the calling thread (device software often has one),
    otherwise the GPU's primary context, which TensorRT, ONNX Runtime and PyTorch use as well.

    Parameters
    ----------
    driver : a provider.
    ordinal : which GPU.
    stream : a caller's, see :meth:`adopt_stream`; None makes one.

    Attributes
    ----------
    facts : what it is.
    context : what it lives in.
    stream : everything runs there unless another is given.
    allocations : how often device memory was taken: it stands still in steady state.
    live_bytes : how much of it is held.

    Raises
    ------
    EngineUnavailableError
        If there is no GPU of that number, or its driver is too old.
    InputError
        If the current context is on another GPU.
    """

    def __init__(self, driver: Driver, ordinal: int = 0, stream: Any = None) -> None:
        self.driver, self.ordinal = driver, ordinal
        self.allocations, self.live_bytes = 0, 0
        self.context = Context(driver)
        self._awaited: dict[int, Event] = {}  # by the handle of the stream that waits
        version = self.call(driver.version)
        if version < OLDEST_DRIVER:
            raise EngineUnavailableError(
                f"the NVIDIA driver is too old: it supports CUDA {_cuda(version)}, needed is "
                f"{_cuda(OLDEST_DRIVER)}. Update the driver or JetPack, or choose engine "
                "onnxruntime-cpu."
            )
        count = self.call(driver.device_count)
        if not 0 <= ordinal < count:
            raise EngineUnavailableError(
                f"GPU {ordinal} was asked for, this process may use {count} (counted from 0). See "
                "CUDA_VISIBLE_DEVICES, or choose engine onnxruntime-cpu."
            )
        self.context.handle = self.call(driver.current_context)
        if self.context.handle:
            here = self.call(driver.context_device)
            if here != ordinal:
                raise InputError(
                    f"GPU {ordinal} was asked for, and the context that is current in this thread "
                    f"is on GPU {here}. Ask for that one, or make no context current."
                )
        else:
            self.context.handle = self.call(driver.retain_primary_context, ordinal)
            self.enter()

        def attribute(number: int) -> int:
            return self.call(driver.device_attribute, ordinal, number)

        self.facts = DeviceFacts(
            self.call(driver.device_name, ordinal),
            attribute(_MAJOR) * 10 + attribute(_MINOR),
            _cuda(version),
            self.call(driver.memory)[1],
            bool(attribute(_INTEGRATED)),
        )
        self.stream = self.new_stream() if stream is None else self.adopt_stream(stream)

    def call(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Call the driver; every failure becomes one of RecallSeg's errors.

        Waits while another thread records a CUDA graph (:mod:`.recording`): what is queued might
        become part of it, and what waits or allocates spoils it.

        Raises
        ------
        DeviceLostError
            Also at every later call: a lost device does not come back in this process.
        DeviceMemoryError, EngineUnavailableError, EngineRunError
        """
        return self.context.call(function, *arguments)

    @property
    def primary(self) -> bool:
        """Whether its context is the GPU's primary one, the only one that CUDA's runtime uses."""
        return self.call(self.driver.retain_primary_context, self.ordinal) == self.context.handle

    @property
    def serves_this_thread(self) -> bool:
        """Whether no other context than its own is current in the calling thread."""
        return self.call(self.driver.current_context) in (0, self.context.handle)

    @property
    def lost(self) -> bool:
        """Whether it has failed for good."""
        return self.context.lost is not None

    def enter(self) -> None:
        """Make the context current in the calling thread, as TensorRT expects."""
        self.call(self.driver.set_context, self.context.handle)

    def synchronize(self) -> None:
        """Wait until everything that anybody queued in the context is done."""
        self.call(self.driver.synchronize)

    def probe(self) -> None:
        """Raise DeviceLostError if the device is lost; what else a wait may say is let go.

        For when a library failed and said why in its own words.
        """
        try:
            self.synchronize()
        except DeviceLostError:
            raise
        except EngineError:
            return  # as while recording, when nobody may wait: the library's words stand

    def free_memory(self) -> int:
        """Return the bytes that are free now."""
        return self.call(self.driver.memory)[0]

    def require(self, nbytes: int, what: str) -> None:
        """Raise DeviceMemoryError, with both figures, if less than ``nbytes`` are free."""
        free = self.free_memory()
        if free < nbytes:
            raise DeviceMemoryError(
                f"{what} needs {nbytes / 2**20:.0f} MiB on {self.facts.name}, {free / 2**20:.0f} "
                f"MiB of {self.facts.memory / 2**20:.0f} MiB are free. Close other programs that "
                "use the GPU, or ask for a smaller k, fewer structures or a lower precision."
            )

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return ``nbytes`` on the device."""
        return DeviceBuffer(self, nbytes)

    def allocate_pinned(self, nbytes: int) -> PinnedBuffer:
        """Return ``nbytes`` of the host that the device copies from and to at full speed."""
        return PinnedBuffer(self, nbytes)

    def tensor(self, shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceTensor:
        """Return a new tensor, its contents undefined."""
        kind = np.dtype(dtype)
        buffer = self.allocate(max(1, prod(shape) * kind.itemsize))
        return DeviceTensor(buffer.address, shape, kind, buffer)

    def new_stream(self) -> Stream:
        """Return a stream of its own."""
        return Stream(self)

    def adopt_stream(self, stream: Any) -> Stream:
        """Return a caller's stream: a handle, or what has one.

        Known are integers, PyCUDA's (``handle``), CuPy's (``ptr``), PyTorch's (``cuda_stream``) and
        what has ``__cuda_stream__``; provider pycuda takes its own only. It must outlive its use
        here. InputError if it is none of these, or of another context, as far as the driver tells.
        """
        if isinstance(stream, Stream):
            return stream
        handle = self.driver.adopt_stream(stream)
        if handle not in DEFAULT_STREAMS:
            self._check_stream(handle)
        return Stream(self, handle)

    def _check_stream(self, handle: int) -> None:
        try:
            context = self.driver.context_of(handle)
        except DriverError as error:
            if isinstance(explain(error), DeviceLostError):
                self.call(self.driver.synchronize)
            raise InputError(
                f"{handle:#x} is no CUDA stream, or was destroyed: the driver says '{error}'."
            ) from error
        if context is not None and context != self.context.handle:
            raise InputError(
                f"the CUDA stream {handle:#x} belongs to another context than the one that is used "
                f"on GPU {self.ordinal}. Give a stream of that context, or make the stream's "
                "context current where the device is opened."
            )

    def new_event(self) -> Event:
        """Return an event."""
        return Event(self)

    def wait_for(self, stream: int, waiting: Stream | None = None) -> None:
        """Let a stream wait for whatever is queued on another now, known by its handle.

        ``waiting`` is a stream of this device that one thread at a time uses; None is its own.

        Where the provider cannot name a foreign stream, this thread waits, for everything.
        """
        if not self.driver.foreign_streams:
            self.synchronize()
            return
        waiting = waiting or self.stream
        if (other := self.adopt_stream(stream)).handle != waiting.handle:
            if waiting.handle not in self._awaited:
                self._awaited[waiting.handle] = self.new_event()
            self._awaited[waiting.handle].record(other)
            waiting.wait(self._awaited[waiting.handle])

    def load_kernels(self, image: bytes) -> Kernels:
        """Return the functions of a compiled image; EngineRunError if this GPU takes none of it."""
        return Kernels(self, image)

    def ordinal_of(self, address: int) -> int | None:
        """Return the GPU that an address belongs to; None if it is nobody's."""
        try:
            return self.driver.ordinal_of(address)
        except DriverError as error:
            if isinstance(explain(error), DeviceLostError):
                self.call(self.driver.synchronize)
            return None

    # What buffers, streams and the like call to begin and to end

    def take(self, nbytes: int) -> int:
        """Return the address of device memory, counted."""
        try:
            address = self.call(self.driver.allocate, nbytes)
        except DeviceMemoryError as error:
            cause = error.__cause__
            if isinstance(cause, DriverError) and cause.status == OUT_OF_MEMORY:
                self.require(nbytes, "This")
            raise
        self.allocations += 1
        self.live_bytes += nbytes
        return address

    def give_back(self, address: int, nbytes: int) -> None:
        """Free device memory."""
        self.live_bytes -= nbytes
        self.context.destroy("free", address)

    def take_pinned(self, nbytes: int) -> int:
        """Return the address of pinned memory."""
        return self.call(self.driver.allocate_pinned, nbytes)

    def give_back_pinned(self, address: int) -> None:
        """Free pinned memory."""
        self.context.destroy("free_pinned", address)


def open_device(provider: Provider = "auto", ordinal: int = 0, stream: Any = None) -> Device:
    """Open a GPU.

    Parameters
    ----------
    provider : ``auto`` takes the first of :data:`PROVIDERS` whose package is installed.
    ordinal : which GPU, counted from 0 among those that the process may use.
    stream : a caller's stream to queue everything on, see :meth:`Device.adopt_stream`.

    Raises
    ------
    EngineUnavailableError
        If no provider is installed, or there is no usable driver or GPU: why, and what to do.
    InputError
        If there is no such provider.
    """
    return Device(_driver(provider), ordinal, stream)


def _driver(provider: str) -> Driver:
    if provider == "auto":
        installed = [name for name in PROVIDERS if _has(name)]
        if not installed:
            raise EngineUnavailableError(
                "this needs a GPU, and neither cuda-bindings nor PyCUDA is installed: pip install "
                "'recallseg[cuda]' (wheels) or 'recallseg[pycuda]' (compiles), or choose engine "
                "onnxruntime-cpu."
            )
        provider = installed[0]
    if provider == "cuda-bindings":
        from recallseg.engines.device.cuda_bindings import CudaBindings

        return _start(CudaBindings)
    if provider == "pycuda":
        from recallseg.engines.device.pycuda import PyCuda

        return _start(PyCuda)
    raise InputError(f"there is no provider '{provider}'; choose auto, {', '.join(PROVIDERS)}.")


def _has(provider: str) -> bool:
    """Whether a provider's distribution is installed; its parent package may be another's too."""
    try:
        version(provider)
    except PackageNotFoundError:
        return False
    return True


def _start(kind: Callable[[], Driver]) -> Driver:
    try:
        return kind()
    except DriverError as error:
        raise explain(error) from error


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
