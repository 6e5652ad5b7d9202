"""What frozen values are made of: a mapping that can be pickled, comparison that knows arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, Union

import numpy as np

__all__ = ["FrozenMap", "public", "same_fields"]

K = TypeVar("K")
V = TypeVar("V")
Kind = TypeVar("Kind", bound=type)


class FrozenMap(Mapping[K, V]):
    """Like ``types.MappingProxyType`` of a dictionary of its own, which cannot be pickled.

    Parameters
    ----------
    items : a mapping, or pairs.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Union[Mapping[K, V], Iterable[tuple[K, V]]] = ()) -> None:
        self._items: dict[K, V] = dict(items)

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def public(kind: Kind) -> Kind:
    """Let a dataclass's own repr say where a user finds it: ``recallseg.Score(...)``.

    Its module stays where it is: pickles of earlier versions name it.
    """
    plain: Callable[[Any], str] = vars(kind)["__repr__"]

    @wraps(plain)
    def told(self: Any) -> str:
        return f"recallseg.{plain(self)}"

    setattr(kind, "__repr__", told)  # noqa: B010  # mypy wants no assignment to a class's method
    return kind


def same_fields(one: Any, other: Any, *passed_over: str) -> bool:
    """Whether two values of one dataclass are equal.

    Arrays are if all of their numbers are; a NaN is equal to another.
    """
    names = [field.name for field in fields(one) if field.name not in passed_over]
    return all(_same(getattr(one, name), getattr(other, name)) for name in names)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [*one] == [*other] and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, float) and one != one:  # NaN stands for what is not known
        return isinstance(other, float) and other != other
    return bool(one == other)
