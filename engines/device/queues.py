"""Streams, events, graphs and kernels: what is queued on the device, and in what order it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from recallseg.engines.device.driver import LEGACY_STREAM
from recallseg.engines.device.memory import DeviceTensor
from recallseg.engines.errors import EngineError, EngineRunError, EngineUnavailableError

if TYPE_CHECKING:
    from recallseg.engines.device.device import Device

__all__ = ["Event", "Graph", "Kernels", "Stream"]


class Stream:
    """An order of work on the device. Made by :meth:`Device.stream` or a caller's own.

    Attributes
    ----------
    handle : CUDA's, as an integer.
    owned : whether it lives as long as this object; a caller may end its own at any time.
    """

    def __init__(self, device: Device, handle: int | None = None) -> None:
        self._device = device
        self.owned = handle is None
        if handle is None:
            self.handle = device.call(device.driver.create_stream)
            weakref.finalize(self, device.context.destroy, "destroy_stream", self.handle)
        else:
            self.handle = handle

    def copy_in(self, target: DeviceTensor, array: np.ndarray[Any, Any]) -> None:
        """Queue a copy to the device. ``array`` must stay unchanged until it is done."""
        _check_copy(target, array)
        driver = self._device.driver
        host = int(array.ctypes.data)
        self._device.call(driver.copy_in, target.address, host, array.nbytes, self.handle)

    def copy_out(self, array: np.ndarray[Any, Any], source: DeviceTensor) -> None:
        """Queue a copy from the device; ``array`` is valid after :meth:`synchronize`."""
        _check_copy(source, array)
        driver = self._device.driver
        host = int(array.ctypes.data)
        self._device.call(driver.copy_out, host, source.address, array.nbytes, self.handle)

    def copy(self, target: DeviceTensor, source: DeviceTensor) -> None:
        """Queue a copy within the device."""
        if target.nbytes != source.nbytes:
            raise EngineRunError(f"{source.nbytes} bytes do not fit {target.nbytes}.")
        driver = self._device.driver
        self._device.call(driver.copy, target.address, source.address, source.nbytes, self.handle)

    def fill(self, target: DeviceTensor, value: int = 0) -> None:
        """Queue setting every byte to ``value``."""
        driver = self._device.driver
        self._device.call(driver.fill, target.address, value, target.nbytes, self.handle)

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for an event of another stream."""
        self._device.call(self._device.driver.wait_event, self.handle, event.handle)

    def synchronize(self) -> None:
        """Wait here until all that is queued is done; raises what went wrong on the device."""
        self._device.call(self._device.driver.synchronize_stream, self.handle)

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record what is queued within the context instead of running it.

        Yields a list that holds the graph afterwards. If the block raises, nothing is kept.

        Raises
        ------
        EngineUnavailableError
            If the provider knows no graphs, or this is the default stream, which has none.
        """
        driver = self._device.driver
        if not driver.graphs:
            raise EngineUnavailableError(
                f"provider {driver.name} knows no CUDA graphs: use cuda-bindings, or do without."
            )
        if self.handle == LEGACY_STREAM:
            raise EngineUnavailableError(
                "CUDA's default stream cannot be recorded: pass a stream of your own to "
                "open_device, or do without CUDA graphs."
            )
        self._device.call(driver.begin_capture, self.handle)
        made: list[Graph] = []
        try:
            yield made
        except BaseException:
            # What the block raised says more than that the recording is spoilt by it.
            with suppress(EngineError):
                self._end_capture()
            raise
        made.append(self._end_capture())

    def _end_capture(self) -> Graph:
        driver = self._device.driver
        graph = self._device.call(driver.end_capture, self.handle)
        return Graph(self._device, self._device.call(driver.instantiate, graph))


class Event:
    """A point in a stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = device.call(device.driver.create_event)
        weakref.finalize(self, device.context.destroy, "destroy_event", self.handle)

    def record(self, stream: Stream) -> None:
        """Queue it in a stream."""
        self._device.call(self._device.driver.record_event, self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait here until it is reached."""
        self._device.call(self._device.driver.synchronize_event, self.handle)

    def since(self, start: Event) -> float:
        """Return the milliseconds between two events that have been reached."""
        elapsed = self._device.driver.elapsed_ms
        return float(self._device.call(elapsed, start.handle, self.handle))


class Graph:
    """Recorded work, started by one call."""

    def __init__(self, device: Device, executable: int) -> None:
        self._device, self._executable = device, executable
        weakref.finalize(self, device.context.destroy, "destroy_executable", executable)

    def launch(self, stream: Stream) -> None:
        """Queue all of it, on the addresses that it was recorded with."""
        self._device.call(self._device.driver.launch_graph, self._executable, stream.handle)


class Kernels:
    """Functions of a compiled image (PTX, cubin or fatbin)."""

    def __init__(self, device: Device, image: bytes) -> None:
        self._device = device
        self._module = device.call(device.driver.load_module, image)
        weakref.finalize(self, device.context.destroy, "unload_module", self._module)
        self._functions: dict[str, int] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        stream: Stream,
        shared_bytes: int = 0,
    ) -> None:
        """Queue a kernel.

        Parameters
        ----------
        name : as declared ``extern "C"``.
        grid, block : blocks, and threads of each.
        arguments : ctypes scalars of exactly the declared types; addresses as ``c_uint64``.
        """
        driver = self._device.driver
        if name not in self._functions:
            self._functions[name] = self._device.call(driver.function, self._module, name)
        function = self._functions[name]
        self._device.call(
            driver.launch, function, grid, block, shared_bytes, stream.handle, arguments
        )


def _check_copy(tensor: DeviceTensor, array: np.ndarray[Any, Any]) -> None:
    if not array.flags.c_contiguous:
        raise EngineRunError(
            "arrays are copied to and from the device contiguous; this one is not."
        )
    if array.nbytes != tensor.nbytes:
        raise EngineRunError(
            f"an array of {array.nbytes} bytes, shape {array.shape} {array.dtype}, does not fit a "
            f"tensor of {tensor.nbytes}, shape {tensor.shape} {tensor.dtype}."
        )
