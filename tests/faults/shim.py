"""Builds and drives ``shim.c``: calls to the system that fail, and a log of what they changed."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CALLS",
    "FAULTS",
    "SHORT",
    "Change",
    "Fault",
    "Injected",
    "acknowledge",
    "build",
    "by_signal",
    "changes",
    "counting",
    "injecting",
    "jumping_clock",
    "recording",
]

SHORT = -1
"""Instead of an errno: the call does half of what it was asked for."""

_SIGNALS = -100

CALLS = {
    "open": 1,
    "read": 2,
    "write": 4,
    "sync": 8,
    "rename": 16,
    "unlink": 32,
    "mkdir": 64,
    "map": 128,
    "truncate": 256,
    "copy": 512,
    "symlink": 1024,
    "list": 2048,
    "stat": 4096,
    "any": 2047,
}


def by_signal(number: int) -> Fault:
    """Return what lets the process get a signal at a call, which is then done."""
    return Fault("any", _SIGNALS - number)


@dataclass(frozen=True)
class Fault:
    """What a call fails with, and whether all later ones of its kind fail too."""

    call: str
    error: int
    lasting: bool = False

    def __str__(self) -> str:
        name = "SHORT" if self.error == SHORT else errno.errorcode[self.error]
        return f"{self.call}:{name}{'+' if self.lasting else ''}"


FAULTS = (
    Fault("open", errno.EMFILE),
    Fault("open", errno.EMFILE, lasting=True),
    Fault("open", errno.EIO),
    Fault("open", errno.ENOSPC),
    Fault("read", errno.EIO),
    Fault("read", errno.EINTR),
    Fault("read", SHORT),
    Fault("write", errno.ENOSPC),
    Fault("write", errno.ENOSPC, lasting=True),
    Fault("write", errno.EIO),
    Fault("write", errno.EINTR),
    Fault("write", SHORT),
    Fault("sync", errno.EIO),
    Fault("sync", errno.ENOSPC, lasting=True),
    Fault("rename", errno.EIO),
    Fault("rename", errno.ENOSPC),
    Fault("unlink", errno.EIO),
    Fault("unlink", errno.EIO, lasting=True),
    Fault("mkdir", errno.ENOSPC),
    Fault("map", errno.ENOMEM),
    Fault("map", errno.ENOMEM, lasting=True),
    Fault("truncate", errno.ENOSPC),
    Fault("truncate", errno.EIO),
    Fault("copy", errno.ENOSPC),
    Fault("copy", errno.ENOSPC, lasting=True),
    Fault("copy", errno.EIO),
    Fault("copy", SHORT),
    Fault("symlink", errno.EIO),
    Fault("symlink", errno.ENOSPC),
    Fault("list", errno.EIO),
    Fault("stat", errno.EIO),
)


def build(folder: Path) -> Path:
    """Compile the shim; return the library that LD_PRELOAD must name."""
    made = folder / "faults_shim.so"
    source = Path(__file__).with_name("shim.c")
    options = ["-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-nonnull-compare"]
    subprocess.run(["cc", *options, "-o", made, source, "-ldl"], check=True)
    return made


@dataclass
class Injected:
    """How many calls failed."""

    fired: int = 0


@contextmanager
def injecting(folder: Path, fault: Fault, number: int) -> Iterator[Injected]:
    """Let the ``number``-th call below ``folder`` fail, in this process."""
    shim = ctypes.CDLL(None)
    found = Injected()
    shim.faults_arm(
        os.fsencode(folder), CALLS[fault.call], ctypes.c_long(number), fault.error, fault.lasting
    )
    try:
        yield found
    finally:
        shim.faults_disarm()
        shim.faults_fired.restype = ctypes.c_long
        found.fired = shim.faults_fired()


@contextmanager
def counting(folder: Path) -> Iterator[dict[str, int]]:
    """Count the calls below ``folder`` in this process; by the names of ``CALLS``, at the end."""
    shim = ctypes.CDLL(None)
    found: dict[str, int] = {}
    shim.faults_arm(os.fsencode(folder), -1, ctypes.c_long(0), 0, False)
    try:
        yield found
    finally:
        shim.faults_disarm()
        shim.faults_counted.restype = ctypes.c_long
        found.update({call: shim.faults_counted(kinds) for call, kinds in CALLS.items()})


@contextmanager
def jumping_clock(most: int) -> Iterator[None]:
    """Let the time of day jump back and forth by less than ``most`` seconds at every look at it."""
    shim = ctypes.CDLL(None)
    shim.faults_clock(ctypes.c_long(most))
    try:
        yield
    finally:
        shim.faults_clock(ctypes.c_long(0))


@dataclass(frozen=True)
class Change:
    """One thing that was done to a file or folder.

    ``kind``: ``c`` made, ``w`` written at ``offset``, ``t`` cut or lengthened to ``offset`` bytes,
    ``a`` given room up to ``offset``, ``s`` synced, ``r`` renamed or ``l`` linked to ``data``,
    ``u`` removed, ``d`` folder made, ``!`` something acknowledged (``data`` says what).
    """

    kind: str
    path: str
    offset: int
    data: bytes


_ENTRY = struct.Struct("=qQIc3x")


def changes(log: bytes) -> Iterator[Change]:
    """Read the log of the shim."""
    place = 0
    while place < len(log):
        offset, size, length, kind = _ENTRY.unpack_from(log, place)
        place += _ENTRY.size
        path = os.fsdecode(log[place : place + length])
        place += length
        yield Change(kind.decode(), path, offset, log[place : place + size])
        place += size


def acknowledge(descriptor: int, what: bytes) -> None:
    """Note in the log of the shim that a caller was told that something is done."""
    os.write(descriptor, _ENTRY.pack(0, len(what), 0, b"!") + what)


@contextmanager
def recording(folder: Path, log: Path) -> Iterator[int]:
    """Write down every change below ``folder``; yields the descriptor of the log."""
    shim = ctypes.CDLL(None)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    shim.faults_record(os.fsencode(folder), descriptor)
    try:
        yield descriptor
    finally:
        shim.faults_record(os.fsencode(folder), -1)
        os.close(descriptor)
