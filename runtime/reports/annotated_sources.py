"""Annotated images and volumes to evaluate on: read when asked for, each with its group."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    VolumeReader,
    annotated_slices,
    read_annotated_volume,
)
from recallseg.runtime.formats.annotations import Annotations
from recallseg.runtime.formats.dicom_files import damaged_is_input_error, open_dicom
from recallseg.runtime.formats.dicom_headers import patient_of
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.formats.pairs import Annotated, Legend, Missing, Pair, read_pair
from recallseg.runtime.formats.volume import Slicing
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.volumes.slices import acquisition_of

__all__ = ["GroupRule", "Images", "Source", "sources_of"]


@dataclass(frozen=True)
class GroupRule:
    """What belongs together and must not be on both sides of a comparison.

    Attributes
    ----------
    rule : ``patient`` (of DICOM its PatientID; an error for other files), ``folder`` (the first one
        below the folder that is looked into), ``file`` (each image and volume for itself), or
        ``name``.
    pattern : of ``name``: a regular expression, looked for in the path below the folder; what its
        first group, or all of it, matches.
    """

    rule: str
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> GroupRule:
        """Parse ``patient``, ``folder``, ``file`` or ``name:REGEX``; raises InputError."""
        rule, _, pattern = text.partition(":")
        if rule in ("patient", "folder", "file") and not pattern:
            return cls(rule)
        if rule == "name" and pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"'{pattern}' is no regular expression: {error}.") from error
            return cls(rule, pattern)
        raise InputError(f"groups must read patient, folder, file or name:REGEX, got '{text}'.")

    @property
    def unit(self) -> str:
        """What belongs together, in a word."""
        return "group" if self.rule == "name" else self.rule

    def of(self, name: str, item: Item | None = None) -> str:
        """Return the group of an image or volume.

        Parameters
        ----------
        name : its path below the folder.
        item : of a volume, its files.

        Raises
        ------
        InputError
            If it has none by this rule.
        """
        if self.rule == "patient":
            return _patient(name, item)
        if self.rule == "folder":
            first, slash, _ = name.partition("/")
            if not slash:
                raise InputError(f"{name} lies in no folder of its own, by which to group it.")
            return first
        if self.rule == "name":
            found = re.search(self.pattern, name)
            if found is None:
                raise InputError(f"'{self.pattern}' does not match {name}, so it has no group.")
            return found[1] if found.re.groups and found[1] is not None else found[0]
        return name


def _patient(name: str, item: Item | None) -> str:
    if item is None or item.kind != "dicom":
        raise InputError(
            f"{name} is no DICOM file, which alone says whose it is. Group by folder, file or "
            "name:REGEX."
        )
    with damaged_is_input_error(item.files[0]):
        header = open_dicom(item.files[0], only=["PatientID", "IssuerOfPatientID"])
        patient = patient_of(header)  # as an import tells a library of it
    if patient is None:
        raise InputError(f"{name} has no PatientID. Group by folder, file or name:REGEX.")
    return patient


@dataclass(frozen=True)
class Images:
    """What a source holds.

    Attributes
    ----------
    annotated : an image, or every slice of a volume.
    acquisition : scale and side of all of them.
    notes : what had to be decided while they were read.
    across : of a volume, mm between its slices (pixels where it states no lengths); else None.
    """

    annotated: tuple[Annotated, ...]
    acquisition: Acquisition = field(default_factory=Acquisition)
    notes: tuple[str, ...] = ()
    across: float | None = None


@dataclass(frozen=True)
class Source:
    """An image or a volume, read when it is asked for: a folder may be larger than memory.

    ``read`` raises InputError if it cannot be read. ``group`` says what it belongs to, empty: it is
    one of its own; ``unit`` says what that is: ``patient``, ``folder``, ``file``, ``group``, or
    ``image``.
    """

    name: str
    read: Callable[[], Images]
    is_volume: bool = False
    group: str = ""
    unit: str = "image"

    @classmethod
    def of(cls, annotated: Annotated) -> Source:
        """Return an image that was read already."""
        return cls(annotated.name, lambda: Images((annotated,)))


def sources_of(
    found: Annotations,
    labels: Mapping[int, str] | None,
    missing: Missing = "absent",
    *,
    legend: Legend | None = None,
    as_stored: bool = False,
    plane: str | None = None,
    read: VolumeReader = read_annotated_volume,
    group: GroupRule | None = None,
) -> list[Source]:
    """Return everything annotated in a folder; of volumes all slices, also those without a mask.

    Parameters
    ----------
    found : by :func:`recallseg.runtime.formats.annotations.find_annotations`.
    labels, missing, legend, as_stored : see :func:`read_pair`.
    plane, read : see :func:`recallseg.runtime.library.importing.import_volume`.
    group : what belongs together; None: each image and volume is one of its own.

    Raises
    ------
    InputError
        If not all of the folder was seen, nothing says what values of label maps mean, or
        something has no group.
    """
    found.check_whole()
    found.check_named(labels, legend)
    group = group or GroupRule("file")

    def picture(pair: Pair) -> Images:
        return Images((read_pair(pair, labels, missing, legend=legend, as_stored=as_stored),))

    def slices(item: Item, segmentation: Path) -> Images:
        volume, masks = read(item, segmentation, labels)
        name = item.relative.as_posix()
        every = SliceChoice(empty=True)
        cut = annotated_slices(volume, masks, name, every, plane=plane, missing=missing)
        slicing = Slicing.of(volume, plane)
        across = slicing.across(volume)
        return Images(tuple(cut), acquisition_of(volume, slicing), volume.notes, across)

    def refuse(why: str) -> Images:
        raise InputError(why)

    return [
        *(
            Source(pair.name, partial(picture, pair), group=group.of(pair.name), unit=group.unit)
            for pair in found.pairs
        ),
        *(
            Source(
                each.item.relative.as_posix(),
                partial(slices, each.item, each.segmentation),
                is_volume=True,
                group=group.of(each.item.relative.as_posix(), each.item),
                unit=group.unit,
            )
            for each in found.volumes
        ),
        *(
            Source(name, partial(refuse, why), is_volume=True, unit=group.unit)
            for name, why in found.unclear.items()
        ),
    ]
