"""The segmentation of a volume as a file, of the format that its name says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.arrays import as_array
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.concepts import Concept, concepts_for, read_concepts
from recallseg.runtime.formats.dicom_seg import Algorithm, write_dicom_seg
from recallseg.runtime.formats.images import write_label_map
from recallseg.runtime.formats.kinds import FORMATS, mask_kind
from recallseg.runtime.formats.metaimage import write_metaimage
from recallseg.runtime.formats.nifti import write_nifti
from recallseg.runtime.formats.nrrd import write_seg_nrrd
from recallseg.runtime.formats.reading import open_volume
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.volumes.slices import VolumeResult

__all__ = ["write_segmentation"]

Masks = Union[VolumeResult, Mapping[str, Any]]


def write_segmentation(
    path: str | Path,
    masks: Masks,
    volume: Volume | str | Path,
    *,
    algorithm: Algorithm | None = None,
    concepts: Mapping[str, Concept] | str | Path | None = None,
) -> None:
    """Write the segmentation of a volume on the volume's own grid: in full, or not at all.

    The name says how: ``.dcm`` as a BINARY SEG, of volumes that were read from DICOM;
    ``.seg.nrrd`` as segments, each whole where they overlap; ``.nii``, ``.nii.gz``, ``.mha`` and
    ``.mhd`` (one file too) as a label map, and ``.png``, of a volume of one slice, upright where
    that is not along its first axis.
    Label values are a result's own, and else count from 1 in the order of the masks.

    Parameters
    ----------
    masks : what :func:`recallseg.segment_volume` found, which is then written as ``recallseg
        segment`` does it; or a mask IxJxK by structure, boolean or of 0 and 1.
    volume : that was segmented, or its path.
    algorithm : what a SEG says of how the masks were made; None: a result's provenance, or else
        this version of RecallSeg.
    concepts : coded meaning by structure, or a file of such
        (:func:`recallseg.runtime.formats.concepts.read_concepts`), beyond the built-in table.

    Raises
    ------
    InputError
        If the masks are not the volume's, or one's name cannot be a structure's; of DICOM, if
        there is no structure in them (it knows no empty SEG) or the volume has no DICOM source; of
        a label map, if masks that are not a result's overlap; of NRRD, if there is no mask, and of
        that and MetaImage, if the volume does not say how the patient lay; for another name of the
        file.
    OutputError
        If a SEG cannot be made.
    OSError
        If the folder cannot be written.

    Examples
    --------
    >>> volume = Volume(np.zeros((2, 4, 4), np.int16), np.diag([3.0, 1, 1, 1]), "RAS")
    >>> write_segmentation("found.seg.nrrd", {"liver": volume.array == 0}, volume)
    >>> read_volume("found.seg.nrrd").array.max()
    np.uint8(1)
    """
    path, volume = Path(path), open_volume(volume)
    kind = mask_kind(path)
    if kind is None:
        expected = ", ".join(dict.fromkeys(each.mask for each in FORMATS.values()))
        raise InputError(
            f"{path} names no format that a segmentation can be written in; expected a name like "
            f"those that end in {expected}."
        )
    if isinstance(concepts, (str, Path)):
        concepts = read_concepts(Path(concepts))
    if isinstance(masks, VolumeResult):
        _check_shape("the result", masks.label_map, volume)
        by_name, algorithm = masks.masks, algorithm or _algorithm(masks)
    else:
        masks = by_name = {
            check_name(name): _mask(name, mask, volume) for name, mask in masks.items()
        }
    if kind == "dicom":
        write_dicom_seg(path, by_name, volume, algorithm, concepts)
    elif kind == "nrrd":
        write_seg_nrrd(path, by_name, volume, concepts_for(by_name, concepts))
    else:
        labels = masks.label_map if isinstance(masks, VolumeResult) else _label_map(masks, volume)
        if kind == "nifti":
            write_nifti(path, labels, volume)
        elif kind == "metaimage":
            write_metaimage(path, labels, volume)
        else:
            cut = Slicing.of(volume)
            if len(labels) != 1 and (count := cut.count(volume)) != 1:
                raise InputError(f"{path} can hold one slice, and the volume has {count}.")
            write_label_map(path, cut.picture(labels))


def _check_shape(what: str, array: NDArray[Any], volume: Volume) -> None:
    if array.shape != volume.shape:
        raise InputError(
            f"{what} has shape {array.shape}, the volume {volume.shape}: it is of another."
        )


def _mask(name: str, given: Any, volume: Volume) -> NDArray[np.bool_]:
    mask = as_array(given, f"the mask of '{name}'")
    _check_shape(f"the mask of '{name}'", mask, volume)
    if mask.dtype != np.bool_ and not (
        np.issubdtype(mask.dtype, np.integer) and ((mask == 0) | (mask == 1)).all()
    ):
        raise InputError(
            f"the mask of '{name}' must be boolean, or integer with values 0 and 1, got "
            f"{mask.dtype}. Of a label map, pass one structure at a time: label_map == value."
        )
    return np.asarray(mask, np.bool_)


def _label_map(masks: Mapping[str, NDArray[np.bool_]], volume: Volume) -> NDArray[np.uint8]:
    if len(masks) > 255:
        raise InputError(f"a label map holds up to 255 structures, got {len(masks)}.")
    labels = np.zeros(volume.shape, np.uint8)
    for value, (name, mask) in enumerate(masks.items(), 1):
        shared = int(np.count_nonzero(labels[mask]))
        if shared:
            raise InputError(
                f"'{name}' shares {shared} voxels with structures before it, and a label map holds "
                "one a voxel. Write .seg.nrrd or .dcm, or take them off one of the masks."
            )
        labels[mask] = value
    return labels


def _algorithm(result: VolumeResult) -> Algorithm:
    """Return what a SEG says of how it was made."""
    made = {name: text[:1024] for name, text in result.provenance.to_texts().items()}  # an LT
    return Algorithm(
        f"bundle {made['bundle'][:16]}, library {made['library'][:16]}",
        {**made, **({"notice": result.notice} if result.notice else {})},
        made["bundle"][:16],
        result.notice,
    )
