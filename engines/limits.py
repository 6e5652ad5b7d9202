"""How much a file may become: one limit for every decoder and container.

A few kilobytes can expand to terabytes (zip, gzip, PNG, deflated DICOM), or merely declare them.
Each decoder is asked, or counts, before memory is set aside, and stops at ``RECALLSEG_MAX_BYTES``.
"""

from __future__ import annotations

import os
import re

from recallseg.engines.errors import InputError

__all__ = ["DEFAULT_BYTES", "describe_bytes", "max_bytes", "parse_bytes"]

DEFAULT_BYTES = 2**32
"""Four gigabytes of pixels: above every volume of a scanner, below what a workstation has."""
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def max_bytes() -> int:
    """Return the most bytes that one file may decode to: ``$RECALLSEG_MAX_BYTES``, else 4 GiB.

    Raises
    ------
    InputError
        If the variable is no size like 512M, 8GiB or 1000000.
    """
    text = os.environ.get("RECALLSEG_MAX_BYTES")
    return parse_bytes(text, "RECALLSEG_MAX_BYTES") if text else DEFAULT_BYTES


def parse_bytes(text: str, name: str) -> int:
    """Return a size in bytes; InputError, naming ``name``, if it is none like 512M or 8GiB."""
    found = re.fullmatch(r"(\d{1,18})\s*([kmgt]?)(i?b)?", text.strip().lower())
    if found is None or int(found[1]) == 0:
        raise InputError(
            f"{name} must be a size like 512M or 8GiB, got {text!r}. Mend or unset it."
        )
    return int(found[1]) * _UNITS[found[2]]


def describe_bytes(limit: int) -> str:
    """Return a limit as messages say it, with where it is set."""
    amount = f"{limit / 2**30:.3g} GiB" if limit >= 2**29 else f"{limit / 2**20:.3g} MiB"
    return f"{amount} (set RECALLSEG_MAX_BYTES for another limit)"
