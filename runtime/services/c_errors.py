"""What an error becomes in C: a status of recallseg.h, and a cure that can be applied there."""

from __future__ import annotations

import re
import sys

from recallseg.engines import errors
from recallseg.engines.imports import lacks_memory

__all__ = ["STATUS", "Stopped", "in_c", "status_of"]

STATUS: dict[type[BaseException], int] = {
    errors.InputError: 7,
    errors.ForkedError: 5,
    errors.BundleError: 8,
    errors.EngineUnavailableError: 9,
    errors.EngineError: 10,
    errors.DeadlineError: 11,
    errors.CancelledError: 20,
    errors.AuditError: 21,
    errors.LibraryError: 12,
    errors.LibraryNotFoundError: 13,
    errors.LibraryCorruptError: 14,
    errors.LibraryVersionError: 15,
    errors.LibraryMismatchError: 16,
    errors.LibraryLockedError: 17,
    errors.LibraryWriteError: 18,
    ModuleNotFoundError: 6,
    MemoryError: 19,
}
"""``RECALLSEG_E_*`` of recallseg.h, by the nearest class."""
INTERNAL = 99
_STOPPED = 4  # RECALLSEG_E_STATE

_IN_C = (
    (r"with mode='write'", "with recallseg_library_options.writable = 1"),
    (r"pass absent=\('(.*?)',\)", r"name '\1' in recallseg_exemplar.absent"),
    (r"Library\.open\(\.\.\., bundle=FOLDER\)", "recallseg_library_options.bundle = FOLDER"),
    (r"leave it out \(None\)", "leave it null"),
    (r"Give it with --audit-key", "Give it in recallseg_audit_options.key"),
    (r", for example with numpy\.nan_to_num\(image\)", ""),
    (
        r"with Segmenter\(\.\.\., frames=3\), say",
        "with recallseg_segmenter_options.memories = 3, say",
    ),
)
"""Cures in Python, and the same in C."""


class Stopped(Exception):  # noqa: N818 - no error of ours: the caller asked for it
    """The caller's progress callback wants no more."""


def status_of(error: BaseException) -> tuple[int, str]:
    """Return the status that an exception becomes, and its message, in the words of recallseg.h."""
    if lacks_memory(error):
        return STATUS[MemoryError], str(error) or "out of memory"
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), INTERNAL)
    if isinstance(error, ModuleNotFoundError):
        return status, (
            f"the Python package '{(error.name or '').partition('.')[0]}' is not installed beside "
            f"recallseg ({error}): install it with {sys.executable} -m pip"
        )
    if isinstance(error, Stopped):
        return _STOPPED, str(error)
    if not isinstance(error, errors.RecallSegError):
        return status, f"{type(error).__name__}: {error}"
    return status, in_c(str(error))


def in_c(message: str) -> str:
    """Return a message whose cure is C where it was Python."""
    for python, ours in _IN_C:
        message = re.sub(python, ours, message)
    return message
