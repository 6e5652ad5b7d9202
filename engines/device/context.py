"""A driver and its context: what calls go through, and what is given back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from recallseg.engines.device.driver import Driver, DriverError, explain
from recallseg.engines.device.recording import beside, give_back
from recallseg.engines.errors import DeviceLostError

__all__ = ["Context"]

Value = TypeVar("Value")


class Context:
    """The context of one :class:`~recallseg.engines.device.device.Device`.

    It stands apart, and finalizers of streams and events refer to it alone: a device has some of
    its own, and would be kept for ever by what is to give those back. Buffers, which no device
    has, are counted there.

    Attributes
    ----------
    handle : the driver's; 0 until it is known.
    lost : why it has failed for good, if so.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handle = 0
        self.lost: DeviceLostError | None = None

    def call(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Call the driver; see :meth:`Device.call`."""
        if self.lost is not None:
            raise DeviceLostError(str(self.lost))
        try:
            with beside():
                return function(*arguments)
        except DriverError as error:
            explained = explain(error)
            if isinstance(explained, DeviceLostError):
                self.lost = explained
            raise explained from error

    def destroy(self, function: str, handle: int) -> None:
        """Give something back, when nobody records. A lost device has nothing left to give."""
        give_back(partial(self._destroy, function, handle))

    def _destroy(self, function: str, handle: int) -> None:
        if self.lost is None:
            try:
                self.call(self.driver.set_context, self.handle)
                self.call(getattr(self.driver, function), handle)
            except DeviceLostError:  # lost to another user of it; whoever goes on here is told
                return
