"""Which of many DICOM images are one volume: stacks, and volumes that lie at one place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom_planes import MARKS, Plane

__all__ = ["choose"]

SAME_ORIENTATION = 1e-3  # of direction cosines
SAME_SPACING = 1e-3  # of the spacing
_LISTED = 8


def choose(
    planes: Sequence[Plane], path: Path, *, stack: str | None = None, time: int | None = None
) -> tuple[list[Plane], int, tuple[str, ...]]:
    """Return the images of one volume, how many volumes lie at its place, and what was chosen.

    Parameters
    ----------
    stack : which of several stacks (by StackID, orientation, size, spacing or frame of reference):
        its name, or its number from 1.
    time : which of several volumes at one place, from 1: time points, echoes, b values, or
        whatever tells them apart.

    Raises
    ------
    InputError
        If there are several and none is chosen (they are named), or there is no such one.
    """
    notes: list[str] = []
    stacks = _stacks(planes)
    names = [f"{n}: {name}" for n, name in enumerate(stacks, 1)]
    if stack is None and len(stacks) > 1:
        raise InputError(
            f"{path} holds {len(stacks)} stacks ({'; '.join(names[:_LISTED])}). Choose one with "
            "--stack, by its number."
        )
    if stack is None:
        chosen = next(iter(stacks.values()))
    else:
        by_id = [list_ for list_ in stacks.values() if list_[0].stack == stack]
        number = int(stack) if stack.isascii() and stack.isdecimal() else 0
        if len(by_id) == 1:
            chosen = by_id[0]
        elif 1 <= number <= len(stacks):
            chosen = list(stacks.values())[number - 1]
        else:
            raise InputError(f"{path} has no stack '{stack}'; there are {'; '.join(names)}.")
        if len(stacks) > 1:
            notes.append(f"one of {len(stacks)} stacks: {_describe(chosen)}")
    volumes = _volumes(chosen, path)
    titles = list(volumes)
    if time is None and len(volumes) > 1:
        listed = "; ".join(f"{n}: {title}" for n, title in enumerate(titles[:_LISTED], 1))
        more = f"; and {len(titles) - _LISTED} more" if len(titles) > _LISTED else ""
        raise InputError(
            f"{path}: images lie at one position, as {len(volumes)} volumes ({listed}{more}). Say "
            f"which with --time 1 to {len(volumes)}, or --time all."
        )
    if time is not None and not 1 <= time <= len(volumes):
        raise InputError(f"{path} has {len(volumes)} volumes at one place, there is no {time}.")
    if len(volumes) > 1:
        notes.append(f"volume {time} of {len(volumes)}: {titles[(time or 1) - 1]}")
        has, others = len(volumes[titles[(time or 1) - 1]]), max(map(len, volumes.values()))
        if has < others:
            notes.append(f"volume {time} has {has} images, others at its place up to {others}")
    return volumes[titles[(time or 1) - 1]], len(volumes), tuple(notes)


def _stacks(planes: Sequence[Plane]) -> dict[str, list[Plane]]:
    """Return the planes by stack, under names that tell them apart, in an order of their own."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if _together(plane, group[0]):
                group.append(plane)
                break
        else:
            groups.append([plane])
    groups.sort(key=lambda g: (_sortable(g[0].stack), _describe(g), g[0].at.row, g[0].reference))
    references = {plane.reference for plane in planes if plane.reference}
    named: dict[str, list[Plane]] = {}
    for group in groups:
        name = _describe(group)
        if len(references) > 1:
            name += f", frame of reference {next((p.reference for p in group if p.reference), '-')}"
        named[name if name not in named else f"{name} ({len(named) + 1})"] = group
    return named


def _together(one: Plane, other: Plane) -> bool:
    if one.stack != other.stack or one.shape != other.shape:
        return False
    if one.reference and other.reference and one.reference != other.reference:
        return False  # positions of different origins say nothing of each other
    here, there = one.at, other.at
    turned = np.abs(np.subtract((*here.row, *here.column), (*there.row, *there.column))).max()
    stretched = np.abs(np.subtract(here.spacing, there.spacing)).max() / max(there.spacing)
    same = turned <= SAME_ORIENTATION and stretched <= SAME_SPACING
    return bool(same and here.patient == there.patient)


def _describe(group: Sequence[Plane]) -> str:
    first, at = group[0], group[0].at
    rows, columns = first.shape
    stack = f"StackID {first.stack}, " if first.stack else ""
    return (
        f"{stack}{_plane_word(at.normal)}, {rows} x {columns} pixels of {at.spacing[0]:.3g} x "
        f"{at.spacing[1]:.3g} mm, {len(group)} images"
    )


def _plane_word(normal: NDArray[np.float64]) -> str:
    """Return axial, coronal or sagittal, whichever is nearest, for a plane's normal (LPS)."""
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal)))]


def _volumes(planes: Sequence[Plane], path: Path) -> dict[str, list[Plane]]:
    """Return the planes of a stack by volume: one each where images share their positions."""
    normal = planes[0].at.normal
    distances = [float(np.dot(plane.at.position, normal)) for plane in planes]
    at = [round(distance / 2e-3) for distance in distances]
    repeats = max(Counter(at).values())
    if repeats == 1:
        return {"": list(planes)}
    names = [name for name, _ in MARKS if len({plane.marks.get(name) for plane in planes}) > 1]
    for count in (1, 2, 3):
        for marks in combinations(names, count):
            groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i, plane in enumerate(planes):
                groups[tuple(plane.marks.get(name, "") for name in marks)].append(i)
            unique = all(len({at[i] for i in group}) == len(group) for group in groups.values())
            if unique and len(groups) == repeats:
                order = sorted(groups, key=lambda key: [_sortable(part) for part in key])
                return {
                    ", ".join(f"{n} {v or '-'}" for n, v in zip(marks, key, strict=True)): [
                        planes[i] for i in groups[key]
                    ]
                    for key in order
                }
    raise InputError(
        f"{path}: {repeats} images lie at one position, and nothing in their headers (time point, "
        "echo, b value, image type, acquisition) tells them apart. Give each volume a folder."
    )


def _sortable(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
