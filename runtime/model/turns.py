"""A lock that is given in the order in which it was asked for."""

from __future__ import annotations

from collections import deque
from threading import Lock, get_ident

from recallseg.runtime.forked import Opener

__all__ = ["Turns"]


class Turns:
    """Turns of threads, first come, first served; a thread that has its turn may take it again.

    ``threading.Lock`` promises no order: a thread that asks again at once can keep it from others
    for as long as it likes.
    """

    def __init__(self) -> None:
        self.opener = Opener("the model")
        self._changing = Lock()
        self._waiting: deque[Lock] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, timeout: float = -1) -> bool:
        """Wait for the turn, at most ``timeout`` seconds (-1: for ever); False if it did not come.

        Every acquisition needs a :meth:`release`. Raises ForkedError in a forked process.
        """
        self.opener.check()
        me = get_ident()
        if self._owner == me:
            self._depth += 1
            return True
        with self._changing:
            if self._owner is None:
                self._owner, self._depth = me, 1
                return True
            gate = Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            came = gate.acquire(timeout=timeout)
        except BaseException:  # interrupted: the turn must not be handed to nobody
            if not self._leave(gate):
                self._take()
                self.release()
            raise
        if not came and self._leave(gate):
            return False
        self._take()
        return True

    def release(self) -> None:
        """Give the turn to whoever has waited longest."""
        self._depth -= 1
        if self._depth:
            return
        with self._changing:
            if self._waiting:
                self._owner = 0  # of no thread: the one that is woken takes it
                self._waiting.popleft().release()
            else:
                self._owner = None

    def _leave(self, gate: Lock) -> bool:
        """Wait no longer; False if the turn has come in the meantime."""
        with self._changing:
            if gate in self._waiting:
                self._waiting.remove(gate)
                return True
        return False

    def _take(self) -> None:
        self._owner, self._depth = get_ident(), 1  # it was handed to this thread, and no other

    def __enter__(self) -> Turns:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
