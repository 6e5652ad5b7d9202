"""An MRD image as a volume: what people see of it, and where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.services.mrd.wire import RGB, Image

__all__ = ["shown_of", "volume_of"]


def volume_of(image: Image, attributes: dict[str, list[str]]) -> tuple[Volume, tuple[str, ...]]:
    """Return an image as a volume, and what had to be decided.

    Its axes are X, Y, Z; without a patient Z, Y, X, as those of pictures are.

    Complex values are taken by their magnitude, and several coils by the root of the sum of their
    squares. Directions are those of rows and columns in the attributes where an image was turned
    after it was acquired, else those of readout and phase encoding.

    Raises
    ------
    InputError
        If it cannot be one.
    """
    shown = shown_of(image)
    affine = _affine(image.header, attributes)
    if affine is None:
        note = "an image does not say how the patient lay: it is taken as it is shown."
        stack = np.moveaxis(shown, 0, -1) if len(shown) == 3 else shown[0]
        return Volume(stack, np.eye(4), "image", "MR"), (note,)
    stack = shown.transpose(3, 2, 1, 0) if len(shown) == 3 else shown[0].transpose(2, 1, 0)
    acquired = 2 if stack.shape[2] == 1 else None  # of several it is not said what they are
    return Volume(stack, affine, "LPS", "MR", acquired=acquired), ()


def shown_of(image: Image) -> NDArray[Any]:
    """Return what people see of an image: 1 or 3 (RGB, uint8) x Z x Y x X, real."""
    data = image.data
    values: NDArray[Any]
    if int(image.header["image_type"]) == RGB and len(data) == 3:
        values = np.clip(data, 0, 255).astype(np.uint8)
        return values
    values = np.abs(data) if np.iscomplexobj(data) else data
    if len(values) > 1:
        values = np.sqrt((values.astype(np.float64) ** 2).sum(axis=0, keepdims=True))
    return values


def _affine(header: object, attributes: dict[str, list[str]]) -> NDArray[np.float64] | None:
    fields = np.asarray(header)
    size = fields["matrix_size"].astype(np.float64)
    extent = fields["field_of_view"].astype(np.float64)
    if size[2] == 1 and not extent[2] > 0:
        extent[2] = 1.0  # a slice whose thickness nobody said
    row = _direction(attributes, "ImageRowDir", fields["read_dir"])
    column = _direction(attributes, "ImageColumnDir", fields["phase_dir"])
    across = _direction(attributes, "ImageSliceDir", fields["slice_dir"])
    if not np.linalg.norm(across) > 0:
        across = np.cross(row, column)
    directions = np.stack([row, column, across], axis=1)
    position = fields["position"].astype(np.float64)
    if not (np.isfinite([position, extent]).all() and (extent > 0).all()):
        return None
    if not np.abs(directions.T @ directions - np.eye(3)).max() < 1e-3:  # NaN is not, either
        return None
    affine = np.eye(4)
    affine[:3, :3] = directions * (extent / size)
    affine[:3, 3] = position - affine[:3, :3] @ ((size - 1) / 2)  # it is the centre's
    return affine


def _direction(
    attributes: dict[str, list[str]], name: str, otherwise: NDArray[np.float32]
) -> NDArray[np.float64]:
    try:
        given = [float(value) for value in attributes.get(name, ())]
    except ValueError:
        given = []
    return np.array(given if len(given) == 3 else otherwise, np.float64)
