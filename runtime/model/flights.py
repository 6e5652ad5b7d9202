"""Results on their way from a device: each in pinned memory of its own, until somebody takes them.

A query's turn on the model ends when all of it is queued. Its result is waited for outside of the
turn, beside the next query, so that the device always has work.
"""

from __future__ import annotations

import weakref

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, PinnedBuffer, Stream

__all__ = ["Flight", "Flights"]


class _Seat:
    """Pinned memory and an event, for one result after the other."""

    def __init__(self, device: Device) -> None:
        self.event = device.new_event()
        self.pinned: PinnedBuffer | None = None


class Flight:
    """One result on its way. Its memory is for another once it was closed, or dropped."""

    def __init__(self, flights: Flights, device: Device, seat: _Seat) -> None:
        self._device, self._seat = device, seat
        self.close = weakref.finalize(self, flights.free.append, seat)
        self.close.atexit = False

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """Return so many bytes of pinned memory to copy to; allocated only when it has to grow."""
        held = self._seat.pinned
        if held is None or held.nbytes < nbytes:
            held = self._seat.pinned = self._device.allocate_pinned(nbytes)
        array: NDArray[np.uint8] = held.array[:nbytes]
        return array

    def depart(self, stream: Stream) -> None:
        """Say that all of it is queued."""
        self._seat.event.record(stream)

    def wait(self) -> None:
        """Wait until it is here; any thread may."""
        self._device.enter()
        self._seat.event.synchronize()


class Flights:
    """Memory for results that are on their way, for as many as were at once so far.

    Attributes
    ----------
    free : what nobody uses; appended to whenever the interpreter likes.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.free: list[_Seat] = []

    def book(self) -> Flight:
        """Return a new one; one thread at a time."""
        seat = self.free.pop() if self.free else _Seat(self._device)
        return Flight(self, self._device, seat)
