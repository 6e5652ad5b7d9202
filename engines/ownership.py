"""Whose word a file is: one rule, OpenSSH's, for everything that is believed or run.

A file is one's own word if it belongs to this user or to the superuser and nobody else can write
it; a secret also if nobody else can read it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["foreign"]

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def foreign(
    path: Path, found: os.stat_result, *, secret: bool = False, closed: bool = False
) -> str:
    """Say why a file or folder may not be one's own word, and the command that mends it.

    Parameters
    ----------
    found : of the file itself (``lstat``, ``fstat``), or of what a link leads to where the user
        chose the path; a link is refused.
    secret : nobody else may read it either.
    closed : it lies in a folder that nobody else can enter, so its permissions do not matter.

    Returns
    -------
    str
        Begins with the path or ends with the command; empty if nothing is wrong.
    """
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link: put the file or folder itself there"
    if found.st_uid not in (0, os.geteuid()):
        return (
            f"{path} belongs to user {found.st_uid}: chown it to user {os.geteuid()}, or remove it"
        )
    if secret and found.st_mode & _OTHERS:
        mode = "700" if stat.S_ISDIR(found.st_mode) else "600"
        return f"others may read {path}: chmod {mode} {path}"
    if not closed and found.st_mode & _OTHERS_WRITE:
        return f"others may write {path}: chmod go-w {path}, if you know who wrote it"
    return ""
