"""Regular files of a folder and all below it, and a reason for everything else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.json_text import printable

__all__ = ["MOST_FILES", "PassedOver", "files_below", "mode_of", "walk_folder"]

MOST_FILES = 1_000_000
"""Files in one folder and below; more is taken for a mistake (a whole disk, a loop)."""


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that is not taken, and why; ``unseen``: a folder, with all that is in it."""

    path: Path
    reason: str
    unseen: bool = False

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def mode_of(path: Path) -> int:
    """Return what a path leads to, as ``st_mode``; 0 if to nothing. For what a person named.

    Links are followed: what is read counts. Whether a name is taken, be it by a link to nothing,
    is asked by :func:`recallseg.engines.reading.is_there`, for who is to write there.

    Raises
    ------
    InputError
        If the machine does not say; caused by its error.
    """
    try:
        return os.stat(path).st_mode
    except ValueError:  # no name at all
        return 0
    except OSError as error:
        if not machine_fault(error):
            return 0
        raise InputError(
            f"{printable(path)} cannot be looked at: {error.strerror}. See to the disk, or the "
            "permission, and try again."
        ) from error


def files_below(folder: Path) -> list[Path]:
    """Return the regular files of a folder and all below it, hidden ones left out; links count.

    Raises
    ------
    InputError
        If one of the folders cannot be listed, or a file not be looked at: what is made of a part
        is another thing. Or for more than ``MOST_FILES``.
    """
    not_given: list[PassedOver] = []
    files = [path for path, _ in walk_folder(folder, True, [], not_given)]
    for each in not_given:
        raise InputError(f"{each}. See to the disk, or the permission, and try again.")
    return files


def walk_folder(
    root: Path, links: bool, passed: list[PassedOver], not_given: list[PassedOver]
) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield regular files in the order of their names; say of everything else why not."""

    def lacks(path: Path, what: str, error: OSError, *, unseen: bool = False) -> None:
        passed.append(PassedOver(path, f"{what}: {error.strerror}", unseen))
        if machine_fault(error):
            not_given.append(passed[-1])

    seen: set[tuple[int, int]] = set()
    waiting = [root]
    count = 0
    while waiting:
        folder = waiting.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:
                passed.append(PassedOver(folder, "a folder that was looked into by another way"))
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            lacks(folder, "cannot be looked into", error, unseen=True)
            continue
        below: list[Path] = []
        for entry in entries:
            path = folder / entry.name
            count += 1
            if count > MOST_FILES:
                raise InputError(
                    f"{printable(root)} holds more than {MOST_FILES} files. Name a folder below it."
                )
            if entry.name.startswith("."):
                passed.append(PassedOver(path, "hidden"))
                continue
            if entry.is_symlink() and not links:
                passed.append(PassedOver(path, "a symbolic link, which is not followed here"))
                continue
            try:
                status = entry.stat(follow_symlinks=links)
            except FileNotFoundError:
                if entry.is_symlink():
                    passed.append(PassedOver(path, "a symbolic link to nothing"))
                continue  # or taken away while we looked
            except OSError as error:
                lacks(path, "cannot be looked at", error)
                continue
            if stat.S_ISDIR(status.st_mode):
                below.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield path, status
            else:
                passed.append(PassedOver(path, "no regular file (pipe, socket or device)"))
        waiting += reversed(below)
