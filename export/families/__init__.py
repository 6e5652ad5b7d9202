"""The networks that bundles can be made of; :mod:`.base` says what a family is."""

from __future__ import annotations

from typing import Any

from recallseg.engines.errors import ExportError
from recallseg.export.families.base import SegmenterFamily
from recallseg.export.families.edgetam import EDGETAM_FAMILY
from recallseg.export.families.sam2 import SAM2_FAMILY

__all__ = ["SEGMENTERS", "Embedder", "Segmenter", "is_segmenter", "segmenter_family"]

Segmenter = Any
"""A model of one of :data:`SEGMENTERS`: attributes have the same names, and no common base."""

SEGMENTERS = (SAM2_FAMILY, EDGETAM_FAMILY)

Embedder = Any
"""A model of ``transformers`` with a pooled output (:mod:`.embedders`)."""


def is_segmenter(model: Any) -> bool:
    """Tell whether a loaded model is of one of :data:`SEGMENTERS`."""
    return isinstance(model, tuple(family.model_class for family in SEGMENTERS))


def segmenter_family(model: Any) -> SegmenterFamily:
    """Return the family of a loaded model; ExportError if it is none of :data:`SEGMENTERS`."""
    for family in SEGMENTERS:
        if isinstance(model, family.model_class):
            return family
    raise ExportError(
        f"{type(model).__name__} is no segmenter that can be exported; those are "
        f"{', '.join(family.title for family in SEGMENTERS)}."
    )
