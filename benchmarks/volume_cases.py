"""Real volumes of which a few slices are annotated, for ``bench volumes``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.archives import read_files
from recallseg.benchmarks.accuracy.brains import (
    MNI_LICENCE,
    MNI_SOURCE,
    nuclei_on_template,
    template,
)
from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED
from recallseg.benchmarks.accuracy.radiology import LICENCE, LUNG_WINDOW, PYRADIOMICS, SOURCE
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.nrrd import read_nrrd
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.demo import BRAIN_THRESHOLD, LEAST_AREA, TISSUE_THRESHOLD

__all__ = ["VOLUMES", "VolumeCase", "load_cases"]

ELSEWHERE = 8
"""Annotated slices of the rest of a volume: that a structure is absent must be shown as well."""
TUMOUR_STEP = 4


@dataclass(frozen=True)
class VolumeCase:
    """A volume with reference masks on its grid, and the axial slices that are annotated."""

    name: str
    modality: str
    volume: Volume = field(repr=False)
    masks: Mapping[str, NDArray[np.bool_]] = field(repr=False)
    annotated: tuple[int, ...]
    intensity: Intensity
    licence: str
    source: str


def mni(data: Path | None) -> VolumeCase:
    """Return the MNI152 template: its tissues, 16 slices annotated over the whole brain."""
    t1, grey, white, affine = template(data)
    tissue = {"grey matter": grey > TISSUE_THRESHOLD, "white matter": white > TISSUE_THRESHOLD}
    area = (t1 > BRAIN_THRESHOLD).sum(axis=(0, 1))
    usable = np.flatnonzero(area >= LEAST_AREA * area.max())
    return _brain("mni", t1, affine, tissue, _evenly(usable[0], usable[-1], MOST_ANNOTATED))


def deep_grey(data: Path | None) -> VolumeCase:
    """Return the template with four deep nuclei: small, and absent from most of its slices."""
    t1, _, _, affine = template(data)
    masks = nuclei_on_template(data, t1.shape, affine)
    shown = np.flatnonzero(np.any(list(masks.values()), axis=(0, 1, 2)))
    chosen = _evenly(shown[0], shown[-1], MOST_ANNOTATED) | {
        z for z in _evenly(0, t1.shape[2] - 1, ELSEWHERE * 2) if not shown[0] <= z <= shown[-1]
    }
    return _brain("deep-grey", t1, affine, masks, chosen)


def lung_tumour(data: Path | None) -> VolumeCase:
    """Return a CT with a tumour, every fourth slice annotated."""
    return _tumour("lung-tumour", "CT", "lung2", LUNG_WINDOW, data)


def brain_tumour(data: Path | None) -> VolumeCase:
    """Return an MR with a tumour, every fourth slice annotated."""
    return _tumour("brain-tumour", "MR, T1 with contrast agent", "brain1", Intensity(), data)


VOLUMES: Mapping[str, Callable[[Path | None], VolumeCase]] = {
    "mni": mni,
    "deep-grey": deep_grey,
    "lung-tumour": lung_tumour,
    "brain-tumour": brain_tumour,
}


def load_cases(
    names: list[str] | None, data: Path | None
) -> tuple[list[VolumeCase], dict[str, str]]:
    """Load volumes, and say which could not be: see ``load_datasets``, which has the same rules."""
    unknown = [name for name in names or () if name not in VOLUMES]
    if unknown:
        raise InputError(f"there is no volume '{unknown[0]}'; choose from {', '.join(VOLUMES)}.")
    loaded: list[VolumeCase] = []
    missing: dict[str, str] = {}
    for name in names or VOLUMES:
        try:
            loaded.append(VOLUMES[name](data))
        except InputError as error:
            if names is not None:
                raise
            missing[name] = str(error)
    return loaded, missing


def _evenly(first: int, last: int, count: int) -> set[int]:
    return {int(z) for z in np.linspace(first, last, count).round()}


def _brain(
    name: str,
    t1: NDArray[Any],
    affine: NDArray[Any],
    masks: dict[str, NDArray[np.bool_]],
    chosen: set[int],
) -> VolumeCase:
    volume = Volume(t1, affine, "RAS", "MR")
    annotated = tuple(sorted(chosen))
    return VolumeCase(
        name, "MR, T1", volume, masks, annotated, Intensity(), MNI_LICENCE, MNI_SOURCE
    )


def _tumour(
    name: str, modality: str, file: str, intensity: Intensity, data: Path | None
) -> VolumeCase:
    content = read_files(PYRADIOMICS, data)
    loaded = []
    with TemporaryDirectory(prefix="recallseg-bench-") as folder:
        for part in ("image", "label"):
            path = Path(folder, f"{part}.nrrd")
            path.write_bytes(content[f"data/{file}_{part}.nrrd"])
            loaded.append(read_nrrd(path))
    volume, label = loaded
    mask = label.array > 0
    axis = int(np.argmax(volume.spacing))
    shown = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    first = int(shown[0]) + 1  # its outermost slices show little of it
    annotated = tuple(range(first % TUMOUR_STEP, volume.shape[axis], TUMOUR_STEP))
    return VolumeCase(
        name, modality, volume, {"tumour": mask}, annotated, intensity, LICENCE, SOURCE
    )
