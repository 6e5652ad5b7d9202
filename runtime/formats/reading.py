"""Any file or folder in, a :class:`Volume` out: which reader, and what the name promises."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import count_dicom, read_dicom
from recallseg.runtime.formats.dicom_files import find_series, is_dicom
from recallseg.runtime.formats.images import read_image
from recallseg.runtime.formats.kinds import FORMATS, is_image, kind_by_name, stem
from recallseg.runtime.formats.metaimage import count_metaimage, read_metaimage
from recallseg.runtime.formats.nifti import count_nifti, read_nifti
from recallseg.runtime.formats.nrrd import count_nrrd, read_nrrd
from recallseg.runtime.formats.packed import packed_file
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.formats.walking import files_below, mode_of

if TYPE_CHECKING:
    from recallseg.runtime.formats.finding import Item

__all__ = [
    "count_item",
    "count_volumes",
    "is_volume",
    "open_volume",
    "read_item",
    "read_volume",
    "volume_format",
    "volume_stem",
]

ASKEW = 0.5
"""Degrees off right angles that are told: less comes of rounding."""
_READERS: dict[str, tuple[Callable[..., Volume], Callable[[Path], int]]] = {
    "nifti": (read_nifti, count_nifti),
    "nrrd": (read_nrrd, count_nrrd),
    "metaimage": (read_metaimage, count_metaimage),
}
"""Of formats that are one file: reads a volume (``time`` chooses), counts them."""


def volume_format(path: Path) -> str | None:
    """Return the format of a file or folder, of :data:`recallseg.runtime.formats.kinds.FORMATS`.

    None for anything else. A folder with DICOM files is one, if it holds no other image.

    Raises
    ------
    InputError
        If the machine does not say what is there.
    """
    if stat.S_ISDIR(mode_of(path)):
        inside = files_below(path)
        if any(is_image(p) for p in inside):
            return None
        return "dicom" if any(is_dicom(p) for p in inside) else None
    return kind_by_name(path) or ("dicom" if is_dicom(path) else None)


def is_volume(path: Path) -> bool:
    """Whether it is read as a volume, a folder of DICOM included."""
    return volume_format(path) not in (None, "image")


def volume_stem(path: Path) -> str:
    """Return the name without the suffixes of its format."""
    return path.name if path.is_dir() else stem(path)


def read_volume(
    path: str | Path,
    *,
    kind: str | None = None,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Volume:
    """Read a DICOM series or file, NIfTI, NRRD, MetaImage, or a plain image.

    That comes as one slice, frame ``image``.

    Parameters
    ----------
    kind : one of :data:`recallseg.runtime.formats.kinds.FORMATS` where the name does not tell.
    time : which of several volumes at one place (time points, echoes, b values), from 1.
    stack : which of several stacks of a DICOM series, by number from 1 or by StackID.
    voi, progress : see :func:`read_dicom`.

    Raises
    ------
    InputError
        If it is missing, of no known kind, or as its reader says.
    ModuleNotFoundError
        If the extra ``medical`` is not installed.
    """
    path = Path(path)
    kind = _kind(path, kind)
    if kind == "dicom":
        return read_dicom(path, voi=voi, time=time, stack=stack, progress=progress)
    if stack is not None:
        raise InputError(f"{path} has no stacks to choose from: it is no DICOM.")
    if kind in _READERS:
        read, _ = _READERS[kind]
        return _told_if_askew(read(path, time=time))
    if time not in (None, 1):
        raise InputError(f"{path} is one image, there is no number {time}.")
    return Volume(read_image(path)[None], np.eye(4), "image")


def _told_if_askew(volume: Volume) -> Volume:
    if volume.frame == "image":
        return volume
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    off = np.degrees(np.arcsin(min(1.0, np.abs(axes.T @ axes - np.eye(3)).max())))
    if off < ASKEW:
        return volume
    note = (
        f"its axes are up to {off:.1f} degrees off right angles (a gantry tilt, say): masks keep "
        "their place, but distances of an evaluation are measured as if they were at right angles"
    )
    return replace(volume, notes=(*volume.notes, note))


def open_volume(volume: Any) -> Volume:
    """Return a caller's volume: what was read or made, or what :func:`read_volume` reads of a path.

    Raises
    ------
    InputError
        If it cannot be read, or is neither.
    """
    if isinstance(volume, (str, os.PathLike)):
        return read_volume(Path(volume))
    if not isinstance(volume, Volume):
        raise InputError(
            f"a volume must be a path or a recallseg.Volume, got {type(volume).__name__}. Of an "
            "array, say where its voxels lie: Volume(array, affine, 'RAS')."
        )
    return volume


def count_volumes(path: str | Path, *, kind: str | None = None, stack: str | None = None) -> int:
    """Return how many volumes lie at one place (``time`` of :func:`read_volume` counts them)."""
    path = Path(path)
    kind = _kind(path, kind)
    if kind == "dicom":
        return count_dicom(path, stack)
    return _READERS[kind][1](path) if kind in _READERS else 1


def read_item(
    item: Item,
    *,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Volume:
    """Read what :mod:`recallseg.runtime.formats.finding` found; the rest as :func:`read_volume`."""
    if item.trouble:
        raise InputError(item.trouble)
    if item.kind == "dicom":
        return read_dicom(_files(item), voi=voi, time=time, stack=stack, progress=progress)
    return read_volume(item.path, kind=item.kind, voi=voi, time=time, stack=stack)


def count_item(item: Item, stack: str | None = None) -> int:
    """Return how many volumes an item holds at one place, as :func:`count_volumes`."""
    if item.kind == "dicom":
        return count_dicom(_files(item), stack)
    return count_volumes(item.path, kind=item.kind)


def _files(item: Item) -> Path | tuple[Path, ...]:
    return item.files if len(item.files) > 1 else item.files[0]


def _kind(path: Path, kind: str | None) -> str:
    """Return the format of a file or folder that is there; raises InputError otherwise."""
    if not mode_of(path):
        raise InputError(f"there is no file {path}.")
    if kind is not None and kind not in FORMATS:
        raise InputError(f"there is no format '{kind}'; choose {', '.join(FORMATS)}.")
    kind = kind or volume_format(path)
    if kind is not None:
        return kind
    if path.is_dir():
        found = len(find_series(path))
        raise InputError(f"{path} is no DICOM series: it holds {found} DICOM files among others.")
    if packed := packed_file(path):
        raise InputError(f"{path} is {packed.told}.")
    raise InputError(
        f"{path} is of no known format; expected DICOM, "
        f"{', '.join(suffix for each in FORMATS.values() for suffix in each.suffixes)}. Say which "
        "with --format."
    )
