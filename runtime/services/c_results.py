"""What the C interface gives of a result: numbers and text, as ``recallseg_result`` holds them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from recallseg.engines import errors
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audited import on_host
from recallseg.runtime.services.c_errors import in_c
from recallseg.runtime.services.scheduling import Scheduling

__all__ = ["LEFT_OUT", "Query", "Tags", "record"]

Tags = tuple[tuple[str, str], ...]

LEFT_OUT = {"exemplars": 0, "groups": 1, "blocks": 2}
QUALITY = {"uncalibrated": 0, "ok": 1, "suspect": 2}


class Query:
    """A segmenter, and the tags of the exemplars that it has recalled so far."""

    def __init__(self, segmenter: Segmenter, scheduling: Scheduling) -> None:
        self.segmenter, self.scheduling = segmenter, scheduling
        self._tags: dict[str, Tags] = {}
        self._digest = ""
        self._told: tuple[Provenance, str] | None = None

    def provenance(self, made: Provenance) -> str:
        """Return a provenance as JSON; of results between two changes of the library it is one."""
        if self._told is None or self._told[0] is not made:
            self._told = made, json.dumps(made.to_json(), ensure_ascii=False)
        return self._told[1]

    def tags(self, recalled: Match, digest: str) -> Tags:
        """Return an exemplar's tags, from memory while the library stays what it is."""
        if digest != self._digest:
            self._tags, self._digest = {}, digest
        if recalled.key not in self._tags:
            library = self.segmenter.library
            try:
                found = library.get(recalled.key).tags
            except errors.InputError:  # removed by another process since it was recalled
                return ()
            if library.digest != digest:  # changed since: what it had then, nobody knows any more
                return ()
            self._tags[recalled.key] = tuple(found.items())
        return self._tags[recalled.key]


def record(query: Query, result: Result, pixel_area: float) -> tuple[Any, ...]:
    """Return all of a result but its pixels, as the C library's ``read_result`` takes it apart."""
    made = result.provenance  # masks that lie on a GPU are counted here
    result = on_host(query.segmenter, result)
    return (
        QUALITY[result.quality.flag],
        made.recipe.bundle_identity,
        made.library_digest,
        made.recipe.engine,
        made.recipe.precision,
        result.notice,
        query.provenance(made),
        made.digest,
        in_c(result.quality.mend),
        made.recipe.k,
        tuple(result.timings.items()),
        tuple(_structure(query, result, name, pixel_area) for name in result.masks),
    )


def _structure(query: Query, result: Result, name: str, pixel_area: float) -> tuple[Any, ...]:
    score, pixels = result.scores[name], int(np.count_nonzero(result.masks[name]))
    return (
        name,
        result.labels[name],
        score.present,
        score.iou,
        score.object_score,
        score.distance,
        pixels,
        pixels * pixel_area,
        result.quality.reasons.get(name, ()),
        tuple(
            (r.key, 1.0 - r.distance, r.absent, query.tags(r, result.provenance.library_digest))
            for r in result.recalled[name]
        ),
        score.presence,
    )
