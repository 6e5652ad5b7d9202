"""A volume is segmented slice by slice: each slice recalls its own exemplars.

With *propagation* a slice also attends to the memories of the slices beside it, as SAM 2 does with
the frames of a video (arXiv 2408.00714): from the slice most like the library, both ways. The
retrieval paper (arXiv 2408.08813) treats slices alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.formats.reading import open_volume
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.frozen import same_fields
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import (
    RECORD_FORMAT,
    HeadUse,
    Result,
    Score,
    calibration_json,
)
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["CleanUp", "SliceRecord", "VolumeResult", "clean_up", "segment_volume"]


@dataclass(frozen=True)
class SliceRecord:
    """What is known of one slice; ``index`` counts along the slicing axis, ``pixels`` by structure.

    ``frame_memories`` are the memories of other slices that were used, ``library_digest`` names the
    library's state when it was asked; the rest is as in ``Result``.
    """

    index: int
    pixels: Mapping[str, int]
    scores: Mapping[str, Score]
    recalled: Mapping[str, tuple[Match, ...]]
    frame_memories: Mapping[str, int]
    flag: str
    reasons: Mapping[str, tuple[str, ...]]
    library_digest: str
    milliseconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "index": self.index,
            "pixels": dict(self.pixels),
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "recalled": {name: [r.key for r in found] for name, found in self.recalled.items()},
            "frame_memories": dict(self.frame_memories),
            "quality": {
                "flag": self.flag,
                "reasons": {name: list(why) for name, why in self.reasons.items()},
            },
            "library_digest": self.library_digest,
            "milliseconds": round(self.milliseconds, 3),
        }


@dataclass(frozen=True)
class CleanUp:
    """What :func:`clean_up` changed of one structure, in voxels."""

    parts_removed: int
    voxels_removed: int
    voxels_filled: int


@dataclass(frozen=True, eq=False)
class VolumeResult:
    """Segmentation of one volume. Results are equal if all but the time that they took is.

    Attributes
    ----------
    label_map : uint8 IxJxK on the volume's own grid, in memory as the volume's array lies; 0 is
        background, ``labels`` names the rest. Where structures overlap, the one with the highest
        logit has the voxel.
    shared : by structure, flat indices (int64) of its voxels that another one has in
        ``label_map``; see :meth:`mask`.
    slicing : how it was cut.
    slices : in the order of their index.
    propagated : memories of other slices that a slice could use; 0: each was segmented alone.
    cleaned : by structure; empty if nothing was asked for.
    milliseconds : from the first slice to the last.
    provenance : what made it; of the slice that was segmented last, if the library has changed
        meanwhile: see ``library_changed``, and each slice's own digest.
    calibrated, mend, head : as in ``Quality``.
    """

    label_map: NDArray[np.uint8]
    labels: Mapping[str, int]
    slicing: Slicing
    slices: tuple[SliceRecord, ...]
    propagated: int
    cleaned: Mapping[str, CleanUp]
    milliseconds: float
    provenance: Provenance
    calibrated: Mapping[str, tuple[int, int]]
    mend: str
    notice: str
    shared: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    head: HeadUse | None = None

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return the boolean mask IxJxK of a structure, with what it shares with others."""
        mask: NDArray[np.bool_] = np.ascontiguousarray(self.label_map == self.labels[name])
        if name in self.shared:
            mask.reshape(-1)[self.shared[name]] = True  # a view of it
        return mask

    @property
    def masks(self) -> Mapping[str, NDArray[np.bool_]]:
        """Masks by structure, each made when it is asked for: all at once may not fit."""
        return _Masks(self)

    @property
    def library_changed(self) -> bool:
        """Whether exemplars were added or removed while the volume was segmented."""
        return len({one.library_digest for one in self.slices}) > 1

    @property
    def flags(self) -> dict[str, int]:
        """How many slices have each quality flag."""
        flags = [s.flag for s in self.slices]
        return {flag: flags.count(flag) for flag in sorted(set(flags))}

    def to_json(self, volume: Volume) -> dict[str, Any]:
        """Return everything but the voxels; volumes in millilitres where the spacing is known."""
        voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
        counts = np.bincount(self.label_map.ravel(), minlength=256)
        voxels = {
            name: int(counts[value]) + len(self.shared.get(name, ()))
            for name, value in self.labels.items()
        }
        return {
            "format_version": RECORD_FORMAT,
            "labels": dict(self.labels),
            "voxels": voxels,
            "millilitres": None
            if volume.frame == "image"
            else {name: round(count * voxel_ml, 3) for name, count in voxels.items()},
            "square_mm": {
                name: round(count * volume.spacing[1] * volume.spacing[2], 3)
                for name, count in voxels.items()
            }
            if volume.frame == "image" and volume.in_mm and volume.shape[0] == 1
            else None,
            "shape": list(volume.shape),
            "spacing_mm": _lengths(volume),
            "frame": volume.frame,
            "plane": self.slicing.plane,
            "propagated": self.propagated,
            "cleaned": {name: vars(change) for name, change in self.cleaned.items()},
            "quality": {
                "flags": self.flags,
                "calibration": calibration_json(self.calibrated),
                "mend": self.mend,
                "head": None if self.head is None else self.head.to_json(),
            },
            "timings_ms": {"total": round(self.milliseconds, 3)},
            "slices": [s.to_json() for s in self.slices],
            "library_changed": self.library_changed,
            "provenance": self.provenance.to_json(),
            "notice": self.notice,
        }

    def to_audit(self, volume: Volume) -> dict[str, Any]:
        """Return what an audit log keeps: ``to_json``, exemplars of all slices as one list.

        The command that calibrates is left out: it names a folder.
        """
        fields = self.to_json(volume)
        del fields["quality"]["mend"]
        slices = fields.pop("slices")
        keys = {key for s in slices for found in s["recalled"].values() for key in found}
        return fields | {"recalled": sorted(keys)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VolumeResult):
            return NotImplemented
        return same_fields(self, other, "milliseconds")

    __hash__ = None  # type: ignore[assignment]  # arrays have none

    def __repr__(self) -> str:
        found = ", ".join(f"{name}: {int(self.mask(name).sum())}" for name in self.labels)
        notice = f", {self.notice}" if self.notice else ""
        slices = f"{len(self.slices)} {self.slicing.plane} slices"
        return (
            f"recallseg.VolumeResult({found} voxels in {slices}; {self.flags}, "
            f"k={self.provenance.recipe.k}, {self.milliseconds / 1e3:.1f} s{notice})"
        )


def segment_volume(
    segmenter: Segmenter,
    volume: Volume | str | Path,
    *,
    plane: str | None = None,
    largest: bool = False,
    fill_holes: bool = False,
    on_slice: Callable[[NDArray[Any], Result], None] | None = None,
    progress: Callable[[str], None] | None = None,
    deadline_ms: float | None = None,
) -> VolumeResult:
    """Segment every slice of a volume.

    Parameters
    ----------
    segmenter : with ``frames`` above 0, masks are propagated from slice to slice.
    volume : what :func:`recallseg.read_volume` gave, or would give of this path; or one that was
        made of an array.
    plane : ``axial``, ``coronal`` or ``sagittal``; None: as it was acquired, see
        :meth:`recallseg.runtime.formats.volume.Slicing.of`.
    largest, fill_holes : keep the largest part of each structure, fill what it encloses; see
        :func:`clean_up`.
    on_slice : is given each slice, upright, with its result.
    progress : is told of each slice that is done.
    deadline_ms : most milliseconds for all of it; None for no limit.

    Raises
    ------
    InputError
        For a plane that the volume does not have, NaN voxels, or no volume.
    EngineRunError
        If an engine fails.
    DeadlineError
        If it took too long.
    ModuleNotFoundError
        If it is to be cleaned up, and SciPy is not installed.
    """
    if largest or fill_holes:
        import_module("scipy.ndimage")  # or the work would be for nothing
    volume = open_volume(volume)
    slicing = Slicing.of(volume, plane)
    grey = volume.array if volume.array.ndim == 3 else volume.array[..., 0]
    label_map = np.zeros_like(grey, np.uint8, subok=False)
    shared: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    places = slicing.places(volume)
    records: dict[int, SliceRecord] = {}
    result: Result | None = None
    begin = perf_counter()
    for index, result in _results(segmenter, volume, slicing, deadline_ms):
        if index in records:
            continue
        slicing.view(label_map, index)[:] = result.label_map
        pixels = {name: int(np.count_nonzero(mask)) for name, mask in result.masks.items()}
        if sum(pixels.values()) > np.count_nonzero(result.label_map):  # structures overlap
            for name, mask in result.masks.items():
                lost = mask & (result.label_map != result.labels[name])
                if lost.any():
                    shared[name].append(places(index)[lost])
        records[index] = SliceRecord(
            index,
            pixels,
            result.scores,
            result.recalled,
            result.frame_memories,
            result.quality.flag,
            result.quality.reasons,
            result.provenance.library_digest,
            result.timings["total"],
        )
        if on_slice is not None:
            on_slice(slicing.view(volume.array, index), result)
        if progress is not None:
            progress(f"slice {index}")
    assert result is not None  # no volume is empty
    found = VolumeResult(
        label_map,
        result.labels,
        slicing,
        tuple(records[index] for index in sorted(records)),
        segmenter.frames,
        {},
        (perf_counter() - begin) * 1e3,
        result.provenance,
        result.quality.calibrated,
        result.quality.mend,
        result.notice,
        {name: np.concatenate(parts) for name, parts in shared.items()},
        result.quality.head,
    )
    if not (largest or fill_holes):
        return found
    return clean_up(found, largest=largest, fill_holes=fill_holes)


def acquisition_of(volume: Volume, slicing: Slicing) -> Acquisition:
    """Return the scale and side of a volume's slices."""
    return Acquisition.of(volume.tags, slicing.spacing(volume) if volume.in_mm else None)


def clean_up(
    result: VolumeResult, *, largest: bool = False, fill_holes: bool = False
) -> VolumeResult:
    """Keep the largest part of each structure, or fill what it encloses, and say what changed.

    Parts touch by faces. Only background is filled: another structure inside stays.
    """
    from scipy import ndimage

    label_map = result.label_map.copy()
    shared = dict(result.shared)
    changes: dict[str, CleanUp] = {}
    for name, value in result.labels.items():
        mask = result.mask(name)
        removed = filled = parts = 0
        if largest and mask.any():
            components, count = ndimage.label(mask)
            sizes = np.bincount(components.ravel())[1:]
            stray = mask & (components != 1 + int(sizes.argmax()))
            parts, removed = count - 1, int(stray.sum())
            label_map[stray & (label_map == value)] = 0
            if name in shared:
                shared[name] = shared[name][~stray.ravel()[shared[name]]]
            mask &= ~stray
        if fill_holes and mask.any():
            holes = ndimage.binary_fill_holes(mask) & (result.label_map == 0)
            filled = int(holes.sum())
            taken = np.flatnonzero(holes & (label_map != 0))  # another has filled them too
            label_map[holes & (label_map == 0)] = value
            if len(taken):
                shared[name] = np.concatenate([shared.get(name, taken[:0]), taken])
        changes[name] = CleanUp(parts, removed, filled)
    for name, value in result.labels.items():  # a voxel that its first structure lost has another
        if name in shared:
            free = shared[name][label_map.ravel()[shared[name]] == 0]
            label_map.ravel()[free] = value
            shared[name] = shared[name][label_map.ravel()[shared[name]] != value]
    cleaned = replace(result, label_map=label_map, shared=shared, cleaned=changes)
    across = tuple(axis for axis in range(3) if axis != result.slicing.axis)
    left = {name: cleaned.mask(name).sum(across) for name in result.labels}
    slices = tuple(
        replace(one, pixels={name: int(left[name][one.index]) for name in one.pixels})
        for one in result.slices
    )
    return replace(cleaned, slices=slices)


class _Masks(Mapping[str, NDArray[np.bool_]]):
    """The masks of a result, made when they are asked for."""

    def __init__(self, result: VolumeResult) -> None:
        self._result = result

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        return self._result.mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._result.labels)

    def __len__(self) -> int:
        return len(self._result.labels)


def _results(
    segmenter: Segmenter, volume: Volume, slicing: Slicing, deadline_ms: float | None
) -> Iterator[tuple[int, Result]]:
    """Yield slices with their results; the one that propagation starts from comes twice."""
    count = slicing.count(volume)
    taken = acquisition_of(volume, slicing)

    def picture(index: int) -> NDArray[Any]:
        return slicing.view(volume.array, index)

    begin = perf_counter()

    def left_ms() -> float | None:
        if deadline_ms is None:
            return None
        return max(0.0, deadline_ms - (perf_counter() - begin) * 1e3)

    if not segmenter.frames or count == 1:
        for index in range(count):
            yield index, segmenter.segment(picture(index), acquisition=taken, deadline_ms=left_ms())
        return
    start = min(range(count), key=lambda index: segmenter.distance(picture(index)))
    frame_memories = segmenter.frame_memories()
    for way in (range(start, count), range(start, -1, -1)):
        frame_memories.clear()
        for index in way:
            yield (
                index,
                segmenter.segment(
                    picture(index),
                    frame_memories=frame_memories,
                    acquisition=taken,
                    deadline_ms=left_ms(),
                ),
            )


def _lengths(volume: Volume) -> list[float] | None:
    """Return mm between voxels, of pictures between rows and columns; None if not stated."""
    if volume.frame != "image":
        return list(volume.spacing)
    return list(volume.spacing[1:]) if volume.in_mm else None
