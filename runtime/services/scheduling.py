"""On which cores, and how urgently, the threads of a model and of its streams run.

Linux gives a new thread the affinity, niceness and policy of the one that makes it, so a model is
opened by a thread that has them, and the caller's own threads stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import get_native_id
from typing import TypeVar

from recallseg.engines.errors import InputError

__all__ = ["Scheduling"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Scheduling:
    """How threads run; the defaults leave them as the caller's.

    Attributes
    ----------
    cores : numbers of those to run on; empty for as they are.
    nice : -20 (urgent) to 19; 0 for as it is. Below the caller's needs CAP_SYS_NICE or RLIMIT_NICE.
    realtime : SCHED_FIFO with this priority, 1 to 99; 0 for none. Needs CAP_SYS_NICE or
        RLIMIT_RTPRIO.

    Raises
    ------
    InputError
        For a core that this process may not use, or another number out of range.
    """

    cores: tuple[int, ...] = ()
    nice: int = 0
    realtime: int = 0

    def __post_init__(self) -> None:
        allowed = os.sched_getaffinity(0)
        for core in self.cores:
            if core not in allowed:
                raise InputError(
                    f"core {core} was asked for, and this thread may use "
                    f"{', '.join(map(str, sorted(allowed)))}. Choose of those, or widen the "
                    "affinity (taskset, the container's cpuset)."
                )
        if not -20 <= self.nice <= 19:
            raise InputError(f"nice must be -20 to 19, got {self.nice}.")
        if not 0 <= self.realtime <= 99:
            raise InputError(f"a realtime priority must be 1 to 99, got {self.realtime}.")

    def __bool__(self) -> bool:
        return self != Scheduling()

    def run(self, function: Callable[[], Value]) -> Value:
        """Call a function on a thread that is scheduled like this, and return what it returns.

        Raises
        ------
        InputError
            If the system does not allow it.
        """
        if not self:
            return function()
        with ThreadPoolExecutor(1, thread_name_prefix="recallseg-opening") as thread:
            return thread.submit(self._apply_and, function).result()

    def _apply_and(self, function: Callable[[], Value]) -> Value:
        try:
            if self.cores:
                os.sched_setaffinity(0, self.cores)
            if self.nice:
                os.setpriority(os.PRIO_PROCESS, get_native_id(), self.nice)
            if self.realtime:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(self.realtime))
        except OSError as error:
            raise InputError(
                f"the system does not let this process run threads with {self}: {error.strerror}. "
                "Grant CAP_SYS_NICE (or RLIMIT_NICE and RLIMIT_RTPRIO), or ask for less."
            ) from error
        return function()
