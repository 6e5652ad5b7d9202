"""While one thread records a CUDA graph no other calls the driver: that could spoil it.

CUDA's runtime, with which ONNX Runtime and PyTorch record, refuses calls that wait, allocate or
free of any thread of the process (capture mode "global"), and of the recording thread itself in any
mode; and what another thread queues on the same stream would be recorded. So whoever records is
alone with the driver: what other threads do there waits that long, and what the interpreter gives
back meanwhile is given back when the recording has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, get_ident, local

__all__ = ["beside", "give_back", "recording"]

_changed = Condition()
_beside = 0
_alone = False
_recorder: int | None = None
_here = local()  # its `depth`: how often this thread is beside
_put_off: deque[Callable[[], object]] = deque()


@contextmanager
def recording() -> Iterator[None]:
    """Be alone; begins when those who are :func:`beside` have ended, which takes none of a turn.

    Not within :func:`beside`: it would wait for itself.
    """
    global _alone, _recorder
    with _changed:
        _changed.wait_for(lambda: not _alone)
        _alone = True  # none of them begins any more
        _changed.wait_for(lambda: not _beside)
        _recorder = get_ident()
    try:
        yield
    finally:
        with _changed:
            _alone, _recorder = False, None
            _changed.notify_all()
            left = deque(_put_off)
            _put_off.clear()
        while left:
            work = left.popleft()
            try:
                give_back(work)
            except BaseException:  # the others are for the next one's end
                _put_off.extendleft(reversed(left))
                raise


@contextmanager
def beside() -> Iterator[None]:
    """Use the driver; begins when nobody else records."""
    if getattr(_here, "depth", 0) or _recorder == get_ident():
        yield  # whoever wants to record waits for this thread
        return
    with _changed:
        _changed.wait_for(lambda: not _alone)
        _enter(0)
    try:
        yield
    finally:
        _leave(0)


def give_back(work: Callable[[], object]) -> None:
    """Free or destroy something: now, or when the recording that is under way has ended.

    For finalizers: they run in whichever thread the interpreter likes, the one that records as
    well, and wait for nobody.
    """
    depth = getattr(_here, "depth", 0)
    with _changed:  # held for a moment only, and again by a finalizer that runs in that moment
        if _alone and not depth:
            _put_off.append(work)
            return
        _enter(depth)
    try:
        work()
    finally:
        _leave(depth)


def _enter(depth: int) -> None:
    global _beside
    _beside += 1
    _here.depth = depth + 1


def _leave(depth: int) -> None:
    global _beside
    with _changed:
        _here.depth = depth
        _beside -= 1
        _changed.notify_all()
