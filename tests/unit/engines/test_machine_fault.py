"""What the machine lacks is told from what is wrong with an input."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from recallseg.engines.errors import DeviceMemoryError, HostMemoryError, InputError
from recallseg.engines.machine_fault import SHORT_OF_MEMORY, machine_fault


def caused(by: BaseException) -> InputError:
    error = InputError("IM1.dcm cannot be read")
    error.__cause__ = by
    return error


def test_an_error_of_the_disk_is_told_from_one_of_the_file() -> None:
    assert machine_fault(caused(OSError(errno.EIO, "I/O error"))) == errno.EIO
    assert machine_fault(caused(caused(OSError(errno.EMFILE, "too many")))) == errno.EMFILE
    assert machine_fault(PermissionError(errno.EACCES, "not allowed")) == errno.EACCES
    assert not machine_fault(caused(OSError(errno.ENOENT, "no such file")))
    assert not machine_fault(caused(OSError("no gzip file")))
    assert not machine_fault(caused(EOFError("cut off")))
    assert not machine_fault(InputError("damaged"))
    assert not machine_fault(None)


def test_little_memory_is_no_fault_of_an_input() -> None:
    for error in (MemoryError(), HostMemoryError("x"), DeviceMemoryError("x")):
        assert machine_fault(error) == machine_fault(caused(error)) == SHORT_OF_MEMORY


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize(
    ("code", "said", "fault"),
    [
        (10 | 1 << 8, "disk I/O error", errno.EIO),
        (13, "database or disk is full", errno.ENOSPC),
        (8, "attempt to write a readonly database", errno.EROFS),
        (6, "database table is locked: state", errno.EAGAIN),
        (11, "database disk image is malformed", 0),
        (26, "file is not a database", 0),
        (1, "no such table: state", 0),
    ],
)
def test_what_sqlite_says_of_the_machine(code: int, said: str, fault: int, coded: bool) -> None:
    error = sqlite3.OperationalError(said)
    if coded:  # as of Python 3.11
        error.sqlite_errorcode = code
        error.args = ("other words",)
    assert machine_fault(caused(error)) == fault
