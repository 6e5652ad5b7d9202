"""Releases of a library side by side in one folder, of which one is in use.

``FOLDER/1.2.0`` is the library of that release, beside ``1.2.0.json``, what it says of itself.
``FOLDER/current`` and ``FOLDER/previous`` are links to two of them; whoever opens
``FOLDER/current`` has what is in use, and services look before each query whether that is another.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from recallseg.engines.durable import make_folder, replace_file, sync_folder
from recallseg.engines.errors import InputError, LibraryError
from recallseg.engines.reading import is_there, read_file
from recallseg.engines.signing import PublicKey
from recallseg.runtime.library.releases import (
    Progress,
    Release,
    read_release,
    unpack,
    version_number,
)
from recallseg.runtime.library.storage import WriterLock, unreadable, writing

__all__ = ["CURRENT", "install", "installed", "installed_as", "roll_back"]

CURRENT, PREVIOUS, LOCK = "current", "previous", "install.lock"


def install(
    path: Path,
    folder: Path,
    trust: Sequence[PublicKey],
    *,
    older: bool = False,
    progress: Progress | None = None,
) -> Release:
    """Unpack a release beside those that are there, and put it in use; nothing changes before that.

    Parameters
    ----------
    path : file that ``release`` wrote.
    folder : of all releases of this library; made if there is none.
    trust : keys of which one must have signed it.
    older : whether it may take the place of a newer one.

    Raises
    ------
    SignatureError
        If none of ``trust`` signed it.
    LibraryCorruptError
        If a bit of it was changed: says where.
    InputError
        If it is older than the one in use, of another library, or another than is there as that
        version.
    LibraryLockedError
        If another process installs here.
    LibraryError, LibraryWriteError
    """
    described = read_release(path, trust)
    with writing(folder):
        make_folder(folder, mode=0o700)
    lock = WriterLock(folder / LOCK)
    try:
        used = installed(folder)
        if used is not None:
            _check_follows(described, used, folder, older)
        target = folder / described.version
        with writing(folder):
            there = is_there(target)
        if there:
            if _stated(folder, described.version) != described:
                raise InputError(
                    f"{folder} has another release {described.version} already. Give what was "
                    "changed a version of its own."
                )
        else:
            text = json.dumps(described.to_json(), sort_keys=True, indent=1)
            with writing(folder):  # before the library: one that is there must be known
                replace_file(_record(folder, described.version), text.encode())
            try:
                described = unpack(path, target, trust, progress)
            except BaseException:
                _record(folder, described.version).unlink(missing_ok=True)
                raise
        if used is None or used.version != described.version:
            _use(folder, described.version, None if used is None else used.version)
    finally:
        lock.release()
    return described


def roll_back(folder: Path) -> Release:
    """Put the release back in use that was before, and return it; the other becomes the previous.

    Raises
    ------
    LibraryError
        If none was in use before.
    """
    lock = WriterLock(folder / LOCK) if folder.is_dir() else None
    try:
        used, before = installed(folder), _linked(folder, PREVIOUS)
        found = None if before is None else _stated(folder, before)
        if used is None or before is None or found is None:
            raise LibraryError(
                f"no other release was in use in {folder} before, so there is none to go back to."
            )
        _use(folder, before, used.version)
        return found
    finally:
        if lock is not None:
            lock.release()


def installed(folder: Path) -> Release | None:
    """Return the release that is in use in a folder; None if none is."""
    version = _linked(folder, CURRENT)
    return None if version is None else _stated(folder, version)


def installed_as(folder: Path) -> Release | None:
    """Return which of the releases installed beside it a folder, or a link to it, is; else None."""
    real = folder.resolve()
    try:
        version_number(real.name)
    except InputError:
        return None
    return _stated(real.parent, real.name)


def _check_follows(new: Release, used: Release, folder: Path, older: bool) -> None:
    if new.name != used.name:
        raise InputError(
            f"{folder} holds releases of the library '{used.name}', this is one of '{new.name}'. "
            "Choose another folder."
        )
    if version_number(new.version) < version_number(used.version) and not older:
        raise InputError(
            f"release {new.version} is older than {used.version}, which is in use in {folder}. "
            "Go back with '--rollback', or say that it shall be older ('--older')."
        )


def _use(folder: Path, version: str, before: str | None) -> None:
    """Let the links say what is in use and what was; the first decides, in one step."""
    with writing(folder):
        for name, target in ((CURRENT, version), (PREVIOUS, before)):
            if target is None:
                continue
            temporary = folder / f".{name}.new"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            os.replace(temporary, folder / name)
        sync_folder(folder)


def _linked(folder: Path, name: str) -> str | None:
    try:
        version = os.readlink(folder / name)
        version_number(version)
        return version if is_there(folder / version) else None
    except (FileNotFoundError, InputError):
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:  # no link
            return None
        # What is in use must not be taken for nothing: an older one would take its place.
        raise unreadable(str(folder / name), error, "See to the disk, and try again.") from error


def _record(folder: Path, version: str) -> Path:
    return folder / f"{version}.json"


def _stated(folder: Path, version: str) -> Release | None:
    """Return what a release that was installed says of itself."""
    path = _record(folder, version)
    try:
        return Release.from_json(json.loads(read_file(path)), path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LibraryError(f"{path} cannot be read: {error}. Install the release again.") from error
