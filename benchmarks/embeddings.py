"""Embeddings as a hospital's archive has them: clusters of clusters, not points in a void.

Everybody's slice of the same place, taken with the same protocol, looks alike; a patient's own
slices look more alike, and those of one volume still more. So an embedding of unit length is

    anatomy(protocol, place) + 0.5 patient + 0.25 volume + 0.15 noise,

each a Gaussian whose spread in direction i falls like (1 + i)^-0.5, as the spectra of image
embeddings do. ``anatomy`` is a smooth path through six random points for each of 12 protocols, and
a volume's 40 slices lie evenly along it. Without the shared anatomy, a new patient's slice would be
near to nothing, and who its nearest neighbours are would mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DESCRIPTION", "draw_library", "draw_queries"]

PROTOCOLS, KNOTS = 12, 6
SLICES, VOLUMES = 40, 2
PATIENT, VOLUME, NOISE = 0.5, 0.25, 0.15
OFFSET = 0.02
"""Where a volume begins along the anatomy varies by up to this share of its length."""
DESCRIPTION = (
    f"clusters of clusters: slices of {PROTOCOLS} protocols along a shared anatomy, "
    f"{VOLUMES} volumes of {SLICES} slices per patient, spread 1 : {PATIENT} : {VOLUME} : {NOISE} "
    "for anatomy, patients, volumes and noise, direction i spread as (1 + i)^-0.5; queries: half "
    "of new volumes of known patients, half of new patients"
)
_BLOCK = 64  # patients drawn at a time, to bound memory
_KNOWN, _NEW, _LIBRARY, _QUERIES, _ANATOMY = range(5)  # keep the seeds of these apart


def draw_library(size: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    """Return ``size`` embeddings of unit length: size x dimension."""
    per_patient = SLICES * VOLUMES
    patients = -(-size // per_patient)
    anatomy = _Anatomy.draw(dimension, seed)
    out = np.empty((size, dimension), np.float32)
    for start in range(0, patients, _BLOCK):
        # Always a whole block, so that a larger library begins like a smaller one.
        people = range(start, start + _BLOCK)
        protocols, centres = _patients(people, dimension, seed, _KNOWN)
        rng = np.random.default_rng([seed, _LIBRARY, start])
        slices = _slices(
            rng, anatomy, np.repeat(protocols, VOLUMES), np.repeat(centres, VOLUMES, axis=0)
        ).reshape(-1, dimension)
        part = out[start * per_patient : start * per_patient + len(slices)]
        part[:] = slices[: len(part)]
    return out


def draw_queries(count: int, size: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    """Return ``count`` x dimension queries for the library of ``size`` drawn with ``seed``.

    Each is one slice of a new volume; the first half are of patients in the library.
    """
    patients = -(-size // (SLICES * VOLUMES))
    rng = np.random.default_rng([seed, _QUERIES])
    known = _patients(rng.integers(0, patients, count // 2).tolist(), dimension, seed, _KNOWN)
    new = _patients(range(count - count // 2), dimension, seed, _NEW)
    protocols = np.concatenate([known[0], new[0]])
    centres = np.concatenate([known[1], new[1]])
    chosen = rng.integers(0, SLICES, count)
    out = np.empty((count, dimension), np.float32)
    for start in range(0, count, _BLOCK):
        part = slice(start, min(count, start + _BLOCK))
        slices = _slices(rng, _Anatomy.draw(dimension, seed), protocols[part], centres[part])
        out[part] = slices[np.arange(len(slices)), chosen[part]]
    return out


@dataclass(frozen=True)
class _Anatomy:
    """``points`` protocols x knots x D: what every patient's slices pass through."""

    points: NDArray[np.float32]

    @classmethod
    def draw(cls, dimension: int, seed: int) -> _Anatomy:
        rng = np.random.default_rng([seed, _ANATOMY])
        shape = (PROTOCOLS, KNOTS, dimension)
        return cls(rng.standard_normal(shape, np.float32) * _spread(dimension))

    def at(self, protocols: NDArray[np.int64], places: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return rows x slices x D for ``places`` (rows x slices, 0..1)."""
        along = places * (KNOTS - 1)
        before = np.minimum(along.astype(np.int64), KNOTS - 2)
        angle = ((along - before) * (np.pi / 2)).astype(np.float32)[..., None]
        rows = protocols[:, None]
        # A quarter-turn between two points keeps the spread the same all the way.
        path: NDArray[np.float32] = (
            np.cos(angle) * self.points[rows, before]
            + np.sin(angle) * self.points[rows, before + 1]
        )
        return path


def _spread(dimension: int) -> NDArray[np.float32]:
    """Return the standard deviation of every direction; their squares add up to 1."""
    spread = (1.0 + np.arange(dimension)) ** -0.5
    scaled: NDArray[np.float32] = (spread / np.linalg.norm(spread)).astype(np.float32)
    return scaled


def _patients(
    numbers: Sequence[int], dimension: int, seed: int, kind: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return protocol and centre of each patient; the same patient's are the same in every call."""
    protocols, centres = [], []
    for number in numbers:
        rng = np.random.default_rng([seed, kind, number])
        protocols.append(rng.integers(PROTOCOLS))
        centres.append(rng.standard_normal(dimension, np.float32))
    return np.array(protocols, np.int64), np.stack(centres) * _spread(dimension)


def _slices(
    rng: np.random.Generator,
    anatomy: _Anatomy,
    protocols: NDArray[np.int64],
    patients: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the slices of one new volume for each row: rows x SLICES x D, of unit length."""
    rows, dimension = patients.shape
    spread = _spread(dimension)
    first = rng.uniform(0, OFFSET, (rows, 1))
    places = first + np.linspace(0, 1 - OFFSET, SLICES)
    centre = (
        PATIENT * patients + VOLUME * rng.standard_normal((rows, dimension), np.float32) * spread
    )
    noise = rng.standard_normal((rows, SLICES, dimension), np.float32) * spread
    slices = anatomy.at(protocols, places.astype(np.float32)) + centre[:, None] + NOISE * noise
    unit: NDArray[np.float32] = slices / np.linalg.norm(slices, axis=2, keepdims=True)
    return unit.astype(np.float32, copy=False)
