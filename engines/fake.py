"""A deterministic engine without weights: the whole pipeline runs, fast, and means something.

Its "features" are the image averaged to the feature grid, its "memory" keeps the mask averaged to
the same grid, and its "attention" averages the recalled masks. So a query that looks like an
exemplar comes back with that exemplar's mask: enough to test everything around the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from recallseg.engines.engine import Engine, Tensor

__all__ = ["FakeEngine"]

LOGIT_GAIN = 20.0  # mask coverage 0..1 becomes a logit of -10..10, the range of SAM 2's masks


class FakeEngine(Engine):
    """Runs any of the graphs by simple arithmetic; ignores the graph file."""

    name: ClassVar[str] = "fake"
    variants: ClassVar[tuple[str, ...]] = ("portable", "ort-cpu", "ort-cuda", "tensorrt")

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        getattr(self, f"_{self.spec.name}")(inputs, outputs)

    def _embed(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        image, embedding = inputs["image"][0], outputs["embedding"][0]
        side = max(1, int((embedding.size // 3) ** 0.5))
        small = _average(image, side).ravel()
        embedding[:] = 0.0
        embedding[: small.size] = small[: embedding.size]
        embedding /= np.linalg.norm(embedding) + 1e-6

    def _encode(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        for tensor in outputs.values():
            small = _average(inputs["image"][0], tensor.shape[-1])
            tensor[0] = np.resize(small, tensor.shape[1:])

    def _memorize(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        side = inputs["features"].shape[-1]
        coverage = _average(inputs["masks"][:, 0], side).reshape(len(inputs["masks"]), -1, 1)
        outputs["memories"][:] = _nearest(coverage, outputs["memories"].shape[1])
        outputs["pointers"][:] = coverage.mean(axis=1)

    def _attend(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        conditioned = outputs["conditioned"]
        coverage = inputs["memories"].mean(axis=(1, 3))
        places = conditioned.shape[2] * conditioned.shape[3]
        conditioned[:] = _nearest(coverage, places).reshape(-1, 1, *conditioned.shape[2:])

    def _correct(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self._decode(inputs, outputs)
        logits = outputs["logits"][0]
        if inputs["has_prior"][0]:
            logits[:] = inputs["prior"][0, 0]
        y, x = np.indices(logits.shape) * 4 + 1.5  # centres of the cells, in pixels of the image
        corners = []
        for (px, py), label in zip(inputs["points"][0], inputs["point_labels"][0], strict=True):
            if label >= 2:
                corners.append((px, py))
            elif label >= 0:  # a click speaks for what is near
                near = (x - px) ** 2 + (y - py) ** 2 <= (2.0 * logits.shape[0] / 8) ** 2
                logits[near] = LOGIT_GAIN / 2 if label else -LOGIT_GAIN / 2
        if len(corners) == 2:
            (left, top), (right, bottom) = corners
            inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
            logits[:] = np.where(inside, LOGIT_GAIN / 2, -LOGIT_GAIN / 2)

    def _decode(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        coverage = inputs["conditioned"].mean(axis=1)
        repeat = outputs["logits"].shape[-1] // coverage.shape[-1]
        large = coverage.repeat(repeat, axis=1).repeat(repeat, axis=2)
        outputs["logits"][:] = (large - 0.5) * LOGIT_GAIN
        outputs["iou"][:] = coverage.max(axis=(1, 2))
        outputs["object_score"][:] = (coverage.max(axis=(1, 2)) - 0.01) * LOGIT_GAIN


def _nearest(values: Tensor, count: int) -> Tensor:
    """Return ``count`` values along axis 1, each the nearest of those that there are."""
    chosen: Tensor = values[:, np.arange(count) * values.shape[1] // count]
    return chosen


def _average(planes: Tensor, side: int) -> Tensor:
    """Average CxHxW planes over a ``side`` x ``side`` grid: Cx``side``x``side``."""
    edges = [np.linspace(0, size, side + 1).astype(int)[:-1] for size in planes.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(planes, edges[0], axis=1), edges[1], axis=2)
    ones = np.ones_like(planes[:1])
    counts = np.add.reduceat(np.add.reduceat(ones, edges[0], axis=1), edges[1], axis=2)
    average: Tensor = (sums / counts).astype(np.float32)
    return average
