"""What has arrived in a folder and is complete: pictures, volumes, and DICOM series.

A DICOM receiver writes one file for each slice and says nothing when the last one is there. So the
files of one folder that carry the same series are one item, complete when none has been added or
has changed for a while.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom import SeriesLabel, is_dicom, read_series_label
from recallseg.runtime.formats.images import is_image
from recallseg.runtime.formats.reading import volume_stem
from recallseg.runtime.services.outputs import MASK_SUFFIX

__all__ = ["Inbox", "Item", "kind_in_folder"]

Signature = tuple[int, int, int]  # files, bytes, nanoseconds of the last change


@dataclass(frozen=True)
class Item:
    """One picture, volume or series.

    Attributes
    ----------
    path : its file, or the folder that the files of the series lie in.
    files : all of its files.
    kind : as :func:`recallseg.runtime.formats.reading.volume_format` says.
    name : of the file; of a series its modality, number, and a digest that tells it from others.
    relative : the path, below the folder, that names its outputs once the suffix is taken away.
    suffix : of the file's name, as its format is written; empty for a series.
    signature : changes whenever a file does.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    name: str
    relative: Path
    suffix: str
    signature: Signature


class Inbox:
    """Looks into one folder, and those below it, again and again.

    Hidden files, label maps (NAME.mask.png, NAME.seg.nrrd, SEG) and other formats are passed over.

    Parameters
    ----------
    source : the folder.
    settle_s : seconds without a change after which an item is complete.
    """

    def __init__(self, source: Path, settle_s: float) -> None:
        self._source = source
        self._settle_s = settle_s
        self._seen: dict[Path, tuple[Signature, float]] = {}
        self._labels: dict[Path, tuple[Signature, SeriesLabel | None]] = {}

    def look(self, is_done: Callable[[Item], bool]) -> tuple[list[Item], bool]:
        """Return complete items that are not done, and whether others are still being written."""
        complete: list[Item] = []
        unsettled = False
        seen: dict[Path, tuple[Signature, float]] = {}
        now = monotonic()
        for item in self._items():
            if is_done(item):
                continue
            before = self._seen.get(item.relative)
            same = before is not None and before[0] == item.signature
            since = before[1] if before is not None and same else now
            seen[item.relative] = (item.signature, since)
            if now - since >= self._settle_s:
                complete.append(item)
            else:
                unsettled = True
        self._seen = seen
        return complete, unsettled

    def _items(self) -> list[Item]:
        items: list[Item] = []
        series: dict[tuple[Path, str], list[tuple[Path, Signature]]] = defaultdict(list)
        known: dict[str, SeriesLabel] = {}
        labels: dict[Path, tuple[Signature, SeriesLabel | None]] = {}
        for path in sorted(self._source.rglob("*")):
            kind = kind_in_folder(path, self._source)
            if kind is None and not _may_be_dicom(path, self._source):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # taken away while we looked
            signature = (1, status.st_size, status.st_mtime_ns)
            if kind is not None:
                items.append(self._file(path, kind, signature))
                continue
            if path not in self._labels or self._labels[path][0] != signature:
                self._labels[path] = (signature, _label(path))
            labels[path] = self._labels[path]
            label = labels[path][1]
            if label is not None and label.uid:
                series[path.parent, label.uid].append((path, signature))
                known[label.uid] = label
            elif label is not None:  # says that it is DICOM, and cannot be read: that gets reported
                items.append(self._file(path, "dicom", signature))
        self._labels = labels
        items += [
            self._series(folder, known[uid], files) for (folder, uid), files in series.items()
        ]
        return items

    def _file(self, path: Path, kind: str, signature: Signature) -> Item:
        stem = volume_stem(path)
        relative = path.relative_to(self._source)
        suffix = path.name[len(stem) :].lower()
        return Item(
            path, (path,), kind, path.name, relative.with_name(f"{stem}.x"), suffix, signature
        )

    def _series(
        self, folder: Path, label: SeriesLabel, files: Sequence[tuple[Path, Signature]]
    ) -> Item:
        # The series' own identifier leads to a patient; a digest of it does not.
        digest = hashlib.sha256(label.uid.encode()).hexdigest()[:8]
        name = f"{label.modality or 'DICOM'}-{label.number}-{digest}"
        signature = (
            len(files),
            sum(size for _, (_, size, _) in files),
            max(changed for _, (_, _, changed) in files),
        )
        return Item(
            folder,
            tuple(path for path, _ in files),
            "dicom",
            name,
            folder.relative_to(self._source) / f"{name}.x",
            "",
            signature,
        )


def kind_in_folder(file: Path, folder: Path) -> str | None:
    """Return the format of a file among others by its name; None for what is passed over.

    DICOM is passed over too: one file of it is seldom the whole.
    """
    name = file.name.lower()
    if _is_hidden(file, folder):
        return None
    if volume_stem(file).endswith(MASK_SUFFIX) or name.endswith(".seg.nrrd"):
        return None
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith(".nrrd"):
        return "nrrd"
    return "image" if is_image(file) else None


def _may_be_dicom(path: Path, folder: Path) -> bool:
    return (
        not _is_hidden(path, folder)
        and path.name != "DICOMDIR"
        and not is_image(path)
        and path.is_file()
        and (path.suffix.lower() in (".dcm", ".dicom") or is_dicom(path))
    )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _label(path: Path) -> SeriesLabel | None:
    try:
        return read_series_label(path)
    except InputError:
        return SeriesLabel("", "", 0)
