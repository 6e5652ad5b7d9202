"""What a process opens and writes, as the kernel was asked for it (strace)."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["Trace", "trace"]

_LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+|0x[0-9a-f]+)")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_WRITES = ("O_WRONLY", "O_RDWR", "O_CREAT")
_READ_ONLY = re.compile(
    "access|chdir|exec|getcwd|getxattr|inotify|list|readlink|stat|statfs|statx|uselib"
)
_NOBODYS = ("/dev/null", "/dev/tty", "/proc/")
"""Files that keep nothing."""


@dataclass
class Trace:
    """What was seen; ``written`` are paths that were made, changed or removed."""

    sockets: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    stdout: str = ""

    def written_outside(self, *named: Path) -> list[str]:
        inside = tuple(str(folder) for folder in named)
        return sorted(path for path in self.written if not path.startswith((*inside, *_NOBODYS)))


def trace(command: Sequence[str | Path], cwd: Path, env: Mapping[str, str], logs: Path) -> Trace:
    """Run a command, which has to succeed, and return what it and its children asked for."""
    logs.mkdir()
    try:
        done = subprocess.run(
            [
                *("strace", "-ff", "-y", "-s", "4096", "-qq", "-e", "trace=%file,%network"),
                *("-o", logs / "trace", *command),
            ],
            cwd=cwd,
            env=dict(env),
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    assert done.returncode == 0, done.stderr
    found = Trace(stdout=done.stdout)
    for log in logs.iterdir():
        for line in log.read_text(errors="replace").splitlines():
            _read(line, cwd, found)
    return found


def _read(line: str, cwd: Path, found: Trace) -> None:
    call = _LINE.match(line)
    if call is None:
        return
    name, arguments, result = call.groups()
    if name in _NETWORK:
        if "AF_INET" in arguments:
            found.sockets.append(line)
    elif result.startswith("-") or _READ_ONLY.search(name):
        return
    elif not name.startswith("open") or any(flag in arguments for flag in _WRITES):
        for folder, path in _PATH.findall(arguments):
            found.written.add(os.path.normpath(os.path.join(folder or str(cwd), path)))


_NETWORK = {"socket", "connect", "bind", "listen", "accept", "accept4", "getsockname", "sendto"} | {
    *("getpeername", "setsockopt", "getsockopt", "recvfrom", "sendmsg", "recvmsg", "shutdown"),
    *("socketpair", "sendmmsg", "recvmmsg"),
}
