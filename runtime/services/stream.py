"""Live frames in, masks out, on time: what a scanner's display loop talks to.

A frame that cannot be shown in time is worth nothing, so a stream never falls behind: its queue is
short and drops the oldest frame, a deadline counts from the moment a frame was pushed, a frame that
would be late is not begun, so that the next one is in time, and all that was dropped or late is
counted.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from threading import TIMEOUT_MAX, Condition, Thread, current_thread
from time import perf_counter
from types import TracebackType
from typing import Any
from weakref import WeakSet

from recallseg.engines.errors import DeadlineError, HostMemoryError, InputError, RecallSegError
from recallseg.runtime.checks import check_count, check_number
from recallseg.runtime.frozen import public
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.latency import LatencyHistogram

__all__ = ["Frame", "Stream", "StreamStatistics", "close_streams"]

FRESH = 0.1
"""Part of the deadline that a frame may have waited and is begun whatever the last ones took: there
is no fresher one to wait for."""
FORGETS = 0.1
"""How fast the expected time follows shorter frames; it follows longer ones at once."""
AT_EXIT_S = 10.0
"""Longest that the end of the process waits for frames in work."""

_open: WeakSet[Stream] = WeakSet()


def close_streams(timeout_s: float = AT_EXIT_S) -> bool:
    """Close every stream of this process; False if a frame was still in work after ``timeout_s``.

    Runs at exit: a network that is still at work when its library is torn down ends in a crash.
    """
    end = perf_counter() + timeout_s
    streams = list(_open)
    for stream in streams:
        stream._stop()
    for stream in streams:
        if current_thread() is not stream._thread:  # a callback may end the process
            stream._thread.join(max(0.0, end - perf_counter()))
    return not any(s._thread.is_alive() for s in streams if current_thread() is not s._thread)


atexit.register(close_streams)


@public
@dataclass(frozen=True)
class Frame:
    """What became of one frame.

    Attributes
    ----------
    number : as :meth:`Stream.push` returned it; numbers left out were dropped.
    result : the segmentation, or None.
    error : why there is none: :class:`DeadlineError` when it was late, or what was wrong with it.
    waited_ms, latency_ms : from the push to the beginning of the work, and to its end.
    """

    number: int
    result: Result | None
    error: RecallSegError | None
    waited_ms: float
    latency_ms: float


@dataclass(frozen=True)
class StreamStatistics:
    """Counts since the stream began: ``pushed`` is the sum of all the others and what still waits.

    Attributes
    ----------
    segmented : frames with a result.
    dropped : pushed out of the queue by a newer frame, or still in it when the stream was closed.
    late : not done within the deadline.
    failed : could not be segmented.
    ignored : pushed while the stream was paused.
    latency : of the segmented frames, push to result, as ``LatencyHistogram.to_json`` gives it.
    """

    pushed: int
    segmented: int
    dropped: int
    late: int
    failed: int
    ignored: int
    latency: dict[str, float | int | None]


class _State(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    CLOSED = "closed"


@dataclass(frozen=True)
class _Waiting:
    number: int
    image: Any  # where it was pushed: on the CPU, or on the GPU that the model runs on
    since: float  # perf_counter at the push


class Stream:
    """Segments frames as they come, newest first when they come too fast.

    Frames are segmented one at a time on a thread of the stream's own, with the memories of the
    frames before (see :class:`recallseg.runtime.model.frame_memories.FrameMemories`) if the
    segmenter was made with ``frames``. All methods may be called from any thread.

    Parameters
    ----------
    segmenter : what segments; it may serve other callers too, who then wait for each other.
    on_result : called with every :class:`Frame` that was not dropped, in order, on the stream's
        thread. While it runs no frame is segmented: hand the result on, and return.
    deadline_ms : most milliseconds from push to result. A frame that has waited too long to be in
        time, by what the last ones took, is not begun: it is reported late at once.
    queue : frames that may wait; the next one pushes the oldest out.

    Raises
    ------
    InputError
        For a queue or a deadline that is not positive.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        on_result: Callable[[Frame], None],
        *,
        deadline_ms: float | None = None,
        queue: int = 1,
    ) -> None:
        queue = check_count(queue, "a stream's queue", 1)
        if deadline_ms is not None and check_number(deadline_ms, "a deadline", 0, " ms") == 0:
            raise InputError(f"a deadline must be more than 0 ms, got {deadline_ms}.")
        self._segmenter = segmenter
        self._on_result = on_result
        self._deadline_ms = deadline_ms
        self._frame_memories = segmenter.frame_memories() if segmenter.frames else None
        self._changed = Condition()
        self._waiting: deque[_Waiting] = deque()
        self._queue = queue
        self._state = _State.RUNNING
        self._busy = False
        self._restart = False
        self._counts = dict.fromkeys(
            ("pushed", "segmented", "dropped", "late", "failed", "ignored"), 0
        )
        self._latency = LatencyHistogram()
        self._takes_ms = 0.0
        self._defect: BaseException | None = None
        self._thread = Thread(target=self._work, name="recallseg-stream", daemon=True)
        self._thread.start()
        _open.add(self)

    def push(self, image: Any) -> int:
        """Hand over a frame, and return at once.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, on the CPU or on the GPU; see
            :meth:`recallseg.Model.copy_frame`. The caller may reuse its memory.

        Returns
        -------
        int
            The frame's number: 0, 1, ...

        Raises
        ------
        InputError
            If the stream is closed, or the data cannot be reached.
        EngineUnavailableError
            If it lies on a GPU, and there is no driver.
        Exception
            Whatever ``on_result`` raised: the stream has ended then.
        """
        pixels = self._segmenter.model.copy_frame(image)
        with self._changed:
            self._check_open()
            number = self._counts["pushed"]
            self._counts["pushed"] += 1
            if self._state is _State.PAUSED:
                self._counts["ignored"] += 1
                return number
            if len(self._waiting) == self._queue:
                self._waiting.popleft()
                self._counts["dropped"] += 1
            self._waiting.append(_Waiting(number, pixels, perf_counter()))
            self._changed.notify_all()
            return number

    def pause(self) -> None:
        """Ignore what is pushed from now on; frames that wait are still segmented."""
        with self._changed:
            self._check_open()
            self._state = _State.PAUSED

    def resume(self) -> None:
        """Take frames again. What was remembered before the pause is forgotten."""
        with self._changed:
            self._check_open()
            if self._state is _State.PAUSED:
                self._state = _State.RUNNING
                self._restart = True

    def restart(self) -> None:
        """Forget the frames so far: what is pushed next belongs to another sequence."""
        with self._changed:
            self._check_open()
            self._restart = True

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no frame waits or is being segmented; False if that took too long.

        Parameters
        ----------
        timeout_s : seconds, of any size; None or infinite: as long as it takes.

        Raises
        ------
        InputError
            If ``timeout_s`` is less than 0 or no number.
        Exception
            Whatever ``on_result`` raised.
        """
        if timeout_s is not None:  # a lock waits for 292 years at most
            timeout_s = min(check_number(timeout_s, "timeout_s", 0, " s"), TIMEOUT_MAX)
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._defect is not None or not (self._waiting or self._busy), timeout_s
            )
            self._check_defect()
            return done

    def close(self) -> None:
        """Drop what waits, let the frame in work end, and stop. May be called again.

        Raises
        ------
        Exception
            Whatever ``on_result`` raised.
        """
        self._stop()
        if current_thread() is not self._thread:  # on_result may close the stream too
            self._thread.join()
            self._check_defect()

    @property
    def statistics(self) -> StreamStatistics:
        """Counts and latencies so far."""
        with self._changed:
            return StreamStatistics(**self._counts, latency=self._latency.to_json())

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except BaseException:
            if error is None:  # never hide what went wrong first
                raise

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self._counts.items())
        return f"recallseg.Stream({self._state.value}; {counts}; {self._latency!r})"

    def _work(self) -> None:
        try:
            while (waiting := self._next()) is not None:
                frame = self._segment(waiting)
                self._on_result(frame)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as error:  # handed to whoever calls next: a thread has no caller
            self._stop(error)

    def _stop(self, defect: BaseException | None = None) -> None:
        with self._changed:
            if defect is not None:
                self._defect, self._busy = defect, False
            self._state = _State.CLOSED
            self._counts["dropped"] += len(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()

    def _next(self) -> _Waiting | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._state is _State.CLOSED)
            if not self._waiting:
                return None
            self._busy = True
            if self._restart and self._frame_memories is not None:
                self._frame_memories.clear()
            self._restart = False
            return self._waiting.popleft()

    def _segment(self, waiting: _Waiting) -> Frame:
        waited_ms = (perf_counter() - waiting.since) * 1e3
        result: Result | None = None
        failure: RecallSegError | None = None
        try:
            left_ms = self._time_left(waiting.number, waited_ms)
            try:
                result = self._segmenter.segment(
                    waiting.image, deadline_ms=left_ms, frame_memories=self._frame_memories
                )
            finally:
                self._expect((perf_counter() - waiting.since) * 1e3 - waited_ms)
        except RecallSegError as error:
            failure = error
        except MemoryError as error:  # of this frame: the next may find more
            failure = HostMemoryError(f"a frame needs more memory than there is: {error}")
        latency_ms = (perf_counter() - waiting.since) * 1e3
        with self._changed:
            if result is not None:
                self._counts["segmented"] += 1
                self._latency.record(latency_ms)
            else:
                self._counts["late" if isinstance(failure, DeadlineError) else "failed"] += 1
        return Frame(waiting.number, result, failure, waited_ms, latency_ms)

    def _time_left(self, number: int, waited_ms: float) -> float | None:
        """Milliseconds to the deadline; DeadlineError if a next frame has better prospects."""
        if self._deadline_ms is None:
            return None
        left_ms = self._deadline_ms - waited_ms
        needed_ms = min(self._takes_ms, (1 - FRESH) * self._deadline_ms)
        if left_ms <= max(0.0, needed_ms):
            raise DeadlineError(
                f"frame {number} was not begun: it had waited {waited_ms:.1f} of "
                f"{self._deadline_ms:g} ms, and a frame takes {self._takes_ms:.1f} ms. Push fewer "
                "frames, or use a smaller k or bundle."
            )
        return left_ms

    def _expect(self, took_ms: float) -> None:
        """Learn from what a frame took, or took until it was late."""
        took_ms = took_ms if self._deadline_ms is None else min(took_ms, self._deadline_ms)
        if took_ms >= self._takes_ms:
            self._takes_ms = took_ms
        else:
            self._takes_ms += FORGETS * (took_ms - self._takes_ms)

    def _check_open(self) -> None:
        self._check_defect()
        if self._state is _State.CLOSED:
            raise InputError("the stream is closed. Make a new one.")

    def _check_defect(self) -> None:
        if self._defect is not None:
            raise self._defect
