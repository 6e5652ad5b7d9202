"""What a method that recalls must beat: on the same annotated images, for the same queries.

``copy`` gives the mask of the most similar exemplar; ``forest`` fits a random forest to pixels seen
through filters of several sizes, as ilastik does; ``match`` compares DINOv2's patches with those of
the recalled exemplars, as training-free few-shot methods do. All take images and masks from the
library, so it must have kept them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.model.preprocess import scale_intensities
from recallseg.runtime.reports.patches import PatchFeatures

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["BASELINES", "Baseline", "copy_mask", "make_baselines"]

Mask = NDArray[np.bool_]
SCALES = (0.7, 1.6, 3.5, 8.0)
"""Standard deviations of the forest's filters, in pixels."""
UNIFORM, FROM_EACH = 1500, 250
"""Pixels that the forest sees of an exemplar: at random, and more of each structure."""
TREES, LEAF = 40, 4
FORESTS = 32
"""Most fitted forests that are kept."""
NEIGHBOURS, TEMPERATURE = 8, 0.05
"""Of matching: patches that vote, and how much more the nearest ones count."""


class Baseline(ABC):
    """Segments from a library's exemplars in its own way.

    Parameters
    ----------
    library : with sources.
    structures : what to segment.
    k : most exemplars that are looked at, where that counts.
    """

    name: str

    def __init__(
        self, library: Library, structures: Sequence[str], k: int, threads: int | None
    ) -> None:
        self._library, self._structures, self._threads = library, tuple(structures), threads
        self.k = k

    @abstractmethod
    def segment(
        self, image: NDArray[Any], embedding: NDArray[np.float32], without: Collection[str]
    ) -> Mapping[str, Mask]:
        """Return a mask HxW for each structure, from exemplars that are not in ``without``."""

    def _nearest(
        self, embedding: NDArray[np.float32], k: int, without: Collection[str]
    ) -> dict[str, list[str]]:
        """Return by structure the keys of the nearest exemplars that show or lack it."""
        found = self._library.recall(embedding, self._structures, k, without=without).found
        return {name: [m.key for m in one.matches[:k]] for name, one in found.items()}


class Copy(Baseline):
    """The mask of the most similar exemplar that says something of a structure."""

    name = "copy"

    def segment(
        self, image: NDArray[Any], embedding: NDArray[np.float32], without: Collection[str]
    ) -> Mapping[str, Mask]:
        shape = (image.shape[0], image.shape[1])
        masks = {}
        for name, keys in self._nearest(embedding, 1, without).items():
            drawn = self._library.source(keys[0])[1].get(name) if keys else None
            masks[name] = np.zeros(shape, bool) if drawn is None else copy_mask(drawn, shape)
        return masks


def copy_mask(mask: Mask, shape: tuple[int, int]) -> Mask:
    """Return a mask on another image's grid HxW, as it is if the grids are alike."""
    if mask.shape == shape:
        return mask
    height, width = shape
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    copied: Mask = resized.astype(bool)
    return copied


class Forest(Baseline):
    """A random forest on pixels: one for each structure, of all exemplars that tell of it."""

    name = "forest"

    def __init__(
        self, library: Library, structures: Sequence[str], k: int, threads: int | None
    ) -> None:
        super().__init__(library, structures, 0, threads)
        self._make = importlib.import_module("sklearn.ensemble").RandomForestClassifier
        self._samples: dict[str, tuple[NDArray[np.float32], NDArray[np.float64], Any]] = {}
        self._fitted: OrderedDict[frozenset[str], dict[str, Any]] = OrderedDict()

    def segment(
        self, image: NDArray[Any], embedding: NDArray[np.float32], without: Collection[str]
    ) -> Mapping[str, Mask]:
        left_out = set(without)
        keys = frozenset(e.key for e in self._library if e.key not in left_out)
        if keys not in self._fitted:
            self._fitted[keys] = self._fit(sorted(keys))
            if len(self._fitted) > FORESTS:
                self._fitted.popitem(last=False)
        self._fitted.move_to_end(keys)
        shape = image.shape[:2]
        pixels = self._filtered(image).reshape(-1, _FEATURES)
        masks = {}
        for name, forest in self._fitted[keys].items():
            if forest is None:  # nothing, or everything, is the structure
                masks[name] = np.zeros(shape, bool)
            else:
                masks[name] = (forest.predict_proba(pixels)[:, 1] > 0.5).reshape(shape)
        return masks

    def _filtered(self, image: NDArray[Any]) -> NDArray[np.float32]:
        return filter_image(scale_intensities(image, self._library.intensity))

    def _fit(self, keys: Sequence[str]) -> dict[str, Any]:
        forests: dict[str, Any] = {}
        for name in self._structures:
            parts = [self._sample(key) for key in keys]
            told = [(x, w, y[name]) for x, w, y in parts if name in y]
            labels = np.concatenate([y for _, _, y in told]) if told else np.zeros(0, bool)
            if labels.all() or not labels.any():
                forests[name] = None
                continue
            forest = self._make(
                n_estimators=TREES,
                min_samples_leaf=LEAF,
                n_jobs=self._threads or -1,
                random_state=0,
            )
            pixels = np.concatenate([x for x, _, _ in told])
            forest.fit(pixels, labels, sample_weight=np.concatenate([w for _, w, _ in told]))
            forests[name] = forest
        return forests

    def _sample(self, key: str) -> tuple[NDArray[np.float32], NDArray[np.float64], dict[str, Mask]]:
        """Return features of some pixels of an exemplar, what each stands for, and labels.

        More pixels of structures are taken than there would be by chance; each then counts less.
        """
        if key not in self._samples:
            image, masks = self._library.source(key)
            told = {name: masks[name] for name in self._structures if name in masks}
            empty = np.zeros(image.shape[:2], bool)
            absent = self._library.get(key).absent
            told |= {name: empty for name in self._structures if name in absent}
            size = empty.size
            share = np.full(size, min(1.0, UNIFORM / size))
            for mask in told.values():
                inside = mask.reshape(-1)
                if inside.any():
                    share[inside] += FROM_EACH / np.count_nonzero(inside)
            share = np.minimum(share, 1.0)
            taken = np.flatnonzero(np.random.default_rng(0).random(size) < share)
            self._samples[key] = (
                self._filtered(image).reshape(-1, _FEATURES)[taken],
                1.0 / share[taken],
                {name: mask.reshape(-1)[taken] for name, mask in told.items()},
            )
        return self._samples[key]


_FEATURES = 1 + 5 * len(SCALES) + 4


def filter_image(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an image HxW or HxWx3 (0..1) through all filters, HxWxF.

    Of its grey values the value itself and, at each scale, the blurred value, length of the
    gradient, Laplacian and both eigenvalues of the Hessian; of its colours two differences at two
    scales, 0 where it is grey.
    """
    colour = scaled.ndim == 3
    grey = scaled.mean(axis=2) if colour else scaled
    layers = [grey]
    for sigma in SCALES:
        blurred = cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
        dy, dx = np.gradient(blurred) if min(grey.shape) > 1 else (0 * grey, 0 * grey)
        dyy, dxy = np.gradient(dy) if min(grey.shape) > 1 else (0 * grey, 0 * grey)
        dxx = np.gradient(dx, axis=1) if min(grey.shape) > 1 else 0 * grey
        half = (dxx + dyy) / 2
        root = np.sqrt(((dxx - dyy) / 2) ** 2 + dxy**2)
        layers += [blurred, np.hypot(dx, dy), dxx + dyy, half + root, half - root]
    for sigma in SCALES[1:3]:
        for first in (0, 2):
            if colour:
                difference = scaled[..., first] - scaled[..., 1]
                layers.append(cv2.GaussianBlur(difference, (0, 0), sigma))
            else:
                layers.append(np.zeros_like(grey))
    return np.stack(layers, axis=2).astype(np.float32)


class Match(Baseline):
    """Labels of the exemplars' patches that are most like each patch of the query."""

    name = "match"

    def __init__(
        self, library: Library, structures: Sequence[str], k: int, threads: int | None
    ) -> None:
        super().__init__(library, structures, k, threads)
        self._features = PatchFeatures(library.bundle, library.intensity, threads)
        self._known: dict[str, tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]] = {}

    def segment(
        self, image: NDArray[Any], embedding: NDArray[np.float32], without: Collection[str]
    ) -> Mapping[str, Mask]:
        query = self._features(image)
        rows, columns = query.shape[:2]
        flat = query.reshape(rows * columns, -1)
        masks = {}
        for name, keys in self._nearest(embedding, self.k, without).items():
            if not keys:
                masks[name] = np.zeros(image.shape[:2], bool)
                continue
            known = [self._exemplar(key) for key in keys]
            alike = flat @ np.concatenate([features for features, _ in known]).T
            labels = np.concatenate(
                [covered.get(name, np.zeros(len(f), np.float32)) for f, covered in known]
            )
            count = min(NEIGHBOURS, alike.shape[1])
            nearest = np.argpartition(-alike, count - 1, axis=1)[:, :count]
            strength = np.take_along_axis(alike, nearest, axis=1)
            weight = np.exp((strength - strength.max(axis=1, keepdims=True)) / TEMPERATURE)
            share = (weight * labels[nearest]).sum(axis=1) / weight.sum(axis=1)
            height, width = image.shape[:2]
            drawn = cv2.resize(
                share.reshape(rows, columns).astype(np.float32),
                (width, height),
                interpolation=cv2.INTER_LINEAR,
            )
            # Patches are coarse: the likeliest pixels, as many as the shares add up to.
            masks[name] = drawn > np.quantile(drawn, 1.0 - min(1.0, float(drawn.mean())))
        return masks

    def _exemplar(self, key: str) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Return features N x D of an exemplar's patches, and how much a structure covers each."""
        if key not in self._known:
            image, masks = self._library.source(key)
            features = self._features(image)
            rows, columns = features.shape[:2]
            covered: dict[str, NDArray[Any]] = {
                name: cv2.resize(
                    masks[name].astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA
                ).reshape(-1)
                for name in self._structures
                if name in masks
            }
            self._known[key] = features.reshape(rows * columns, -1), covered
        return self._known[key]


BASELINES: Mapping[str, type[Baseline]] = {one.name: one for one in (Copy, Forest, Match)}


def make_baselines(
    names: Sequence[str], library: Library, structures: Sequence[str], k: int, threads: int | None
) -> list[Baseline]:
    """Return baselines by name, ready to segment.

    Raises
    ------
    InputError
        For an unknown name, or a library that did not keep its images.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"there is no baseline '{unknown[0]}'; choose of {', '.join(BASELINES)}.")
    if names and not library.keeps_sources:
        raise InputError(
            f"baselines need images and masks, and the library {library.path} did not keep them."
        )
    return [
        BASELINES[name](library, structures, 1 if name == "copy" else k, threads) for name in names
    ]
