"""``accuracy.json``: what ``bench accuracy`` leaves, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from recallseg.benchmarks.accuracy.tables import Tables
from recallseg.benchmarks.schema import BundleFacts, Head

__all__ = ["AccuracyReport"]


@dataclass(frozen=True, kw_only=True)
class AccuracyReport(Head):
    """``bench accuracy``: Dice on real images beside simple baselines.

    Attributes
    ----------
    quick : whether a few images only were taken, which say nothing.
    without_pointers : identity of the bundle without object pointers; None where none was given.
    weights : of which source, with digests.
    settings : the options, and how the U-Net was trained.
    missing : why datasets were left out, by name.
    """

    schema: ClassVar[str] = "recallseg-bench-accuracy/2"

    quick: bool
    bundle: BundleFacts
    without_pointers: str | None
    weights: str
    settings: Mapping[str, Any]
    missing: Mapping[str, str]
    datasets: tuple[Tables, ...]
