"""Two public data sets in the folders that their makers give out: ACDC and CHAOS.

- **ACDC** (Bernard et al., IEEE TMI 2018): ``patientNNN/`` with ``Info.cfg`` (ED, ES: numbers of
  frames), ``patientNNN_frameFF.nii.gz`` and ``patientNNN_frameFF_gt.nii.gz``; 1 right ventricle,
  2 myocardium, 3 left ventricle. ``training/`` and ``testing/`` lie above them.
- **CHAOS** (Kavur et al., Medical Image Analysis 2021), its MR part: ``MR/ID/T1DUAL/`` and
  ``MR/ID/T2SPIR/`` with ``DICOM_anon`` (of T1DUAL ``InPhase`` and ``OutPhase`` in it; in phase is
  taken) and ``Ground``, a PNG for each file of the same name: 63 liver, 126 right kidney, 189 left
  kidney, 252 spleen.
"""

from __future__ import annotations

import re
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_text
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    annotated_slices,
    read_annotated_volume,
)
from recallseg.runtime.formats.images import read_label_map
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.volume import Slicing
from recallseg.runtime.formats.walking import files_below, mode_of
from recallseg.runtime.reports.annotated_sources import Images, Source
from recallseg.runtime.volumes.slices import acquisition_of

__all__ = ["ACDC", "CHAOS", "Challenge", "find_challenge"]

ACDC = {1: "RV", 2: "Myo", 3: "LV"}
CHAOS = {63: "liver", 126: "right kidney", 189: "left kidney", 252: "spleen"}
_FRAME = re.compile(r"(patient[0-9]+)_frame([0-9]+)_gt\.nii(?:\.gz)?")
_EVERY = SliceChoice(empty=True)


@dataclass(frozen=True)
class Challenge:
    """One data set.

    Attributes
    ----------
    name : ``ACDC``, ``CHAOS T1DUAL`` or ``CHAOS T2SPIR``.
    structures : of its labels.
    sources : volumes (of CHAOS, slices), grouped by patient.
    held_out : patients that its makers keep for testing and annotated; empty if there are none.
    notes : what is not as its makers describe it.
    """

    name: str
    structures: tuple[str, ...]
    sources: tuple[Source, ...]
    held_out: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def find_challenge(folder: Path) -> list[Challenge]:
    """Find the data sets in a folder and below.

    Raises
    ------
    InputError
        If there is none, or one is not complete: naming what is missing; or if the machine does not
        let all of the folder be looked at.
    """
    if not stat.S_ISDIR(mode_of(folder)):
        raise InputError(f"there is no folder {folder}.")
    files = files_below(folder)
    found = [one for one in (_acdc(folder, files), *_chaos(files)) if one is not None]
    if not found:
        raise InputError(
            f"{folder} holds neither ACDC (patientNNN/patientNNN_frameFF.nii.gz with _gt.nii.gz "
            "beside it) nor CHAOS (MR/ID/T1DUAL and T2SPIR with DICOM_anon and Ground)."
        )
    return found


def _acdc(folder: Path, files: Sequence[Path]) -> Challenge | None:
    sources, notes, testing = [], [], set()
    for truth in sorted(files):
        match = _FRAME.fullmatch(truth.name)
        if match is None:
            continue
        patient, frame = match[1], int(match[2])
        image = truth.with_name(truth.name.replace("_gt.nii", ".nii"))
        if not image.is_file():
            raise InputError(f"{truth} has no image beside it: {image.name} is missing.")
        info = truth.parent / "Info.cfg"
        if not info.is_file():
            notes.append(f"{patient} has no Info.cfg: frame {frame} is taken as it is")
        elif frame not in _phases(info):
            raise InputError(
                f"{truth.name}: {info} names frames {sorted(_phases(info))} (ED, ES), not {frame}."
            )
        if "testing" in truth.parent.parts[len(folder.parts) :]:
            testing.add(patient)
        name = f"{patient}_frame{frame:02d}"
        read = partial(_read_frame, image, truth, name)
        sources.append(Source(name, read, is_volume=True, group=patient, unit="patient"))
    if not sources:
        return None
    return Challenge("ACDC", (*ACDC.values(),), (*sources,), frozenset(testing), (*notes,))


def _phases(info: Path) -> set[int]:
    """Return the frames of end diastole and end systole."""
    lines = (line.partition(":") for line in read_text(info).splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    return {int(values[key]) for key in ("ED", "ES") if values.get(key, "").isdigit()}


def _read_frame(image: Path, truth: Path, name: str) -> Images:
    volume, masks = read_annotated_volume(image, truth, ACDC)
    slicing = Slicing.of(volume)
    cut = annotated_slices(volume, masks, name, _EVERY)
    across = slicing.across(volume)
    return Images((*cut,), acquisition_of(volume, slicing), volume.notes, across)


def _chaos(files: Sequence[Path]) -> list[Challenge]:
    found = []
    inside: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(files):
        inside[file.parent].append(file)
    folders = {folder for file in files for folder in file.parents}
    for sequence, inner in (("T1DUAL", "DICOM_anon/InPhase"), ("T2SPIR", "DICOM_anon")):
        sources = []
        for case in sorted(path for path in folders if path.name == sequence):
            truth, images = case / "Ground", case / inner
            if not stat.S_ISDIR(mode_of(truth)):
                continue  # the part for testing comes without
            patient = case.parent.name
            drawn = {path.stem: path for path in inside[truth] if path.suffix == ".png"}
            slices = {path.stem: path for path in inside[images] if path.suffix == ".dcm"}
            alone = sorted(drawn.keys() ^ slices.keys())
            if alone or not drawn:
                raise InputError(
                    f"{case}: {len(slices)} images in {inner} and {len(drawn)} masks in Ground do "
                    f"not have the same names: {', '.join(alone[:5]) or 'there is none'}."
                )
            for stem, file in slices.items():
                name = f"{patient}-{sequence}-{stem}"
                read = partial(_read_slice, file, drawn[stem], name)
                sources.append(Source(name, read, group=patient, unit="patient"))
        if sources:
            found.append(Challenge(f"CHAOS {sequence}", (*CHAOS.values(),), (*sources,)))
    return found


def _read_slice(file: Path, truth: Path, name: str) -> Images:
    """Read one slice; each DICOM file of CHAOS is a series of its own."""
    volume = read_volume(file)
    values = read_label_map(truth)
    if volume.shape != (1, *values.shape):
        raise InputError(f"{truth} is {values.shape} pixels, {file} is {volume.shape}.")
    masks = _organs(truth, values)
    slicing = Slicing.of(volume)
    (cut,) = annotated_slices(volume, masks, name, _EVERY)
    return Images((replace(cut, name=name),), acquisition_of(volume, slicing), volume.notes)


def _organs(truth: Path, values: NDArray[np.generic]) -> Mapping[str, NDArray[np.bool_]]:
    unknown = sorted(set(np.unique(values).tolist()) - {0, *CHAOS})
    if unknown:
        raise InputError(
            f"{truth} has the value {unknown[0]}; CHAOS has 0, {', '.join(map(str, CHAOS))}."
        )
    return {name: (values == value)[None] for value, name in CHAOS.items()}
