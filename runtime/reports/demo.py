"""The demo's data: slices of a real MR template with its tissue maps, annotated and not.

The MNI152 T1 template (ICBM 2009a, symmetric) and its grey and white matter maps, 1 mm, ship inside
the ``nilearn`` package. Its files are read with nibabel; nilearn itself is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["SPACING", "STRUCTURES", "DemoSlices", "fill_library", "load_slices"]

STRUCTURES = ("brain", "grey matter", "white matter")
ANNOTATED = 16
SPACING = (1.0, 1.0)
"""Pixel size in mm along rows and columns."""
FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
BRAIN_THRESHOLD = 0.2
"""Share of the template's brightest voxel above which it is brain: nilearn's own brain mask."""
TISSUE_THRESHOLD = 0.5
MARGIN = 8
"""Pixels left around the brain's largest extent; most of the template's frame is empty."""
LEAST_AREA = 0.05
"""A slice belongs to the demo if its brain area is at least this share of the largest slice's."""


@dataclass(frozen=True)
class DemoSlices:
    """Axial slices: ``exemplars`` evenly over the whole brain, ``queries`` midway between them.

    ``gap`` is the distance between neighbouring exemplars in mm.
    """

    exemplars: tuple[Annotated, ...]
    queries: tuple[Annotated, ...]
    gap: float


def load_slices(count: int = ANNOTATED) -> DemoSlices:
    """Load the template and cut it.

    Raises
    ------
    ModuleNotFoundError
        If nilearn or nibabel is not installed (the extra ``demo``).
    InputError
        If this version of nilearn no longer ships the files.
    """
    t1, grey, white = (_volume(name) for name in ("t1", "gm", "wm"))
    masks = {
        "brain": t1 > BRAIN_THRESHOLD,
        "grey matter": grey > TISSUE_THRESHOLD,
        "white matter": white > TISSUE_THRESHOLD,
    }
    area = masks["brain"].sum(axis=(0, 1))
    usable = np.flatnonzero(area >= LEAST_AREA * area.max())
    annotated = np.linspace(usable[0], usable[-1], count).round().astype(int)
    midway = (annotated[:-1] + annotated[1:]) // 2
    gap = float(usable[-1] - usable[0]) / (count - 1)

    box = tuple(_extent(np.any(masks["brain"], axis=axes)) for axes in ((1, 2), (0, 2)))

    def cut(z: int) -> Annotated:
        planes = {name: _upright(mask[:, :, z][box]) for name, mask in masks.items()}
        shown = {name: plane for name, plane in planes.items() if plane.any()}
        absent = tuple(name for name in masks if name not in shown)
        return Annotated(f"axial-{z:03d}", _upright(t1[:, :, z][box]), shown, absent)

    return DemoSlices(
        tuple(cut(int(z)) for z in annotated), tuple(cut(int(z)) for z in midway), gap
    )


def fill_library(
    library: Library, slices: DemoSlices, progress: Callable[[str], None] | None = None
) -> None:
    """Add the annotated slices to an empty library."""
    for exemplar in slices.exemplars:
        library.add(
            exemplar.image,
            exemplar.masks,
            absent=exemplar.absent,
            tags={"modality": "MR", "view": "axial"},
            key=exemplar.name,
        )
        if progress is not None:
            progress(exemplar.name)


def _volume(name: str) -> NDArray[np.float32]:
    """Return a volume (x to the right, y to the front, z up), scaled to 0..1."""
    import nibabel

    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'nilearn'", name="nilearn")
    path = Path(next(iter(spec.submodule_search_locations)), "datasets", "data", FILE.format(name))
    if not path.is_file():
        raise InputError(
            f"the installed nilearn does not ship {path.name}. Install a version from 0.11 to 0.14."
        )
    file: Any = nibabel.load(path)
    data = np.asanyarray(file.dataobj)
    volume: NDArray[np.float32] = (data / data.max()).astype(np.float32)
    return volume


def _extent(occupied: NDArray[np.bool_]) -> slice:
    """Return where a row of booleans is set, with a margin: all slices are cropped to one frame."""
    found = np.flatnonzero(occupied)
    return slice(max(0, int(found[0]) - MARGIN), int(found[-1]) + 1 + MARGIN)


def _upright(plane: NDArray[Any]) -> NDArray[Any]:
    """Turn a plane [x, y] into rows from front to back and columns from left to right."""
    return np.ascontiguousarray(plane.T[::-1])
