"""Which exemplars' memories were made how: spans of their numbers, noted in the catalog.

A note and no table: what older programs wrote has none, and what they add to a library that has one
lies in no span. Both are "unrecorded", and they open such a library as ever.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recallseg.engines.errors import LibraryCorruptError
from recallseg.engines.reading import reason
from recallseg.runtime.library.encoding import Origin

__all__ = ["Origins", "Span", "origins_note"]


def origins_note(generation: int) -> str:
    """Return the name of the note on a generation's memories."""
    return f"origins {generation}"


@dataclass(frozen=True)
class Span:
    """Exemplars from number ``first`` to ``last`` were made by the origin at place ``origin``."""

    first: int
    last: int
    origin: int


@dataclass(frozen=True)
class Origins:
    """How the memories of one generation were made; ``spans`` are ascending and apart."""

    origins: tuple[Origin, ...] = ()
    spans: tuple[Span, ...] = ()

    def of(self, number: int) -> Origin | None:
        """Return what made an exemplar's memories; None if that was not recorded."""
        at = bisect_right(self.spans, number, key=lambda span: span.first) - 1
        if at < 0 or number > self.spans[at].last:
            return None
        return self.origins[self.spans[at].origin]

    def with_one(self, number: int, origin: Origin) -> Origins:
        """Return these and one more exemplar, whose number is above all others."""
        origins = self.origins if origin in self.origins else (*self.origins, origin)
        place, spans = origins.index(origin), self.spans
        # A number between that is in no span was an older program's, and stays unrecorded.
        if spans and spans[-1].origin == place and spans[-1].last == number - 1:
            return Origins(origins, (*spans[:-1], Span(spans[-1].first, number, place)))
        return Origins(origins, (*spans, Span(number, number, place)))

    def to_text(self) -> str:
        """Return them as JSON text."""
        return json.dumps(
            {
                "origins": [origin.to_json() for origin in self.origins],
                "spans": [[span.first, span.last, span.origin] for span in self.spans],
            },
            sort_keys=True,
        )

    @classmethod
    def from_text(cls, text: str | None) -> Origins:
        """Rebuild from :meth:`to_text`; raises LibraryCorruptError for anything else."""
        if text is None:
            return cls()
        try:
            data = json.loads(text)
            origins = tuple(Origin.from_json(origin) for origin in data["origins"])
            spans = tuple(_span(span, len(origins)) for span in data["spans"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LibraryCorruptError(
                f"the library's record of how memories were made is damaged: {reason(error)}."
            ) from error
        ends = [number for span in spans for number in (span.first, span.last + 1)]
        if ends != sorted(ends):
            raise LibraryCorruptError(
                "the library's record of how memories were made is damaged: its spans overlap."
            )
        return cls(origins, spans)


def _span(data: Sequence[Any], origins: int) -> Span:
    first, last, origin = data
    if not all(type(value) is int for value in data) or not (
        0 < first <= last < 2**53 and 0 <= origin < origins
    ):
        raise ValueError(f"the span {data!r}")
    return Span(first, last, origin)
