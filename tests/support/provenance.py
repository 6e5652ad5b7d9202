"""A provenance for results that no segmenter made."""

from __future__ import annotations

from typing import Any

from recallseg.runtime.segmenting.recipe import Provenance, Recipe

__all__ = ["made_up"]


def made_up(**recipe: Any) -> Provenance:
    """Return one of a recipe with these settings."""
    settings = {
        "bundle_identity": "0" * 64,
        "engine": "fake",
        "precision": "fp32",
        "memory_format": "fp16",
        "k": 1,
        "reach": 3.0,
        "tags": {},
        "intensity": {},
    }
    return Provenance(Recipe(**{**settings, **recipe}), "0" * 64, (), (), {}, 0, None, "0.1.0")
