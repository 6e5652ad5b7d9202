"""Which formats there are: the one table by which files are sorted, named and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FORMATS", "Format", "is_image", "kind_by_name", "mask_kind", "stem", "suffixes"]


@dataclass(frozen=True)
class Format:
    """A format of images.

    Attributes
    ----------
    suffixes : in which names of its files end; one that ends in another goes before that.
    mask : in which the name of a segmentation ends that is written for an image of this format: a
        label map as PNG, NIfTI or MetaImage, a ``.seg.nrrd``, or a SEG.
    """

    suffixes: tuple[str, ...]
    mask: str


FORMATS = {
    "dicom": Format((".dcm", ".dicom"), ".seg.dcm"),
    "nifti": Format((".nii.gz", ".nii"), ".mask.nii.gz"),
    "nrrd": Format((".nrrd",), ".seg.nrrd"),
    "metaimage": Format((".mha", ".mhd"), ".mask.mha"),
    "image": Format((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy"), ".mask.png"),
}
"""By name; all but ``image`` are volumes."""


def kind_by_name(path: Path) -> str | None:
    """Return which of :data:`FORMATS` a file's name says that it is; None if none."""
    name = path.name.lower()
    for kind, each in FORMATS.items():
        if name.endswith(each.suffixes):
            return kind
    return None


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is a picture."""
    return kind_by_name(path) == "image"


def mask_kind(path: Path) -> str | None:
    """Return as which of :data:`FORMATS` a segmentation of this name can be written; None if not.

    A format that is only read gives its segmentations to another one.
    """
    kind = kind_by_name(path)
    if kind == "image":
        return kind if path.suffix.lower() == ".png" else None
    written = {kind_by_name(Path(f"x{each.mask}")) for each in FORMATS.values()}
    return kind if kind in written else None


def stem(path: Path) -> str:
    """Return a file's name without the suffix of its format, or of what it is."""
    name = path.name
    for suffix in (".seg.nrrd", *suffixes()):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def suffixes(*, labels: bool = False) -> tuple[str, ...]:
    """Return the suffixes of volumes; with ``labels`` of those that a label map may be."""
    others = ("image", "dicom") if labels else ("image",)
    return tuple(s for kind, each in FORMATS.items() if kind not in others for s in each.suffixes)
