"""Reading a bundle's manifest: its values have the types and ranges of what an export writes.

What the values mean is :mod:`recallseg.engines.bundle`'s business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recallseg.engines.errors import BundleError, InputError
from recallseg.engines.inside import read_inside
from recallseg.engines.signing import PublicKey, check_bundle, trusted_keys

__all__ = ["MANIFEST", "data_files", "read_manifest"]

MANIFEST = "manifest.json"
_MOST_BYTES = 2**24
_LARGEST = 2**20
_GRAPH = re.compile(r"[a-z0-9-]{1,40}/[a-z0-9-]{1,40}/[a-z]{1,40}")


def read_manifest(folder: Path, trust: Sequence[PublicKey] | None = None) -> dict[str, Any]:
    """Return a folder's manifest.

    Parameters
    ----------
    trust : keys, one of which must have signed it; none for any; by default those of
        ``RECALLSEG_TRUST``, see :mod:`recallseg.engines.signing`.

    Raises
    ------
    BundleError
        If it cannot be read, is no JSON object, or has a value that no export writes.
    SignatureError
        If no trusted key signed it as it is.
    """
    file = folder / MANIFEST
    try:
        document = read_inside(folder, MANIFEST, _MOST_BYTES)
        keys = trusted_keys() if trust is None else trust
        if keys:
            check_bundle(folder, document, keys)
        manifest = json.loads(document)
        _check_plain(manifest, "manifest", 0)
    except InputError:  # of the trusted keys
        raise
    except OSError as error:
        raise BundleError(
            f"{error.filename} of a bundle cannot be read: {error.strerror}. See whether it is "
            "there, or copy the bundle again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"the manifest {file} cannot be read: {error}. Export it again."
        ) from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{file} is not the manifest of a RecallSeg bundle.")
    for key, check in _CHECKS.items():
        if key in manifest:
            try:
                check(manifest[key])
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise BundleError(
                    f"the manifest {file} has an unusable '{key}': {error}. Export it again."
                ) from error
    return manifest


def data_files(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return a graph's entries of files with its weights; format 2 had one, not in a list."""
    data = entry.get("data", ())
    return (data,) if isinstance(data, Mapping) else tuple(data)


def _check_plain(value: Any, where: str, depth: int) -> None:
    """Refuse what would be printed or computed with and is not plain: ValueError."""
    if depth > 16:
        raise ValueError(f"{where} is nested too deeply")
    if isinstance(value, str):
        if not all(c.isprintable() or c == "\n" for c in value) or len(value) > 2**16:
            raise ValueError(f"{where} is text that cannot be printed")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value) or abs(value) > 2**53:
            raise ValueError(f"{where} is not a number within bounds")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(key, f"a name in {where}", depth + 1)
            _check_plain(inner, f"{where[:200]}.{key[:40]}", depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, f"an entry of {where[:200]}", depth + 1)


def _name(value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not value.isprintable():
        raise ValueError(f"expected text of 1 to 256 characters, got {str(value)[:80]!r}")


def _texts(value: Any) -> None:
    for inner in value.values():
        _name(inner)


def _each(check: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(value: Any) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected values by name, got {type(value).__name__}")
        for inner in value.values():
            check(inner)

    return checked


def _geometry(value: Any) -> None:
    for name, size in value.items():
        sizes = size if isinstance(size, list) else [size]
        if any(type(s) is not int or not 0 < s <= _LARGEST for s in sizes):
            raise ValueError(f"'{name}' is {size!r}, expected 1 to {_LARGEST}")
    if 0 < value["image_size"] < value["feature_size"]:
        raise ValueError("the feature map is larger than the image")


def _normalisation(value: Any) -> None:
    for name in ("mean", "std"):
        numbers = value[name]
        if len(numbers) != 3 or any(type(n) not in (int, float) for n in numbers):
            raise ValueError(f"'{name}' is {numbers!r}, expected three numbers")
    if min(value["std"]) <= 0:
        raise ValueError(f"'std' is {value['std']!r}, expected numbers above 0")


def _memory(value: Any) -> None:
    if not isinstance(value["object_pointers"], bool):
        raise ValueError("'object_pointers' must be true or false")
    if type(value["pointer_time"]) not in (int, float):
        raise ValueError("'pointer_time' must be a number")


def _entry(value: Any) -> None:
    if not isinstance(value["file"], str) or not re.fullmatch("[0-9a-f]{64}", value["sha256"]):
        raise ValueError("a file needs its name and its SHA-256 in hex")
    for data in data_files(value):
        if "data" in data:
            raise ValueError(f"weights in {data['file']!r} have weights of their own")
        _entry(data)


def _graphs(value: Any) -> None:
    for key, entry in value.items():
        if not _GRAPH.fullmatch(key):
            raise ValueError(f"{key[:80]!r} is not VARIANT/PRECISION/GRAPH")
        _entry(entry)
        if not entry["file"].endswith(".onnx"):  # or runtimes take it for a format of their own
            raise ValueError(f"the graph {entry['file'][:80]!r} is no .onnx file")


_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "name": _name,
    "identity": _name,
    "weights": _each(_texts),
    "geometry": _geometry,
    "normalisation": _each(_normalisation),
    "memory": _memory,
    "graphs": _graphs,
    "golden": _entry,
}
