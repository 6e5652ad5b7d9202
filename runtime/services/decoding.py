"""Files of strangers are decoded in a process of their own, within limits of memory and time.

A decoder that hangs, crashes or asks for more memory than there is takes that process with it and
nothing else: the file is set aside with the reason, and the next one gets a new process. This
guards against accidents of size and time, and against crashes. It is no sandbox: the process runs
as the same user, and what it sends back is trusted.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.child import bound_process, ending, python_command, python_environment
from recallseg.engines.errors import InputError
from recallseg.engines.limits import max_bytes
from recallseg.engines.machine_fault import SHORT_OF_MEMORY, machine_fault
from recallseg.engines.reading import read_text
from recallseg.runtime.formats.dicom_headers import DicomHeader, Header, NotGiven, read_header
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.formats.images import read_image
from recallseg.runtime.formats.reading import count_item, read_item
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import printable

__all__ = ["DecodingLimits", "IsolatedDecoder", "answer"]

LOOK_S = 0.2  # between two looks at whether to stop
START_S = 120.0  # for the process to start, on a busy or small machine


def _default_memory() -> int:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(whole, 2 * 2**30 + 3 * max_bytes())


@dataclass(frozen=True)
class DecodingLimits:
    """What one item may take.

    Attributes
    ----------
    file_bytes : all its files together.
    memory_bytes : address space of the process that decodes it.
    seconds, seconds_per_mb, most_seconds : time; the second for each 10^6 bytes of its files.
    header_seconds : time for the header of one file.
    """

    file_bytes: int = field(default_factory=max_bytes)
    memory_bytes: int = 0
    seconds: float = 60.0
    seconds_per_mb: float = 0.3
    most_seconds: float = 900.0
    header_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not self.memory_bytes:
            object.__setattr__(self, "memory_bytes", _default_memory())

    def time_for(self, item: Item) -> float:
        """Return the seconds that an item may take."""
        return min(self.most_seconds, self.seconds + self.seconds_per_mb * item.signature[1] / 1e6)


@dataclass(frozen=True)
class _Question:
    """What the other process is asked of an item: its pixels, or how many volumes it holds."""

    item: Item
    count: bool
    voi: bool = False
    as_stored: bool = False
    time: int | None = None
    stack: str | None = None


@dataclass(frozen=True)
class _Unreadable:
    """Why the other process has no answer, and the number of the machine's error if that is why."""

    why: str
    number: int = 0


class IsolatedDecoder:
    """Reads items one after the other in a process that is started when it is first needed."""

    def __init__(self, limits: DecodingLimits | None = None) -> None:
        self.stop: Callable[[], bool] = lambda: False
        """Looked at while something is read: what says True ends that without an answer."""
        self._limits = limits or DecodingLimits()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection[Any, Any] | None = None

    def read(
        self,
        item: Item,
        *,
        voi: bool = False,
        as_stored: bool = False,
        time: int | None = None,
        stack: str | None = None,
    ) -> NDArray[Any] | Volume | None:
        """Return an image HxW or HxWx3, or a volume; None if ``stop`` said so meanwhile.

        Parameters
        ----------
        voi, time, stack : see :func:`recallseg.runtime.formats.reading.read_volume`.
        as_stored : see :func:`recallseg.runtime.formats.images.read_image`.

        Raises
        ------
        InputError
            If it cannot be read, is no regular file any more, or breaks a limit. Whether that is
            its fault, :func:`recallseg.engines.machine_fault.machine_fault` says.
        """
        found = self._of_item(_Question(item, False, voi, as_stored, time, stack))
        assert found is None or isinstance(found, np.ndarray | Volume)
        return found

    def count(self, item: Item, stack: str | None = None) -> int | None:
        """Return how many volumes an item holds at one place; None and errors as :meth:`read`."""
        found = self._of_item(_Question(item, True, stack=stack))
        assert found is None or isinstance(found, int)
        return found

    def _of_item(self, question: _Question) -> Any:
        item = question.item
        if item.trouble:
            raise InputError(item.trouble) from _caused(item.fault)
        size = item.signature[1]
        if size > self._limits.file_bytes:
            raise InputError(
                f"{printable(item.path)} has {size} bytes; at most {self._limits.file_bytes} are "
                "read here."
            )
        found = self._ask(question, item.path, self._limits.time_for(item))
        if isinstance(found, _Unreadable):
            raise InputError(found.why) from _caused(found.number)
        return found

    def read_header(self, path: Path) -> Header:
        """Do as :func:`recallseg.runtime.formats.dicom_headers.read_header`, within limits."""
        try:
            found = self._ask(path, path, self._limits.header_seconds)
        except InputError as error:
            number = machine_fault(error)
            return NotGiven(str(error), number) if number else str(error)
        if isinstance(found, _Unreadable):
            return NotGiven(found.why, found.number) if found.number else found.why
        assert found is None or isinstance(found, DicomHeader | NotGiven | str)
        return found

    def _ask(self, question: Any, path: Path, seconds: float) -> Any:
        try:
            return self._asked(question, path, seconds)
        except BaseException:
            # What is left on the line is no answer to the next question: it may be pixels.
            self.close()
            raise

    def _asked(self, question: Any, path: Path, seconds: float) -> Any:
        link = self._started()
        until, worked = monotonic() + seconds, self._worked()
        try:
            link.send(question)
            while not link.poll(LOOK_S):
                if self.stop():
                    self.close()
                    return None
                if monotonic() > until:
                    waited = seconds - (self._worked() - worked)
                    if waited > seconds / 2:
                        raise InputError(
                            f"{printable(path)} was not read within {seconds:.0f} s, of which "
                            f"{waited:.0f} passed in waiting for it: the disk is slow, or the "
                            "network to it. The file may be as it should; try again."
                        ) from _caused(errno.ETIMEDOUT)
                    raise InputError(
                        f"{printable(path)} was not read within {seconds:.0f} s: it is damaged, or "
                        "made to hang."
                    )
            return _receive(link)
        except (EOFError, OSError) as error:
            status = self._process.wait() if self._process is not None else None
            if status == -signal.SIGKILL:  # by the system, where memory is short
                raise InputError(
                    f"{printable(path)}: the process that read it was killed: the machine has too "
                    "little memory, or somebody ended it."
                ) from _caused(SHORT_OF_MEMORY)
            raise InputError(
                f"{printable(path)} ended the process that read it ({ending(status)}): it is "
                "damaged, or made to do so."
            ) from error

    def _worked(self) -> float:
        """Return the seconds that the process's threads worked, or waited for a core for that."""
        assert self._process is not None
        try:
            threads = [*Path(f"/proc/{self._process.pid}/task").iterdir()]
            told = [read_text(thread / "schedstat") for thread in threads]
            return sum(int(number) for line in told for number in line.split()[:2]) / 1e9
        except (OSError, ValueError):  # a kernel that does not tell: then all of it was work
            return monotonic()

    def close(self) -> None:
        """End the process. Harmless if repeated; the next item gets a new one."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._link = self._process = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Connection[Any, Any]:
        if self._link is not None and self._process is not None and self._process.poll() is None:
            return self._link
        self.close()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arguments = (theirs.fileno(), self._limits.memory_bytes, os.getpid())
            self._process = subprocess.Popen(  # noqa: S603  # this Python, this module
                python_command(__name__, *map(str, arguments)),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=python_environment(),
            )
            self._link = Connection(ours.detach())
        if not self._link.poll(START_S):  # its own time is not the first item's
            raise OSError(f"the process that reads files did not start within {START_S:.0f} s")
        try:
            self._link.recv()
        except EOFError:
            raise OSError(
                f"the process that reads files could not start within {self._limits.memory_bytes} "
                "bytes of address space"
            ) from None
        return self._link


def _caused(number: int) -> OSError | None:
    """Return the error of the machine that has this number; None for 0, where it has none."""
    return OSError(number, os.strerror(number)) if number else None


def _send(link: Connection[Any, Any], value: Any) -> None:
    """Send a value; arrays go as they lie in memory, not through a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    link.send((head, [part.nbytes for part in raw]))
    for part in raw:
        if part.nbytes:
            link.send_bytes(part)


def _receive(link: Connection[Any, Any]) -> Any:
    head, sizes = link.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if buffer:
            link.recv_bytes_into(buffer)
    return pickle.loads(head, buffers=buffers)  # noqa: S301  # of our own process, see above


def _answer(question: Path | _Question) -> Any:
    files = (question,) if isinstance(question, Path) else question.item.files
    for path in files:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{printable(path)} is no regular file any more.")
    if isinstance(question, Path):
        return read_header(question)
    item = question.item
    if question.count:
        return count_item(item, question.stack)
    if item.kind == "image":
        return read_image(item.path, as_stored=question.as_stored)
    return read_item(item, voi=question.voi, time=question.time, stack=question.stack)


def answer(question: Any) -> Any:
    """Return what was asked for of a file or item, or why it cannot be had."""
    path = question if isinstance(question, Path) else question.item.path
    try:
        return _answer(question)
    except InputError as error:
        return _Unreadable(printable(error), machine_fault(error))
    except MemoryError:
        return _too_much(question)
    except Exception as error:  # of a decoder, whatever it may be; it is told, never kept
        why = f"{printable(path)} cannot be read: {type(error).__name__}: {printable(error)}"
        return _Unreadable(why, machine_fault(error))


def _too_much(question: Any) -> _Unreadable:
    path = question if isinstance(question, Path) else question.item.path
    why = f"{printable(path)} needs more memory than an item may take, or than there is."
    return _Unreadable(why, SHORT_OF_MEMORY)


def _serve(link: Connection[Any, Any]) -> None:
    with suppress(ModuleNotFoundError):  # told when a file needs it
        import pydicom.pixels  # noqa: F401  # takes seconds on a small machine
    link.send("ready")
    while True:
        try:
            question = link.recv()
        except EOFError:
            return
        found = answer(question)
        try:
            _send(link, found)
        except MemoryError:
            _send(link, _too_much(question))
        except BrokenPipeError:
            return  # it was not waited for


def main() -> None:
    """Read what is asked for, until nobody asks any more; see :class:`IsolatedDecoder`."""
    descriptor, memory, parent = map(int, sys.argv[1:4])
    if bound_process(parent, memory):
        _serve(Connection(descriptor))
