"""While one thread records a CUDA graph no other may wait or allocate: that spoils the recording.

CUDA's runtime, with which ONNX Runtime and PyTorch record, refuses such calls of any thread of the
process. So whoever records is alone with the driver, and what other threads do outside of a model's
turn waits that long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

__all__ = ["beside", "recording"]

_changed = Condition()
_beside = 0
_alone = False


@contextmanager
def recording() -> Iterator[None]:
    """Be alone; begins when those who are :func:`beside` have ended, which takes none of a turn."""
    global _alone
    with _changed:
        _changed.wait_for(lambda: not _alone)
        _alone = True  # none of them begins any more
        _changed.wait_for(lambda: not _beside)
    try:
        yield
    finally:
        with _changed:
            _alone = False
            _changed.notify_all()


@contextmanager
def beside() -> Iterator[None]:
    """Wait or allocate on a device without holding a model's turn."""
    global _beside
    with _changed:
        _changed.wait_for(lambda: not _alone)
        _beside += 1
    try:
        yield
    finally:
        with _changed:
            _beside -= 1
            _changed.notify_all()
