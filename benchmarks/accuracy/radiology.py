"""CT of the chest and MR of the head of four patients: the test cases of pyradiomics."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.archives import Distribution, read_files
from recallseg.benchmarks.accuracy.dataset import Dataset, annotate, spread
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.model.preprocess import Intensity

__all__ = [
    "LICENCE",
    "LUNG_WINDOW",
    "PYRADIOMICS",
    "SOURCE",
    "brain_tumour",
    "lung_tumour",
    "lungs",
    "read_nrrd",
]

PYRADIOMICS = Distribution(
    "pyradiomics",
    "3.0.1",
    source_archive=True,
    digests={
        "data/lung1_image.nrrd": "379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed",
        "data/lung2_image.nrrd": "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651",
        "data/lung2_label.nrrd": "cef52738dc51aab69a48fe30639da956d2b911b1c2920439c091fab84727657a",
        "data/brain1_image.nrrd": (
            "fffdb111ee8b428ede7256707393c927a7d5be912f0604cf3c6f1bd5fc9644cf"
        ),
        "data/brain1_label.nrrd": (
            "ae6d8e6b84f7e99d68c210ee2fa6aaaefa0b2df0a84f55efca4feebe2b216059"
        ),
    },
)
LICENCE = "pyradiomics: BSD-3 (its test cases are distributed with it)"
SOURCE = "pyradiomics 3.0.1, source archive (data/)"
LUNG_WINDOW = Intensity("window", -1000.0, 400.0)
AIR = -400
"""Hounsfield units below which a voxel inside the body is air: lungs and airways."""
LUNG_VOXELS = 20000
"""Smallest connected part of air that counts as lung."""
LEAST_LUNG = 0.02
"""Share of a slice that lungs cover, if it is used."""
TYPES = {
    "short": "i2",
    "signed short": "i2",
    "int16": "i2",
    "unsigned short": "u2",
    "int": "i4",
    "unsigned char": "u1",
    "uint8": "u1",
    "float": "f4",
    "double": "f8",
}
Volume = NDArray[Any]


def lungs(data: Path | None) -> Dataset:
    """Return lungs in CT: one patient annotated, another one queried."""
    files = read_files(PYRADIOMICS, data)
    first, second = (read_nrrd(files[f"data/lung{i}_image.nrrd"])[0] for i in (1, 2))
    usable = [_with_lungs(f"patient{i}", volume) for i, volume in ((1, first), (2, second))]
    exemplars = spread(usable[0], 16)
    names = {image.name for image in exemplars}
    return Dataset(
        name="lungs",
        modality="CT",
        structures=("lung",),
        exemplars=tuple(exemplars),
        extra=tuple(image for image in usable[0] if image.name not in names)[:16],
        queries=tuple(spread(usable[1], 15)),
        reference=f"below {AIR} HU inside the body, vessels filled slice by slice",
        human=False,
        licence=LICENCE,
        source=SOURCE,
        remark="All exemplars are of one patient, all queries of another one.",
        intensity=LUNG_WINDOW,
    )


def lung_tumour(data: Path | None) -> Dataset:
    """Return a tumour of the lung in CT: every second slice annotated, those between queried."""
    files = read_files(PYRADIOMICS, data)
    return _tumour(
        "lung tumour",
        "CT",
        files["data/lung2_image.nrrd"],
        files["data/lung2_label.nrrd"],
        LUNG_WINDOW,
        empty=6,
    )


def brain_tumour(data: Path | None) -> Dataset:
    """Return a tumour of the brain in MR: every second slice annotated, those between queried."""
    files = read_files(PYRADIOMICS, data)
    return _tumour(
        "brain tumour",
        "MR, T1 with contrast agent",
        files["data/brain1_image.nrrd"],
        files["data/brain1_label.nrrd"],
        Intensity(),
        empty=4,
    )


def _tumour(
    name: str, modality: str, image: bytes, label: bytes, intensity: Intensity, empty: int
) -> Dataset:
    """Return a dataset; ``empty`` slices without tumour on either side take part in each role."""
    volume, thickness = read_nrrd(image)
    mask = read_nrrd(label)[0] > 0
    shown = np.flatnonzero(mask.any(axis=(1, 2)))
    around = range(max(0, int(shown[0]) - empty), min(len(volume), int(shown[-1]) + empty + 1))
    cut = {z: annotate(f"{name}-{z:02d}", volume[z], {"tumour": mask[z]}) for z in around}
    odd = int(shown[0]) % 2
    exemplars = tuple(image for z, image in cut.items() if z % 2 == odd)
    queries = tuple(image for z, image in cut.items() if z % 2 != odd)
    return Dataset(
        name=name,
        modality=modality,
        structures=("tumour",),
        exemplars=exemplars[:16],
        extra=(),
        queries=queries,
        reference="the mask that the package ships with the image (its author is not stated there)",
        human=False,
        licence=LICENCE,
        source=SOURCE,
        remark=f"One patient; annotated slices {2 * thickness:.0f} mm apart, queries midway; "
        "slices beyond the tumour are annotated, and queried, as not showing it. Few images: read "
        "with care.",
        positions={image.name: z * thickness for z, image in cut.items()},
        intensity=intensity,
    )


def _with_lungs(patient: str, volume: Volume) -> list[Annotated]:
    from scipy import ndimage

    body = np.stack([_largest(plane) for plane in volume > AIR])
    body = np.stack([ndimage.binary_fill_holes(plane) for plane in body])
    parts, _ = ndimage.label(body & (volume < AIR))
    sizes = np.bincount(parts.ravel())
    large = np.flatnonzero(sizes >= LUNG_VOXELS)
    lung = np.isin(parts, large[large > 0])
    lung = np.stack([ndimage.binary_fill_holes(plane) for plane in lung])
    return [
        annotate(f"{patient}-{z:02d}", volume[z], {"lung": lung[z]})
        for z in range(len(volume))
        if lung[z].mean() >= LEAST_LUNG
    ]


def _largest(mask: Volume) -> Volume:
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    chosen: Volume = parts == int(sizes.argmax())
    return chosen


def read_nrrd(content: bytes) -> tuple[Volume, float]:
    """Decode a small NRRD file: array [slice, row, column] and millimetres between slices.

    Raises
    ------
    InputError
        If it is none, or of a kind that the benchmark's files do not have.
    """
    head, separator, body = content.partition(b"\n\n")
    if not content.startswith(b"NRRD") or not separator:
        raise InputError("not an NRRD file.")
    lines = (line.split(": ", 1) for line in head.decode("ascii").splitlines() if ": " in line)
    fields = {key: value.strip() for key, value in lines}
    kind, order = TYPES.get(fields["type"]), ">" if fields.get("endian") == "big" else "<"
    if kind is None or fields["encoding"] not in ("raw", "gzip"):
        raise InputError(f"NRRD of type {fields['type']}, {fields['encoding']} is not read here.")
    raw = gzip.decompress(body) if fields["encoding"] == "gzip" else body
    shape = [int(size) for size in fields["sizes"].split()][::-1]
    directions = [
        [float(number) for number in vector.strip("()").split(",")]
        for vector in fields["space directions"].split()
    ]
    return np.frombuffer(raw, order + kind).reshape(shape), float(np.linalg.norm(directions[-1]))
