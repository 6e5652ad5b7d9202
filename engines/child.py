"""A process of its own for what strangers made: this Python, within limits, not left behind."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

__all__ = ["bound_process", "ending", "python_command", "python_environment"]

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``main()`` of a module, in this Python.

    Unlike with ``python -m``, nothing is imported from the current folder, which may be a bundle or
    an inbox that others wrote.
    """
    start = f"import sys; sys.path[:] = [p for p in sys.path if p]; import {module} as m; m.main()"
    return [sys.executable, "-c", start, *arguments]


def python_environment() -> dict[str, str]:
    """Return the environment in which :func:`python_command` imports what this process imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def bound_process(parent: int, memory: int | None) -> bool:
    """Let this process end with ``parent``, leave no core, have ``memory`` bytes of addresses.

    Ctrl-C is the parent's to hear. Returns False if the parent is gone already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            return False
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return True


def ending(status: int | None) -> str:
    """Return how a process ended: its status, or the signal; real-time ones have no name."""
    if status is None or status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
