"""Cuts the power at every point of a run, and looks at what the disk then holds.

A run is recorded by the shim: every write, sync, name made, changed or removed, and every time a
caller was told that something is done. The log is replayed up to a point; what was not synced by
then is there in part: nothing of it, all of it, or any of it in any order, the last write torn.
Strictly by POSIX: syncing a file does not make its name durable, syncing its folder does; names in
one folder survive in the order in which they were made.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.shim import Change, acknowledge, changes, recording

__all__ = ["Step", "cut_everywhere", "record"]

SECTOR = 512
Step = Callable[[Path], Any]


@dataclass
class _File:
    """A file: what is on the disk for sure, and what was written since."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        self.synced, self.pending = self.content(self.pending), []

    def content(self, applied: list[tuple[str, int, bytes]]) -> bytearray:
        """What it holds if just these changes had reached the disk, in this order."""
        data = bytearray(self.synced)
        for kind, offset, written in applied:
            if kind == "w":
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(written)] = written
            elif kind == "t":
                del data[offset:]
                data.extend(bytes(offset - len(data)))
            else:
                data.extend(bytes(max(0, offset - len(data))))
        return data


_FOLDER = None
_Names = dict[str, "_File | None"]


class _Disk:
    """Names and files, as far as they are durable, and what has been done to them since."""

    def __init__(self, root: Path) -> None:
        self.durable: _Names = {str(root): _FOLDER}
        for place, folders, files in os.walk(root):
            self.durable.update({os.path.join(place, name): _FOLDER for name in folders})
            for name in files:
                path = os.path.join(place, name)
                self.durable[path] = _File(bytearray(Path(path).read_bytes()))
        self.live = dict(self.durable)
        self.pending: dict[str, list[tuple[str, str, _File | None]]] = {}

    def apply(self, change: Change) -> None:
        """Take one change, as the process saw it."""
        path = change.path.removesuffix(" (deleted)")
        if change.kind in "wta":
            file = self.live.get(path)
            if file is not None:
                file.pending.append((change.kind, change.offset, change.data))
        elif change.kind == "s":
            file = self.live.get(path)
            if file is not None:
                file.sync()
            elif path in self.live:
                for operation in self.pending.pop(path, []):
                    _rename(self.durable, operation)
        elif change.kind == "r":
            to = os.fsdecode(change.data)
            moved = [(old, to + old[len(path) :]) for old in self.live if _below(old, path)]
            files = {new: self.live.pop(old) for old, new in moved}
            for old, new in moved:
                # In the folder of the new name; the old one goes with it, as one change does.
                self._note(new, ("r" + old, new, files[new]))
            self.live.update(files)
        elif change.kind in "cd":
            file = _File() if change.kind == "c" else _FOLDER
            self.live[path] = file
            self._note(path, ("c", path, file))
        elif change.kind == "l":
            to = os.fsdecode(change.data)
            self.live[to] = self.live[path]
            self._note(to, ("c", to, self.live[path]))
        elif change.kind == "u":
            self.live.pop(path, None)
            self._note(path, ("u", path, None))

    def _note(self, path: str, operation: tuple[str, str, _File | None]) -> None:
        self.pending.setdefault(os.path.dirname(path), []).append(operation)

    def after_a_cut(self, how: str, rng: random.Random) -> dict[str, bytes | None]:
        """Return paths and contents after the power was cut; None for a folder."""
        names = dict(self.durable)
        for operations in self.pending.values():
            kept = {"none": 0, "all": len(operations)}.get(how, rng.randint(0, len(operations)))
            for operation in operations[:kept]:
                _rename(names, operation)
        found: dict[str, bytes | None] = {}
        for path, file in names.items():
            if any(str(parent) not in names for parent in _parents(path, self.durable)):
                continue
            found[path] = None if file is None else bytes(file.content(_some(file, how, rng)))
        return found


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _parents(path: str, names: _Names) -> list[Path]:
    root = next(iter(names))
    return [parent for parent in Path(path).parents if _below(str(parent), root)]


def _rename(names: _Names, operation: tuple[str, str, _File | None]) -> None:
    kind, path, file = operation
    if kind == "u":
        names.pop(path, None)
        return
    if kind.startswith("r"):
        names.pop(kind[1:], None)
    names[path] = file


def _some(file: _File, how: str, rng: random.Random) -> list[tuple[str, int, bytes]]:
    """Return the changes that reached the disk, in the order in which they did."""
    if how in ("none", "all"):
        return file.pending if how == "all" else []
    chosen = [change for change in file.pending if rng.random() < 0.5]
    if how == "reordered":
        rng.shuffle(chosen)
    if chosen and chosen[-1][0] == "w" and how in ("torn", "reordered"):
        _, offset, data = chosen[-1]
        chosen[-1] = ("w", offset, data[: SECTOR * rng.randint(0, len(data) // SECTOR)])
    return chosen


def record(root: Path, log: Path, steps: list[Step], state: Callable[[Path], Any]) -> list[Any]:
    """Do the steps below ``root``; return the states before the first and after each."""
    states = [state(root)]
    for number, step in enumerate(steps):
        with recording(root, log.with_suffix(f".{number}")) as descriptor:
            step(root)
            acknowledge(descriptor, b"%d" % number)
        states.append(state(root))
    return states


def cut_everywhere(
    base: Path,
    root: Path,
    logs: list[Path],
    states: list[Any],
    state: Callable[[Path], Any],
    *,
    cuts: int,
    seed: int,
) -> Iterator[tuple[Counter[str], str]]:
    """Replay to points all over the logs; yield counts, and what was wrong (empty if nothing).

    ``base`` is a copy of ``root`` from before the first step; images of the disk are made at
    ``root``, so that paths in the log are theirs.
    """
    rng = random.Random(seed)
    events = [change for log in logs for change in changes(log.read_bytes())]
    every = max(1, len(events) * 4 // cuts)
    shutil.rmtree(root)
    shutil.copytree(base, root)
    disk, told = _Disk(root), 0
    offset = rng.randrange(every)
    for number, change in enumerate(events):
        if change.kind == "!":
            told += 1
        else:
            disk.apply(change)
        if number % every != offset and change.kind != "!":
            continue
        for how in ("none", "all", "torn", "reordered"):
            _write(root, disk.after_a_cut(how, rng))
            said = ""
            try:
                found = state(root)
                if found not in states[told : told + 2]:
                    said = f"after {told} steps it is {found}"
            except BaseException as error:
                said = f"unreadable: {error!r}"
            if said:
                said = f"power cut at {number} of {len(events)} ({how}, {change.kind}): {said}"
            yield Counter({how: 1}), said


def _write(root: Path, found: dict[str, bytes | None]) -> None:
    shutil.rmtree(root)
    for path, content in sorted(found.items()):
        if content is None:
            Path(path).mkdir(mode=0o700)
        else:
            Path(path).write_bytes(content)
