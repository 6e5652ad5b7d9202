"""Golden tensors: a small case that any engine must reproduce on the device that will run it.

The file holds four small images and masks, and what the PyTorch model made of them: of large
tensors a fixed sample, of the masks every pixel. Verification needs neither torch nor the
checkpoints. Engines run in sequence, each on the output of the one before, as they will in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.archives import read_arrays
from recallseg.engines.bundle import MemorySemantics, Normalisation
from recallseg.engines.composition import Composition, Features, Prediction, Prompts, Recall
from recallseg.engines.engine import Tensor
from recallseg.engines.errors import BundleError
from recallseg.engines.inside import read_inside
from recallseg.engines.limits import max_bytes
from recallseg.engines.specs import Geometry

__all__ = [
    "GoldenCase",
    "GoldenTensors",
    "golden_prompts",
    "make_case",
    "network_images",
    "network_masks",
    "run_case",
]

CASE_SIDE = 256
"""Side of the stored images: enough structure for a network, small enough for a repository."""
_LARGEST = 4096
CORRECTED = "corrected_"
"""Begins the names of what the optional graph ``correct`` makes of the case."""
SAMPLE = 8192
"""Elements kept of each large tensor; an error that spares all of them by chance is no error."""


@dataclass(frozen=True)
class GoldenCase:
    """Inputs: ``images`` (k+1)xAxAx3 uint8, the last is the query; ``masks`` kxnxAxA of 0 and 1."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


@dataclass(frozen=True)
class GoldenTensors:
    """A case and the tensors that the reference made of it, each sampled at ``index[name]``."""

    case: GoldenCase
    values: Mapping[str, Tensor]
    index: Mapping[str, NDArray[np.int64]]
    masks: NDArray[np.bool_]

    @classmethod
    def from_run(cls, case: GoldenCase, outputs: Mapping[str, Tensor], seed: int) -> GoldenTensors:
        """Sample the outputs of :func:`run_case` for storage."""
        rng = np.random.default_rng(seed)
        index, values = {}, {}
        for name, tensor in outputs.items():
            keep = min(tensor.size, SAMPLE)
            index[name] = np.sort(rng.choice(tensor.size, keep, replace=False)).astype(np.int64)
            values[name] = tensor.ravel()[index[name]]
        return cls(case, values, index, outputs["logits"] > 0)

    def save(self, path: Path) -> None:
        """Write the file (numpy's compressed archive, no pickles)."""
        arrays: dict[str, Any] = {
            "images": self.case.images,
            "masks": self.case.masks,
            "expected_masks": np.packbits(self.masks),
            "expected_shape": np.asarray(self.masks.shape),
        }
        for name in self.values:
            arrays[f"value.{name}"] = self.values[name]
            arrays[f"index.{name}"] = self.index[name].astype(np.int32)
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> GoldenTensors:
        """Read the file; raises BundleError if it cannot be read."""
        try:
            file = read_arrays(read_inside(path.parent, path.name, max_bytes()))
            names = [key[6:] for key in file if key.startswith("value.")]
            shape = tuple(int(size) for size in file["expected_shape"])
            count = math.prod(shape)
            if len(shape) != 3 or count > 8 * file["expected_masks"].size:
                raise ValueError(f"masks of shape {shape}")
            if any(file[f"value.{name}"].size != file[f"index.{name}"].size for name in names):
                raise ValueError("values and places of them differ in number")
            return cls(
                GoldenCase(*_case(file["images"], file["masks"])),
                {name: _numbers(file[f"value.{name}"], np.floating) for name in names},
                {
                    name: _numbers(file[f"index.{name}"], np.integer).astype(np.int64)
                    for name in names
                },
                np.unpackbits(file["expected_masks"], count=count).reshape(shape).astype(bool),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise BundleError(f"golden tensors {path} cannot be read: {error}.") from error


def _case(images: NDArray[Any], masks: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images and masks if they are what :class:`GoldenCase` says; ValueError otherwise."""
    if (
        images.dtype != np.uint8
        or masks.dtype != np.uint8
        or images.ndim != 4
        or masks.ndim != 4
        or images.shape[3] != 3
        or images.shape[0] != masks.shape[0] + 1
        or 0 in (*images.shape, *masks.shape)
        or max(*images.shape, *masks.shape) > _LARGEST
    ):
        raise ValueError(f"images {images.shape} {images.dtype}, masks {masks.shape} {masks.dtype}")
    return images, masks


def _numbers(array: NDArray[Any], kind: Any) -> NDArray[Any]:
    if array.ndim != 1 or not np.issubdtype(array.dtype, kind):
        raise ValueError(f"a sample of {array.dtype} with shape {array.shape}")
    return array


def make_case(seed: int, k: int = 3, n: int = 2) -> GoldenCase:
    """Draw an image-like case: ellipses of different brightness on a shaded, noisy ground."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, CASE_SIDE)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    images = np.empty((k + 1, CASE_SIDE, CASE_SIDE, 3), np.uint8)
    masks = np.empty((k, n, CASE_SIDE, CASE_SIDE), np.uint8)
    centres = rng.uniform(-0.5, 0.5, (n, 2))
    for i in range(k + 1):
        picture = 70 + 30 * x * rng.uniform(-1, 1) + 30 * y * rng.uniform(-1, 1)
        for j in range(n):
            dy, dx = centres[j] + rng.normal(0, 0.08, 2)
            ry, rx = rng.uniform(0.15, 0.35, 2)
            inside = ((y - dy) / ry) ** 2 + ((x - dx) / rx) ** 2 < 1
            picture = np.where(inside, 130 + 50 * j, picture)
            if i < k:
                masks[i, j] = inside
        picture = picture[..., None] * np.array([1.0, 0.95, 0.9]) + rng.normal(0, 4, (*x.shape, 3))
        images[i] = np.clip(picture, 0, 255).astype(np.uint8)
    return GoldenCase(images, masks)


def run_case(
    case: GoldenCase,
    composition: Composition,
    geometry: Geometry,
    normalisation: Mapping[str, Normalisation],
    memory: MemorySemantics,
) -> dict[str, Tensor]:
    """Run a case through the engines and return every tensor on the way, by name.

    What ``correct`` makes, if it is one of them, begins with :data:`CORRECTED`.

    ``memories`` nxkxTx64 and ``pointers`` nxkxC are those of all exemplars.
    """
    k, n = case.masks.shape[:2]
    images = network_images(case, geometry.image_size, normalisation["encode"])
    masks = network_masks(case, geometry.image_size)
    recall = Recall.allocate(geometry, n, k, memory)
    features = Features.allocate(geometry)
    tokens = np.zeros((n, geometry.tokens, geometry.memory_dim), np.float32)
    pointers = np.zeros((n, geometry.channels), np.float32)
    for i in range(k):
        composition.encode(images[i], features)
        composition.memorize(features, masks[i], tokens, pointers)
        recall.memories[:, i], recall.pointers[:, i] = tokens, pointers
    embedding = np.zeros((1, geometry.embedding_dim), np.float32)
    query = network_images(case, geometry.embed_size, normalisation["embed"])[k]
    composition.embed(query, embedding)
    composition.encode(images[k], features)
    prediction = Prediction.allocate(geometry, n)
    composition.attend(features, recall, prediction)
    composition.decode(features, prediction)
    corrected: dict[str, Tensor] = {}
    if "correct" in composition.engines:
        again = Prediction.allocate(geometry, 1)
        again.conditioned[:] = prediction.conditioned[:1]
        composition.correct(features, golden_prompts(prediction.logits[0]), again)
        corrected = {
            f"{CORRECTED}{name}": tensor
            for name, tensor in vars(again).items()
            if name != "conditioned"
        }
    return {
        "embedding": embedding,
        **vars(features),
        "memories": recall.memories,
        "pointers": recall.pointers,
        **vars(prediction),
        **corrected,
    }


def golden_prompts(prior: Tensor) -> Prompts:
    """Return what the case says of its first structure: a place inside, one outside, and a mask.

    Parameters
    ----------
    prior : (S/4)x(S/4), the logits that ``decode`` made of it.
    """
    side = 4 * prior.shape[-1]
    points = np.array([[[0.5 * side, 0.5 * side], [0.2 * side, 0.75 * side]]], np.float32)
    return Prompts(points, np.array([[1, 0]], np.int32), prior[None, None].copy(), np.array([True]))


def network_images(case: GoldenCase, side: int, normalisation: Normalisation) -> list[Tensor]:
    """Return every image of a case as a network input 1x3x``side``x``side``."""
    images = []
    for image in case.images:
        values = _resample(image, side).astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(v, np.float32) for v in (normalisation.mean, normalisation.std))
        values = (values - mean) / std
        images.append(np.ascontiguousarray(values.transpose(2, 0, 1)[None], np.float32))
    return images


def network_masks(case: GoldenCase, side: int) -> list[Tensor]:
    """Return the masks of every exemplar as a network input nx1x``side``x``side``."""
    return [
        np.ascontiguousarray(
            _resample(masks.transpose(1, 2, 0), side).transpose(2, 0, 1)[:, None], np.float32
        )
        for masks in case.masks
    ]


def _resample(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Nearest-neighbour HxWxC -> ``side``x``side``xC; integers only, equal on every machine."""
    rows = np.arange(side) * image.shape[0] // side
    columns = np.arange(side) * image.shape[1] // side
    resampled: NDArray[np.uint8] = image[rows[:, None], columns[None]]
    return resampled
