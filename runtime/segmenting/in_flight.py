"""Queries that are handed in, and whose results are taken later: several in flight at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, get_ident
from typing import TYPE_CHECKING, Any

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.segmenting.result import Result

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["MOST_IN_FLIGHT", "InFlight"]

MOST_IN_FLIGHT = 4
"""Queries of one segmenter that are handed in and have not ended: each holds a copy of its image
and, on a GPU, pinned memory for its result."""

Conclude = Callable[[], Result]


class InFlight:
    """Begins queries on one thread, and waits for their results, in the same order, on another.

    Both threads begin with the first query, and end when this is closed, or dropped with what it
    serves; the process ends after what is in flight.

    Parameters
    ----------
    segmenter : whose queries; it owns this.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = weakref.ref(segmenter)
        self._changed = Condition()
        self._count = 0
        self._closed = False
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._own: set[int] = set()  # idents of both threads

    def hand_in(self, image: Any, options: Mapping[str, Any]) -> Future[Result]:
        """Take a query; see :meth:`Segmenter.segment_async`."""
        segmenter = self._segmenter()
        assert segmenter is not None  # it calls this
        segmenter.model.turns.opener.check()  # a forked process has none of the threads
        begin = segmenter._prepare(**options)
        promise: Future[Result] = Future()
        with self._changed:
            # Whoever is called back with a result must not wait for the next one's.
            self._changed.wait_for(
                lambda: self._closed or self._count < MOST_IN_FLIGHT or get_ident() in self._own
            )
            self._count += 1
        promise.add_done_callback(self._left)
        try:
            work = self._taken(segmenter, image, begin)
            with self._changed:
                if self._closed:
                    raise InputError("this segmenter has been closed. Make a new one.")
                begins, ends = self._threads = self._threads or self._start()
                begins.submit(_begin, promise, work, ends)
        except BaseException:
            promise.cancel()
            raise
        return promise

    def close(self) -> None:
        """Wait until what was handed in has ended; nothing more is taken. Harmless if repeated."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads, self._threads = self._threads, None
        for each in threads or ():
            each.shutdown(wait=get_ident() not in self._own)  # one that is called back may close it

    def _start(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        own = self._own  # and not self, which could not be dropped then

        def thread(name: str) -> ThreadPoolExecutor:
            return ThreadPoolExecutor(1, name, initializer=lambda: own.add(get_ident()))

        return thread("recallseg-begins"), thread("recallseg-ends")

    @staticmethod
    def _taken(
        segmenter: Segmenter, image: Any, begin: Callable[[Any], Conclude]
    ) -> Callable[[], Conclude]:
        """Copy an image; return what begins its query, or tells in its turn why it cannot."""
        try:
            shown = segmenter.model.copy_frame(open_image(image))
        except Exception as error:
            return _failing(error)
        return lambda: begin(shown)

    def _left(self, _: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()


def _failing(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _begin(promise: Future[Result], work: Callable[[], Conclude], ends: ThreadPoolExecutor) -> None:
    if not promise.set_running_or_notify_cancel():
        return
    try:
        conclude = work()
    except BaseException as error:  # whoever waits is in another thread
        conclude = _failing(error)
    try:
        ends.submit(_end, promise, conclude)
    except RuntimeError:  # the process is ending
        _end(promise, conclude)


def _end(promise: Future[Result], conclude: Conclude) -> None:
    try:
        result = conclude()
    except BaseException as error:  # whoever waits is in another thread
        promise.set_exception(error)
    else:
        promise.set_result(result)
