"""One type for everything that has a place in space: a stack of slices with its affine.

The array keeps the axes of the file that it came from, and the affine says where they point;
nothing is turned, flipped or resampled on the way in. :class:`Slicing` turns slices upright for the
networks and puts masks back where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.arrays import as_array
from recallseg.runtime.formats.lattice import Lattice

__all__ = ["PLANES", "SPACING_TAG", "Frame", "Slicing", "Volume"]

Frame = Literal["RAS", "LPS", "image"]
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Names of slicing directions, and the patient axis (x, y, z) that they run along."""

SPACING_TAG = "spacing_mm"
"""Of an exemplar: mm between rows and between columns, as in 0.7x0.7."""
COARSER = 1.25
"""A volume is sliced along the axis it was acquired along if its spacing there is this many times
that of the other two."""


@dataclass(frozen=True)
class Volume:
    """A three-dimensional image.

    Attributes
    ----------
    array : IxJxK grey or IxJxKx3 RGB, any integer or floating dtype; numpy's, or what offers DLPack
        on the CPU, e.g. a PyTorch tensor, whose memory it then shares.
    affine : 4x4 float64; voxel index (i, j, k, 1) -> mm (x, y, z, 1) of the voxel's centre.
    frame : what x, y and z mean: ``RAS`` (to the right, front and head), ``LPS`` (to the left, back
        and head), or ``image`` where the file knows of no patient: x counts images or frames, y
        goes down and z to the right, in mm if the file states a pixel size, else in pixels.
    modality : DICOM's code (``MR``, ``CT``, ``US``, ...), or empty.
    window : centre and width that the file asks for, in the array's unit, or None.
    tags : what may be stored with an exemplar; never anything that identifies a patient.
    origin : what a writer needs of the source, e.g. its header; for its module only.
    notes : what had to be decided while reading, in sentences for the record and for people.
    acquired : the axis across the planes that the file stores as images of their own (DICOM); None
        where it does not tell, or a three-dimensional acquisition has no such planes.
    measured : without a patient frame, whether the file states lengths in mm.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    frame: Frame
    modality: str = ""
    window: tuple[float, float] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    origin: Any = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()
    acquired: int | None = None
    measured: bool = False

    def __post_init__(self) -> None:
        array, affine = as_array(self.array, "a volume"), np.asarray(self.affine, np.float64)
        if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] != 3):
            raise InputError(
                f"a volume must be IxJxK or IxJxKx3 (RGB), got shape {array.shape}. Split a series "
                "of volumes into one file each."
            )
        if array.size == 0:
            raise InputError(f"the volume is empty: its shape is {array.shape}.")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(
                f"a volume's affine must be 4x4 and finite, got {affine.tolist()}. The file's "
                "orientation is damaged; export it again."
            )
        size = np.linalg.norm(affine[:3, :3], axis=0)
        if (size <= 0).any() or abs(np.linalg.det(affine[:3, :3] / np.maximum(size, 1e-30))) < 1e-3:
            raise InputError(
                f"the volume's axes do not span space: its affine is {affine[:3].tolist()}. The "
                "file's orientation is damaged; export it again."
            )
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "tags", MappingProxyType(dict(self.tags)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tags": dict(self.tags)}  # its read-only view cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "tags": MappingProxyType(state["tags"])}.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int, int]:
        """I, J, K."""
        i, j, k = self.array.shape[:3]
        return i, j, k

    @property
    def in_mm(self) -> bool:
        """Whether ``spacing`` is in mm, and not in pixels."""
        return self.frame != "image" or self.measured

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres (pixels where unknown) between voxel centres along i, j and k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def affine_in(self, frame: Literal["RAS", "LPS"]) -> NDArray[np.float64]:
        """Return the affine in another patient frame.

        Raises
        ------
        InputError
            If the volume has no patient frame.
        """
        if self.frame == "image":
            raise InputError(
                "this image does not say how the patient lay, so it has no RAS or LPS."
            )
        flip = np.diag([1.0, 1.0, 1.0, 1.0] if frame == self.frame else [-1.0, -1.0, 1.0, 1.0])
        turned: NDArray[np.float64] = flip @ self.affine
        return turned

    @property
    def lattice(self) -> Lattice:
        """The voxel centres in the patient; raises InputError if there is no patient frame."""
        return Lattice(self.affine_in("LPS"), self.shape)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.array.shape))
        spacing = " x ".join(f"{s:.3g}" for s in self.spacing)
        unit = "mm" if self.in_mm else "px"
        return (
            f"recallseg.Volume({size} {self.array.dtype}, {spacing} {unit}, {self.frame}"
            f"{self.modality and f', {self.modality}'})"
        )


@dataclass(frozen=True)
class Slicing:
    """How a volume is cut: which axis is stepped along, and how each slice is turned upright.

    Slices look as on a radiologist's screen, whatever the axes of the file: axial ones with the
    front up and the patient's right on the left; coronal and sagittal ones with the head up, and
    the patient's right, or front, on the left. So exemplars and queries agree.

    Attributes
    ----------
    axis : 0, 1 or 2, stepped along.
    rows, columns : the other two.
    flip_rows, flip_columns : whether they run against the screen.
    plane : ``axial``, ``coronal``, ``sagittal``, or ``image`` without a patient.
    """

    axis: int
    rows: int
    columns: int
    flip_rows: bool
    flip_columns: bool
    plane: str

    @classmethod
    def of(cls, volume: Volume, plane: str | None = None) -> Slicing:
        """Choose how to cut.

        Parameters
        ----------
        plane : ``axial``, ``coronal`` or ``sagittal``: the volume's own axis nearest to that
            direction. None: one slice is cut as what it is; several along the axis whose spacing
            is clearly the coarsest, else as the file stores its planes, else axial.

        Raises
        ------
        InputError
            For another name, a plane asked of an image without a patient, or one that a single
            slice does not have.
        """
        if plane is not None and plane not in PLANES:
            raise InputError(f"there is no plane '{plane}'; choose {', '.join(PLANES)}.")
        if volume.frame == "image":
            if plane is not None:
                raise InputError(
                    f"this image does not say how the patient lay, so it has no {plane} plane."
                )
            return cls(0, 1, 2, False, False, "image")
        affine = volume.affine_in("LPS")[:3, :3]
        directions = affine / np.linalg.norm(affine, axis=0)
        along = _nearest_axes(directions)  # patient axis of each voxel axis
        single = _only_slice(volume)
        if plane is not None:
            axis = along.index(PLANES[plane])
            if single not in (None, axis):
                raise InputError(
                    f"this is a single {_plane_name(along[single or 0])} slice; it has no {plane} "
                    "plane. Leave the plane out."
                )
        elif single is not None:
            axis = single
        else:
            order = np.argsort(volume.spacing)
            coarsest, next_one = volume.spacing[order[2]], volume.spacing[order[1]]
            stored = along.index(2) if volume.acquired is None else volume.acquired
            axis = int(order[2]) if coarsest >= COARSER * next_one else stored
        patient = along[axis]
        # On screen (LPS): rows go back (y) or down (-z), columns go left (x) or back (y).
        down, right = {2: (1, 0), 1: (2, 0), 0: (2, 1)}[patient]
        rows, columns = along.index(down), along.index(right)
        flip_rows = (directions[down, rows] < 0) != (down == 2)
        flip_columns = directions[right, columns] < 0
        return cls(axis, rows, columns, bool(flip_rows), bool(flip_columns), _plane_name(patient))

    def count(self, volume: Volume) -> int:
        """Return how many slices there are."""
        return volume.shape[self.axis]

    def picture(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return a label map of one slice as a picture HxW.

        Along the first axis it is as the file has it, and else upright, as it is seen.
        """
        return labels[0] if len(labels) == 1 else np.ascontiguousarray(self.view(labels, 0))

    def across(self, volume: Volume) -> float:
        """Return mm between slices, at a right angle to them (pixels where unknown)."""
        axes = volume.affine[:3, :3]
        normal = np.cross(axes[:, self.rows], axes[:, self.columns])
        return float(abs(normal @ axes[:, self.axis]) / np.linalg.norm(normal))

    def view(self, array: NDArray[Any], index: int) -> NDArray[Any]:
        """Return slice ``index`` of an IxJxK(x3) array upright, HxW(x3): a view, so it can be set.

        ``slicing.view(label_map, index)[:] = mask`` puts a mask back on the volume's grid.
        """
        plane: NDArray[Any] = np.moveaxis(array, self.axis, 0)[index]
        if self.rows > self.columns:
            plane = plane.swapaxes(0, 1)
        if self.flip_rows:
            plane = plane[::-1]
        if self.flip_columns:
            plane = plane[:, ::-1]
        return plane

    def places(self, volume: Volume) -> Callable[[int], NDArray[np.int64]]:
        """Return what gives, for a slice, the flat index IxJxK of each of its pixels, HxW."""
        steps = (volume.shape[1] * volume.shape[2], volume.shape[2], 1)

        @cache  # large, and seldom asked for
        def first() -> NDArray[np.int64]:
            shape = [1 if axis == self.axis else size for axis, size in enumerate(volume.shape)]
            plane = sum(
                np.arange(size, dtype=np.int64).reshape([-1 if a == axis else 1 for a in range(3)])
                * steps[axis]
                for axis, size in enumerate(shape)
            )
            return self.view(np.asarray(plane), 0)

        return lambda index: first() + index * steps[self.axis]

    def spacing(self, volume: Volume) -> tuple[float, float]:
        """Return the millimetres between rows and between columns of a slice."""
        return volume.spacing[self.rows], volume.spacing[self.columns]


def _plane_name(patient: int) -> str:
    return next(name for name, number in PLANES.items() if number == patient)


def _only_slice(volume: Volume) -> int | None:
    """Return the axis across the one slice that a volume has; None if it has several."""
    thin = [axis for axis, size in enumerate(volume.shape) if size == 1]
    if volume.acquired in thin:
        return volume.acquired
    return thin[0] if len(thin) == 1 else None


def _nearest_axes(directions: NDArray[np.float64]) -> list[int]:
    """Return the patient axis nearest to each voxel axis, each taken once."""
    strength = np.abs(directions)
    along = [-1, -1, -1]
    for _ in range(3):
        patient, voxel = np.unravel_index(int(np.argmax(strength)), strength.shape)
        along[int(voxel)] = int(patient)
        strength[patient, :] = -1.0
        strength[:, voxel] = -1.0
    return along
