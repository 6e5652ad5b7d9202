"""What every kind of benchmark states: when and where, which bundle, whether others worked."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, TypedDict

from recallseg.benchmarks.machine import BUSY_SHARE
from recallseg.benchmarks.schema import BundleFacts
from recallseg.engines.bundle import Bundle
from recallseg.runtime.reports.machine import describe_machine, package_versions

__all__ = ["HeadFields", "bundle_facts", "busy_remarks", "head"]


class HeadFields(TypedDict):
    """The fields of :class:`recallseg.benchmarks.schema.Head`, to be unpacked into a report."""

    created: str
    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]
    versions: Mapping[str, str]
    remarks: tuple[str, ...]


def head(conditions: Mapping[str, Any]) -> HeadFields:
    """Return what a report that ends now tells first; ``conditions`` hold what a Watch saw."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "conditions": conditions,
        "versions": package_versions(),
        "remarks": busy_remarks(conditions),
    }


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
