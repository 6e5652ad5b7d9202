"""A draft's masks as a file, before or after they are accepted."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file
from recallseg.runtime.formats.concepts import concepts_for
from recallseg.runtime.formats.images import write_label_map
from recallseg.runtime.formats.nifti import write_nifti
from recallseg.runtime.formats.nrrd import write_seg_nrrd
from recallseg.runtime.services.http.drafts import Draft

__all__ = ["Kind", "export"]

Kind = Literal["png", "nifti", "nrrd"]
_NAMES = {"png": "mask.png", "nifti": "mask.nii.gz", "nrrd": "segmentation.seg.nrrd"}


def export(draft: Draft, kind: Kind | None = None) -> tuple[str, bytes]:
    """Return a file's name and contents.

    Parameters
    ----------
    kind : None for png of a picture, nifti of a volume. png and nifti hold label values in the
        order of the structures' names, and one structure a voxel: the later one's, where they
        overlap; nrrd holds all, with their names, and takes an image that has a patient frame.

    Raises
    ------
    InputError
        For png of a volume, nrrd without a patient frame, or if there is no mask.
    """
    names = sorted(name for name, mask in draft.masks.items() if mask.any())
    if not names:
        raise InputError("there is no mask to export yet.")
    chosen = kind or ("png" if draft.is_picture else "nifti")
    if chosen == "png" and not draft.is_picture:
        raise InputError("a volume cannot become a png: ask for nifti or nrrd.")
    if chosen == "nrrd" and draft.volume.frame == "image":
        raise InputError("this image says nothing of a patient: ask for png or nifti.")
    labels = np.zeros(draft.shape, np.uint8)
    for value, name in enumerate(names, 1):
        labels[draft.masks[name]] = value
    with TemporaryDirectory(prefix="recallseg-") as folder:
        path = Path(folder, _NAMES[chosen])
        if chosen == "png":
            write_label_map(path, draft.cuts[draft.axis].picture(labels))
        elif chosen == "nifti":
            write_nifti(path, labels, draft.volume)
        else:
            masks = {name: draft.masks[name] for name in names}
            write_seg_nrrd(path, masks, draft.volume, concepts_for(names))
        return path.name, read_file(path)
