"""Readers with every fault that a campaign must find."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from recallseg.engines.errors import InputError

__all__ = ["crash", "hang", "swallow", "wrong_exception"]


def wrong_exception(path: Path) -> None:
    """Fail as a reader must not."""
    raise KeyError("Rows")


def crash(path: Path) -> None:
    """Take the process down."""
    os.abort()


def hang(path: Path) -> None:
    """Never come back."""
    time.sleep(3600)


def swallow(path: Path) -> None:
    """Take more memory than there is room for."""
    np.ones(2**32, np.uint8)
    raise InputError("not reached")
