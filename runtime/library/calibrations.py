"""Where a library keeps what was learnt from its exemplars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.runtime.library.store import Store

__all__ = ["read_calibration", "write_calibration"]

NOTE = "calibration"


def write_calibration(store: Store, calibration: Mapping[str, Any]) -> None:
    """Store JSON values for the exemplars as they are now."""
    store.check_writable("store a calibration")
    try:
        text = json.dumps({"digest": store.digest, "data": dict(calibration)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"a calibration must consist of finite JSON values: {error}.") from error
    store.catalog.set_note(NOTE, text)


def read_calibration(store: Store) -> dict[str, Any] | None:
    """Return what is stored, or None if there is nothing for the exemplars as they are now."""
    text = store.catalog.note(NOTE)
    stored = json.loads(text) if text else None
    return stored["data"] if stored is not None and stored["digest"] == store.digest else None
