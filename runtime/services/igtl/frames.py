"""The frames of one device: the newest is segmented, whatever came before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import DeadlineError, HostMemoryError, RecallSegError
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.igtl.wire import Image, Message
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Rule
from recallseg.runtime.services.stream import Frame, Stream
from recallseg.runtime.volumes.slices import segment_volume

__all__ = ["Frames", "Segmented"]

LOOK_S = 5.0
"""Between two looks at whether a library has changed."""


@dataclass(frozen=True)
class Segmented:
    """What came of one frame.

    Attributes
    ----------
    image, message : the frame.
    since : when it arrived, by ``time.monotonic``.
    label_map : K x J x I; None if there is none, and ``error`` says why.
    labels : values by structure.
    record : for the audit log.
    """

    image: Image
    message: Message
    since: float
    label_map: NDArray[np.uint8] | None
    labels: Mapping[str, int]
    record: Mapping[str, Any]
    error: RecallSegError | None


class Frames:
    """Segments the frames of one device.

    Two-dimensional frames are taken as they are shown, and run through a :class:`Stream`; volumes
    are turned by where they lie, as files are.

    Parameters
    ----------
    rule : what is asked.
    done : is given each frame that was not pushed out by a newer one; on a thread of its own.
    """

    def __init__(
        self,
        rule: Rule,
        questions: Questions,
        deadline_ms: float,
        done: Callable[[Segmented], None],
    ) -> None:
        self._rule, self._questions, self._done = rule, questions, done
        self._deadline_ms = deadline_ms
        self._lock = threading.Lock()
        self._pushed: dict[int, tuple[Image, Message, float]] = {}
        self._segmenter: Segmenter | None = None
        self._asked = ExitStack()
        self._stream: Stream | None = None
        self._volumes: _Newest | None = None
        self._looked = 0.0

    def push(self, image: Image, message: Message, since: float) -> None:
        """Hand over a frame, and return at once.

        Raises
        ------
        RecallSegError
            If the rule cannot be asked, or the frame not be taken.
        """
        self._refresh()
        assert self._segmenter is not None
        if len(image.array) > 1:
            if self._volumes is None:
                self._volumes = _Newest(self._segment_volume)
            self._volumes.put((image, message, since))
            return
        if self._stream is None:
            self._stream = Stream(self._segmenter, self._result, deadline_ms=self._deadline_ms)
        try:
            with self._lock:  # the result may be there before its number is
                number = self._stream.push(image.array[0])
                self._pushed[number] = image, message, since
        except Exception:
            if _has_ended(self._stream):
                self._end_stream()  # the next frame begins another
            raise

    def close(self) -> None:
        """Let what is in work end, and stop. Harmless if repeated."""
        self._end_stream()
        if self._volumes is not None:
            self._volumes.close()
        self._volumes = self._segmenter = None
        self._asked.close()

    def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):  # what ended it was told when a frame was pushed
                stream.close()
        self._pushed.clear()

    def _refresh(self) -> None:
        """Ask the library as it is now, from time to time; what is in work ends before another."""
        now = time.monotonic()
        if self._segmenter is not None and now - self._looked < LOOK_S:
            return
        self._looked = now
        asked = ExitStack()
        try:
            segmenter = asked.enter_context(self._questions.ask(self._rule))
        except RecallSegError:
            self.close()  # of a library that is gone nothing is asked until it is back
            raise
        if segmenter is self._segmenter:
            asked.close()
            return
        self.close()
        self._segmenter, self._asked = segmenter, asked

    def _result(self, frame: Frame) -> None:
        with self._lock:
            image, message, since = self._pushed.pop(frame.number)
            for number in [each for each in self._pushed if each < frame.number]:
                del self._pushed[number]  # pushed out by newer ones
        result = frame.result
        if result is None:
            self._done(Segmented(image, message, since, None, {}, {}, frame.error))
        else:
            labels = result.label_map[None]
            record = result.to_audit()
            self._done(Segmented(image, message, since, labels, result.labels, record, None))

    def _segment_volume(self, pushed: tuple[Image, Message, float]) -> None:
        image, message, since = pushed
        assert self._segmenter is not None
        try:
            left_ms = self._deadline_ms - (time.monotonic() - since) * 1e3
            if left_ms <= 0:
                raise DeadlineError("a volume had waited too long and was not begun.")
            volume = _volume(image)
            rule = self._rule.volumes
            plane = rule.plane if volume.frame != "image" else None
            result = segment_volume(
                self._segmenter,
                volume,
                plane=plane,
                largest=rule.largest,
                fill_holes=rule.fill_holes,
                deadline_ms=left_ms,
            )
            labels = result.label_map
            if volume.frame != "image":
                labels = labels.transpose(2, 1, 0)
            record = result.to_audit(volume)
        except RecallSegError as error:
            self._done(Segmented(image, message, since, None, {}, {}, error))
        except MemoryError as error:
            short = HostMemoryError(f"a volume needs more memory than there is: {error}")
            self._done(Segmented(image, message, since, None, {}, {}, short))
        except Exception as error:  # a defect: the next volume may go
            what = RecallSegError(f"defect: {type(error).__name__}: {error}")
            self._done(Segmented(image, message, since, None, {}, {}, what))
        else:
            self._done(Segmented(image, message, since, labels, result.labels, record, None))


def _has_ended(stream: Stream) -> bool:
    """Whether something ended a stream, which then takes no frame any more."""
    try:
        stream.drain(0.0)
    except Exception:
        return True
    return False


class _Newest:
    """Does something with the newest of what is put, on a thread of its own."""

    def __init__(self, do: Callable[[Any], None]) -> None:
        self._do = do
        self._item: Any = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="volumes", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        with self._changed:
            self._item = item
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._item is not None)
                if self._closed:
                    return
                item, self._item = self._item, None
            self._do(item)


def _volume(image: Image) -> Volume:
    if image.affine is None:
        return Volume(image.array, np.eye(4), "image")
    axes = (2, 1, 0, 3)[: image.array.ndim]
    frame = "RAS" if image.frame == "RAS" else "LPS"
    return Volume(image.array.transpose(axes), image.affine, frame)  # type: ignore[arg-type]
