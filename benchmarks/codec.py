"""Dataclasses to JSON values and back, by their annotations; strict in both directions."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from recallseg.engines.errors import InputError

__all__ = ["decode", "encode"]

T = TypeVar("T")


def encode(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, nested ones too, as JSON values."""
    return asdict(value)


def decode(kind: type[T], data: Any, where: str = "") -> T:
    """Rebuild a dataclass from :func:`encode`'s values.

    Parameters
    ----------
    kind : the dataclass; its fields may be dataclasses, tuples or mappings of them, optional, plain
        values or Any.
    data : JSON values.
    where : path to this value, for messages.

    Raises
    ------
    InputError
        If a field is missing, unknown or of another type; it names the field.
    """
    found: T = _value(kind, data, where or kind.__name__)
    return found


def _value(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if data is None else _value(inner, data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise _mismatch(where, "a list", data)
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise _mismatch(where, "an object", data)
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in data.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is not bool and isinstance(data, bool)):
        raise _mismatch(where, kind.__name__, data)
    return data


def _record(kind: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _mismatch(where, "an object", data)
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(data) - set(known))
    missing = [
        name
        for name, field in known.items()
        if name not in data and field.default is MISSING and field.default_factory is MISSING
    ]
    if unknown or missing:
        raise InputError(
            f"{where}: {'unknown' if unknown else 'missing'} field "
            f"'{(unknown or missing)[0]}'. The file was written by another version; measure again."
        )
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in data})


def _mismatch(where: str, expected: str, found: Any) -> InputError:
    return InputError(f"{where}: expected {expected}, got {type(found).__name__} {found!r:.40}.")
