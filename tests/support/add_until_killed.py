"""Forks processes that add exemplars to a library until they are killed, for test_library_crash.

Reads one order per line: library, first exemplar, step, occurrence, with tabs between. With a step,
the new process kills itself just before that call is made for that time; step ``after`` has it
killed from outside after ``occurrence`` thousandths of the time that an add took at first. Says
``+ KEY`` when an add has returned, ``- KEY`` when a removal has, ``end STATUS`` when the process
is gone. Forking saves the import. The argument is a folder for a first, short-lived library.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from recallseg.runtime.library import Library, database, shards
from support.fake_library import HashEncoder, StubBundle, draw

STEPS: dict[str, tuple[Any, str]] = {
    "write": (os, "pwrite"),
    "fsync": (os, "fsync"),
    "unlink": (os, "unlink"),
    "statement": (database.Database, "execute"),
    "append": (shards.ShardWriter, "append"),
    "begin-shard": (shards.ShardWriter, "_begin"),
    "sync-shard": (shards.ShardWriter, "sync"),
}


def kill_before(step: str, occurrence: int) -> None:
    """Replace a function by one that kills this process at its ``occurrence``-th call."""
    owner, name = STEPS[step]
    original = getattr(owner, name)
    calls = 0

    def replaced(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, replaced)


def half_written(occurrence: int) -> None:
    """Kill this process in the middle of its ``occurrence``-th write to a file."""
    original, calls = os.pwrite, 0

    def replaced(descriptor: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == occurrence:
            original(descriptor, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(descriptor, data, offset)

    os.pwrite = replaced  # type: ignore[assignment]


def many(first: int) -> list[Any]:
    """Return three exemplars, as ``add_many`` takes them."""
    drawn = [(number, *draw(number)) for number in range(first, first + 3)]
    return [
        {"image": image, "masks": {"nucleus": mask, "wall": ~mask}, "key": f"case {number}"}
        for number, image, mask in drawn
    ]


def write_until_killed(path: str, first: int, step: str, occurrence: int, ready: int) -> None:
    """Add exemplars for ever, removing every fifth again; after ``many-``, three at a time."""
    together, step = step.startswith("many-"), step.removeprefix("many-")
    with Library.open(path, mode="write", encoder=HashEncoder()) as library:
        if step == "half-write":
            half_written(occurrence)
        elif step != "after":
            kill_before(step, occurrence)
        os.write(ready, b"1")
        while together:
            keys = library.add_many(many(first))
            os.write(1, "".join(f"+ {key}\n" for key in keys).encode())
            first += len(keys)
        for number in itertools.count(first):
            image, mask = draw(number)
            masks = {"nucleus": mask, "wall": ~mask} if number % 3 else {"nucleus": mask}
            absent = ("cyst",) if number % 2 else ()
            tags = {"n": str(number)}
            key = library.add(image, masks, absent=absent, tags=tags, key=f"case {number}")
            os.write(1, f"+ {key}\n".encode())
            if number % 5 == 4 and f"case {number - 1}" in library:
                library.remove(f"case {number - 1}")
                os.write(1, f"- case {number - 1}\n".encode())


def main() -> None:
    """Serve orders until the input ends."""
    with (  # imports what is imported at first use
        tempfile.TemporaryDirectory(dir=sys.argv[1]) as warm,
        Library.create(Path(warm) / "library", StubBundle(), encoder=HashEncoder()) as library,
    ):
        library.add(draw(0)[0], {"nucleus": draw(0)[1]})
        start = time.perf_counter()
        for number in range(1, 11):
            library.add(draw(number)[0], {"nucleus": draw(number)[1]})
        add_seconds = (time.perf_counter() - start) / 10
    for line in sys.stdin:
        path, first, step, occurrence = line.rstrip("\n").split("\t")
        listen, ready = os.pipe()
        child = os.fork()
        if child == 0:
            write_until_killed(path, int(first), step, int(occurrence), ready)
        os.close(ready)
        if step == "after":
            os.read(listen, 1)
            time.sleep(int(occurrence) / 1000 * add_seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(listen)
        os.write(1, f"end {os.waitstatus_to_exitcode(status)}\n".encode())


main()
