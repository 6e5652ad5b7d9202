"""Messages in Protocol Buffers' wire format, read field by field where they lie.

onnx itself is no dependency of the runtime, and a file of somebody else's is looked at before
anything parses it. The format is https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["INTEGER", "INTEGERS", "MESSAGE", "MESSAGES", "Kind", "Kinds", "Wire"]

MOST_FIELDS = 20_000_000
_NUMBERS = 1 << 29
_VARINT, _LENGTH = 0, 2


@dataclass(frozen=True)
class Kind:
    """By which wire types a field may be encoded, and whether it may come more than once."""

    wires: frozenset[int]
    many: bool = False


Kinds = Mapping[int, Kind]
"""Of a message, by the numbers of its fields."""
INTEGER, INTEGERS = Kind(frozenset({_VARINT})), Kind(frozenset({_VARINT, _LENGTH}), many=True)
MESSAGE, MESSAGES = Kind(frozenset({_LENGTH})), Kind(frozenset({_LENGTH}), many=True)
"""Texts too."""


class Wire(ABC):
    """One walk through a file; positions are those of the file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self._fields = 0

    @abstractmethod
    def refused(self, why: str) -> Exception:
        """Return what to raise for a file that cannot be read; ``why`` goes on from 'it'."""

    def parts(
        self, start: int, end: int, kinds: Kinds | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield each field's number and where its value lies.

        Parameters
        ----------
        kinds : how the fields that are looked at are encoded. Parsers pass over a field of another
            wire type as one that they do not know, merge a message that comes twice, and take the
            last of other values: what is there in two ways is refused, so that what was looked at
            is what they see.
        """
        position = start
        seen: set[int] = set()
        while position < end:
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise self.refused("has more parts than any network")
            key, position = self.varint(position, end)
            number, wire = key >> 3, key & 7
            if not 0 < number < _NUMBERS:  # of a longer one, some parsers take the lower bits
                raise self.refused("has a field whose number no message has")
            kind = None if kinds is None else kinds.get(number)
            if kind is not None:
                if wire not in kind.wires:
                    raise self.refused(f"has a field {number} of another type than ours")
                if number in seen and not kind.many:
                    raise self.refused(f"has a field {number} twice")
                seen.add(number)
            if wire == 0:
                begin = position
                _, position = self.varint(position, end)
            elif wire in (1, 5):
                begin, position = position, position + (8 if wire == 1 else 4)
            elif wire == 2:
                length, begin = self.varint(position, end)
                position = begin + length
            else:
                raise self.refused("is no Protocol Buffers message")
            if position > end:
                raise self.refused("is cut off")
            yield number, begin, position

    def numbers(self, start: int, end: int) -> list[int]:
        """Return whole numbers, one or packed ones."""
        found, position = [], start
        while position < end:
            value, position = self.varint(position, end)
            found.append(value - 2**64 if value >= 2**63 else value)
            if len(found) > 64:
                raise self.refused("has a tensor of too many axes")
        return found or [0]

    def varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self.content[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value & (2**64 - 1), position
        raise self.refused("is cut off or no Protocol Buffers message")

    def text(self, start: int, end: int) -> str:
        if end - start > 4096:
            raise self.refused("has a name of more than 4096 bytes")
        return self.content[start:end].decode("utf-8", "backslashreplace")
