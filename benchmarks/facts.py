"""What every kind of benchmark states: which bundle, and whether the machine was busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recallseg.benchmarks.machine import BUSY_SHARE
from recallseg.benchmarks.schema import BundleFacts
from recallseg.engines.bundle import Bundle

__all__ = ["bundle_facts", "busy_remarks"]


def bundle_facts(bundle: Bundle) -> BundleFacts:
    """Return what a report says of a bundle."""
    sources = {bundle.segmenter.source, bundle.embedder.source}
    worst = next(
        source for source in ("random", "demo", "pretrained", *sources) if source in sources
    )
    g = bundle.geometry
    return BundleFacts(
        bundle.name, bundle.identity, bundle.segmenter.architecture, bundle.embedder.architecture,
        worst, bundle.notice, g.image_size, g.embed_size,
    )  # fmt: skip


def busy_remarks(conditions: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a remark if other processes took part of the machine while it was measured."""
    share = conditions.get("other_cpu_share")
    if share is None or share <= BUSY_SHARE:
        return ()
    return (
        f"The machine was busy: other processes took {share:.0%} of its processor time. Ratios "
        "were measured in turns and hold better than times; measure again on an idle machine.",
    )
