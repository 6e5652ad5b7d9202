"""What is in a folder: one finder for everything that takes one (segment, watch, import, evaluate).

Names, file types and DICOM headers decide; no pixel is decoded. DICOM files are put together by
their SeriesInstanceUID, and taken apart where a series holds several images: every multi-frame
object, and every picture without a place in the patient (views of a radiograph or mammogram, clips
and stills of an ultrasound), is an image of its own. Whatever is not taken is named with a reason.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recallseg.engines.errors import InputError
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.formats.dicom_files import RT_STRUCTURE_SET, SEGMENTATIONS
from recallseg.runtime.formats.dicom_headers import DicomHeader, Header, NotGiven, read_header
from recallseg.runtime.formats.kinds import FORMATS, is_image, kind_by_name
from recallseg.runtime.formats.metaimage import pixel_file
from recallseg.runtime.formats.packed import packing_by_name
from recallseg.runtime.formats.reading import volume_stem
from recallseg.runtime.formats.walking import PassedOver, mode_of, walk_folder
from recallseg.runtime.json_text import printable

__all__ = [
    "MASK_SUFFIX",
    "PREVIEW_SUFFIX",
    "Finding",
    "Headers",
    "Item",
    "PassedOver",
    "Signature",
    "check_given",
    "file_item",
    "find_in_folder",
    "find_inputs",
    "is_mask",
]

MASK_SUFFIX = ".mask"
PREVIEW_SUFFIX = ".preview"
Signature = tuple[int, int, int]  # files, bytes, nanoseconds of the last change

_NOT_THERE: Signature = (1, 0, 0)
_SLICES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{kind}"
    for kind in ("2", "4", "128", "20")  # CT, MR, PET, NM
)
"""Classes whose single files are slices of a stack even where a header lost its position."""


@dataclass(frozen=True)
class Item:
    """One picture, volume, or image of a DICOM series.

    Attributes
    ----------
    path : its file, or the folder that the files of a series lie in.
    files : all of its files.
    kind : one of :data:`recallseg.runtime.formats.kinds.FORMATS`.
    name : of the file; of DICOM, unless a folder was named by a person, its modality, series number
        and the whole SHA-256 of its UID, which tells it from every other and leads to no patient.
    relative : the path below the folder that names its outputs; no suffix of a format is left.
    suffix : of the file's name, as its format is written; empty for DICOM.
    signature : changes whenever a file does.
    series : SeriesInstanceUID; empty for other formats.
    trouble : why it cannot be read, where that is known already; empty if it is not.
    fault : number of the system's error where ``trouble`` is none of the file's, see
        :func:`recallseg.engines.machine_fault.machine_fault`; 0 otherwise.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    name: str
    relative: Path
    suffix: str
    signature: Signature
    series: str = ""
    trouble: str = ""
    fault: int = 0

    @property
    def as_found(self) -> bool:
        """Whether its files are still there, and as they were when it was found."""
        return _of_all([_signature(path) for path in self.files]) == self.signature


Headers = MutableMapping[Path, tuple[Signature, Header]]
"""Headers read before, by path: who looks again and again reads only what changed."""


@dataclass(frozen=True)
class Finding:
    """What there is to segment, the segmentations beside it, and what is neither.

    ``masks`` are label maps and segmentations of every format; of DICOM ones ``drawn_on`` says the
    series by path. ``not_given`` are folders and files that the machine did not let be looked at;
    they are among what was passed over.
    """

    items: tuple[Item, ...]
    masks: tuple[Path, ...]
    passed: tuple[PassedOver, ...]
    drawn_on: dict[Path, tuple[str, ...]]
    not_given: tuple[PassedOver, ...] = ()

    @property
    def incomplete(self) -> bool:
        """Whether there may be more than was found, as the machine did not give all of it."""
        return bool(self.not_given) or any(item.fault for item in self.items)


def check_given(found: Finding, *, folders: bool = False) -> None:
    """Raise InputError if the machine did not let a file be looked at: it may belong to others.

    ``folders``: or one of the folders be looked into.
    """
    for each in found.not_given:
        if folders or not each.unseen:
            raise InputError(
                f"{each}. It may be a mask of what was found: see to the disk, or the permission, "
                "and try again."
            )


def is_mask(path: Path) -> bool:
    """Whether a file's name says that it is a label map or segmentation, not an image."""
    name = path.name.lower()
    stem = volume_stem(path).lower()
    return (
        stem.endswith(MASK_SUFFIX)
        or (f"{MASK_SUFFIX}." in stem and is_image(path))
        or name.endswith((".seg.nrrd", ".seg.dcm"))
    )


def find_in_folder(
    folder: Path,
    *,
    links: bool = True,
    by_folder: bool = True,
    kind: str | None = None,
    headers: Headers | None = None,
    read: Callable[[Path], Header] | None = None,
) -> Finding:
    """Look into a folder and all below it.

    Parameters
    ----------
    links : follow symbolic links, as one expects of a folder that a person names; an inbox, in
        which anybody may leave one, does not.
    by_folder : name a DICOM image that has a folder to itself after that folder, for people. Else
        by its identity, which stays when others arrive beside it.
    kind : one of :data:`FORMATS`: of images, only those are taken.
    headers : DICOM headers read before; brought up to date.
    read : reads a header, as :func:`read_header` does.

    A series beside whose slices the machine did not give a file that may be one has that for its
    ``trouble``: without it the series would be another one.

    Raises
    ------
    InputError
        If there is no such folder, or more than ``walking.MOST_FILES`` files are in it.
    ModuleNotFoundError
        If there is DICOM and the extra ``medical`` is not installed.
    """
    if not stat.S_ISDIR(mode_of(folder)):
        raise InputError(f"there is no folder {printable(folder)}.")
    passed: list[PassedOver] = []
    not_given: list[PassedOver] = []
    found = _Sorted(folder, passed, {} if headers is None else headers, read or read_header)
    for path, status in walk_folder(folder, links, passed, not_given):
        found.take(path, (1, status.st_size, status.st_mtime_ns))
    whole = replace(found.finish(by_folder), not_given=tuple(not_given))
    if kind is None:
        return whole
    others = [each for each in whole.items if each.kind != kind]
    passed += [PassedOver(each.path, f"{each.kind}, not {kind}") for each in others]
    items = tuple(each for each in whole.items if each.kind == kind)
    return replace(whole, items=items, passed=tuple(passed))


def find_inputs(
    paths: Sequence[Path],
    kind: str | None = None,
    *,
    by_folder: bool = True,
    read: Callable[[Path], Header] | None = None,
    named: bool = True,
) -> Finding:
    """Return what a person named: files as they are, folders by what is in them.

    DICOM files of one series that are named one by one (``scan/*.dcm``) are one image.

    Parameters
    ----------
    by_folder, read : see :func:`find_in_folder`.
    named : a file that is no image is an item, whose reader says so; False, for files that matched
        a pattern: it is passed over.
    kind : one of :data:`FORMATS`: files are taken for that, and of folders only those that are.

    Raises
    ------
    InputError
        As :func:`find_in_folder`; for an unknown ``kind``; if there is nothing to take.
    """
    if kind is not None and kind not in FORMATS:
        raise InputError(f"there is no format '{kind}'; choose {', '.join(FORMATS)}.")
    items: list[Item] = []
    masks: list[Path] = []
    passed: list[PassedOver] = []
    drawn_on: dict[Path, tuple[str, ...]] = {}
    not_given: list[PassedOver] = []
    loose: dict[Path, _Sorted] = {}
    for path in paths:
        mode = mode_of(path)
        if stat.S_ISDIR(mode):
            part = find_in_folder(path, by_folder=by_folder, kind=kind, read=read)
            items += part.items
            masks += part.masks
            passed += part.passed
            drawn_on |= part.drawn_on
            not_given += part.not_given
        elif kind is not None or not mode:
            items.append(file_item(path, path.parent, kind or "image"))
        else:
            group = loose.setdefault(
                path.parent, _Sorted(path.parent, passed, {}, read or read_header, named=named)
            )
            group.take(path, _signature(path))
    for group in loose.values():
        part = group.finish(by_folder)
        items += part.items
        masks += part.masks
        drawn_on |= part.drawn_on
    return Finding(tuple(items), tuple(masks), tuple(passed), drawn_on, tuple(not_given))


class _Sorted:
    """Sorts files into images, segmentations and what is passed over."""

    def __init__(
        self,
        folder: Path,
        passed: list[PassedOver],
        headers: Headers,
        read: Callable[[Path], Header],
        *,
        named: bool = False,
    ) -> None:
        self._folder = folder
        self._passed = passed
        self._headers = headers
        self._read = read
        self._current: dict[Path, tuple[Signature, Header]] = {}
        self._named = named  # one by one: then an unreadable or unknown file is an error of its own
        self._items: list[Item] = []
        self._masks: list[Path] = []
        self._drawn_on: dict[Path, tuple[str, ...]] = {}
        self._pixels: set[Path] = set()  # of headers that keep them in a file beside
        self._lacking: dict[Path, Item] = {}  # by folder, one of what may be a slice
        self._series: dict[str, dict[Path, list[_File]]] = defaultdict(lambda: defaultdict(list))

    def take(self, path: Path, signature: Signature) -> None:
        kind = kind_by_name(path)
        beside = pixel_file(path) if path.suffix.lower() == ".mhd" else None
        if beside is not None:
            self._pixels.add(beside)
        if path.name == "DICOMDIR":
            self._pass(path, "an index of DICOM files; the files themselves are read")
        elif kind is not None and kind != "dicom":
            if is_mask(path):
                self._masks.append(path)
                self._pass(path, "a label map or segmentation, not an image")
            elif volume_stem(path).lower().endswith(PREVIEW_SUFFIX) and not self._named:
                self._pass(path, "a preview of an earlier result, as its name says")
            else:
                self._items.append(file_item(path, self._folder, kind, signature, beside))
        elif (header := self._header(path, signature)) is not None:
            self._dicom(path, signature, header)
        elif kind == "dicom":  # by its name; its reader says that it is none
            self._items.append(file_item(path, self._folder, "dicom", signature))
        elif self._named:
            self._items.append(
                file_item(path, self._folder, "image", signature)
            )  # its reader says why
        elif packed := packing_by_name(path):
            self._pass(path, packed.told)
        else:
            self._pass(path, "of no format that is read" if signature[1] else "an empty file")

    def finish(self, by_folder: bool) -> Finding:
        self._passed[:] = [each for each in self._passed if each.path not in self._pixels]
        images = [each for uid, found in self._series.items() for each in self._split(uid, found)]
        alone: dict[Path, int] = defaultdict(int)
        for each in images:
            alone[each.folder] += 1
        taken = {item.relative for item in self._items}
        for each in images:
            item = each.item(self._folder)
            relative = each.folder.relative_to(self._folder)
            if by_folder and (not self._named or len(each.files) > 1) and alone[each.folder] == 1:
                name = relative.name or each.folder.resolve().name or "folder"
                named = relative.with_name(name) if relative.name else Path(name)
                if named not in taken:
                    item = replace(item, name=name, relative=named)
            elif by_folder and len(each.files) == 1:
                file = each.files[0].path
                stem = file.relative_to(self._folder).with_name(volume_stem(file))
                if stem not in taken:
                    item = replace(item, name=file.name, relative=stem)
            taken.add(item.relative)
            self._items.append(self._without(item) if each.slices else item)
        self._headers.clear()
        self._headers.update(self._current)
        items = sorted(self._items, key=lambda item: os.fsencode(item.relative))
        return Finding(tuple(items), tuple(self._masks), tuple(self._passed), self._drawn_on)

    def _header(self, path: Path, signature: Signature) -> Header:
        if path not in self._headers or self._headers[path][0] != signature:
            header = self._read(path)
            if isinstance(header, NotGiven):  # the next look asks again
                return header
            self._headers[path] = (signature, header)
        self._current[path] = self._headers[path]
        return self._headers[path][1]

    def _without(self, item: Item) -> Item:
        """Return a series; one that may lack a slice says so."""
        for folder in dict.fromkeys(file.parent for file in item.files):
            lacking = self._lacking.get(folder)
            if lacking is not None:
                return replace(
                    item,
                    trouble=f"it may lack a slice, which lies beside it: {lacking.trouble}",
                    fault=lacking.fault,
                )
        return item

    def _dicom(
        self, path: Path, signature: Signature, header: DicomHeader | NotGiven | str
    ) -> None:
        if isinstance(header, NotGiven):
            item = file_item(path, self._folder, "dicom", signature)
            item = replace(item, trouble=header.why, fault=header.number)
            self._items.append(item)
            if header.awaited:
                self._lacking[path.parent] = item
        elif isinstance(header, str):  # it cannot be read: that is reported
            item = file_item(path, self._folder, "dicom", signature)
            self._items.append(replace(item, trouble=header))
        elif header.what == "image":
            file = _File(path, signature, header)
            self._series[header.series or header.instance][path.parent].append(file)
        else:
            if header.sop_class in SEGMENTATIONS or header.sop_class == RT_STRUCTURE_SET:
                self._masks.append(path)
                self._drawn_on[path] = header.refers_to
            self._pass(path, f"{header.what}, not an image")

    def _split(self, uid: str, folders: dict[Path, list[_File]]) -> Iterator[_Image]:
        """Yield the images of a series."""
        stacks: dict[Path, list[_File]] = {}
        for folder, files in folders.items():
            stack: list[_File] = []
            for file in self._without_copies(files):
                header = file.header
                slice_of_stack = header.placed or header.sop_class in _SLICES
                if header.frames > 1 or not slice_of_stack:
                    uid = header.instance or str(file.path)
                    yield _Image(folder, (file,), uid, slices=False)
                else:
                    stack.append(file)
            if stack:
                stacks[folder] = stack
        instances = [file.header.instance for stack in stacks.values() for file in stack]
        if len(stacks) > 1 and len(set(instances)) == len(instances):  # parts, and not copies
            together = Path(os.path.commonpath(stacks))
            stacks = {together: [file for stack in stacks.values() for file in stack]}
        for folder, stack in stacks.items():
            yield _Image(folder, tuple(stack), uid)

    def _without_copies(self, files: Iterable[_File]) -> list[_File]:
        """Leave out files that are another one byte for byte; those that only claim to be stay."""
        kept: dict[str, _File] = {}
        result: list[_File] = []
        for file in files:
            first = kept.setdefault(file.header.instance, file)
            if first is not file and first.signature[1] == file.signature[1]:
                try:
                    same = filecmp.cmp(first.path, file.path, shallow=False)
                except OSError as error:
                    if number := machine_fault(error):
                        why = (
                            f"{printable(file.path)} cannot be compared with "
                            f"{printable(first.path.name)}, whose number it has: {error.strerror}. "
                            "See to the disk, or the permission, and try again."
                        )
                        self._dicom(file.path, file.signature, NotGiven(why, number))
                        continue
                    same = False
                if same:
                    self._pass(file.path, f"a copy of {printable(first.path.name)}")
                    continue
            result.append(file)
        return result

    def _pass(self, path: Path, reason: str) -> None:
        self._passed.append(PassedOver(path, reason))


@dataclass(frozen=True)
class _File:
    path: Path
    signature: Signature
    header: DicomHeader


@dataclass(frozen=True)
class _Image:
    """The files of one image, their folder, and the UID that tells it from others."""

    folder: Path
    files: tuple[_File, ...]
    uid: str
    slices: bool = True  # of which one may lie in a file of its own

    def item(self, root: Path) -> Item:
        header = self.files[0].header
        digest = hashlib.sha256(os.fsencode(self.uid)).hexdigest()
        name = f"{header.modality or 'DICOM'}-{header.number}-{digest}"
        signature = _of_all([file.signature for file in self.files])
        return Item(
            self.files[0].path if len(self.files) == 1 else self.folder,
            tuple(file.path for file in self.files),
            "dicom",
            name,
            self.folder.relative_to(root) / name,
            "",
            signature,
            header.series,
        )


def file_item(
    path: Path,
    folder: Path,
    kind: str,
    signature: Signature | None = None,
    beside: Path | None = None,
) -> Item:
    """Return the item of one file, whose outputs are named by its path below the folder.

    ``beside`` is another one that belongs to it.
    """
    stem = volume_stem(path) or path.name
    relative = path.relative_to(folder).with_name(stem) if path.name else Path("folder")
    suffix = path.name[len(stem) :].lower()
    state = _signature(path) if signature is None else signature
    other = _NOT_THERE if beside is None else _signature(beside)
    if beside is None or other == _NOT_THERE:  # its reader says so
        return Item(path, (path,), kind, path.name, relative, suffix, state)
    both = _of_all([state, other])
    return Item(path, (path, beside), kind, path.name, relative, suffix, both)


def _of_all(signatures: Sequence[Signature]) -> Signature:
    return (
        len(signatures),
        sum(one[1] for one in signatures),
        max(one[2] for one in signatures),
    )


def _signature(path: Path) -> Signature:
    try:
        status = path.stat()
    except OSError:
        return _NOT_THERE
    return (1, status.st_size, status.st_mtime_ns)
