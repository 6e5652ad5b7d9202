"""Where results go: names of output files, and writing them so that none is ever half there."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recallseg.engines.durable import make_folder, replace_file
from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_file
from recallseg.runtime.formats.finding import MASK_SUFFIX, PREVIEW_SUFFIX
from recallseg.runtime.formats.images import write_label_map
from recallseg.runtime.formats.kinds import FORMATS
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import Result

__all__ = [
    "MASK_SUFFIX",
    "VOLUME_SUFFIXES",
    "WRITTEN",
    "is_done",
    "mask_file",
    "no_halves",
    "output_base",
    "output_files",
    "preview_files",
    "record_file",
    "remove_previews",
    "time_base",
    "write_result",
]

VOLUME_SUFFIXES = {kind: each.mask for kind, each in FORMATS.items() if kind != "image"}
_PREVIEWS = (f"{PREVIEW_SUFFIX}.png", f"{PREVIEW_SUFFIX}.html")
MOST_BYTES_BELOW = 1500  # of folders below the output: systems take 4096 of a whole path
WRITTEN = (".json", ".html", *(Path(f"x{each.mask}").suffix for each in FORMATS.values()))
"""What names of our files end in: no folder's does."""
MOST_BYTES = 200
"""Of a name: systems take 255, and suffixes and a temporary name still come."""


def output_base(output: Path, relative: Path) -> Path:
    """Return the path, less its suffix, that the outputs of an image get below ``output``.

    Parameters
    ----------
    relative : the image's path in the folder that it came from, less the suffix of its format.
        Nothing in it leads out of ``output``, and two that differ never give the same path.
    """
    parts = [_safe(part, folder=True) for part in relative.parts[:-1]]
    if sum(len(os.fsencode(part)) + 1 for part in parts) > MOST_BYTES_BELOW:
        parts = [_digest(str(relative.parent))]
    return output.joinpath(*parts, _safe(relative.name))


def mask_file(base: Path) -> Path:
    """Return where the label map goes."""
    return base.with_name(f"{base.name}{MASK_SUFFIX}.png")


def record_file(base: Path) -> Path:
    """Return where the record goes; if it is there, the result is complete."""
    return base.with_name(f"{base.name}.json")


def time_base(base: Path, time: int) -> Path:
    """Return what takes the place of ``base`` for one of several volumes of an item, from 1."""
    return base.with_name(f"{base.name}.time{time}")


def preview_files(base: Path) -> list[Path]:
    """Return where pictures go: a PNG and, of a volume, a page."""
    return [base.with_name(base.name + suffix) for suffix in _PREVIEWS]


def output_files(base: Path, kind: str) -> list[Path]:
    """Return every file that segmenting something of a kind (``FORMATS``) may write."""
    masks = () if kind == "image" else VOLUME_SUFFIXES.values()
    others = [base.with_name(base.name + suffix) for suffix in masks]
    return [mask_file(base), record_file(base), *others, *preview_files(base)]


def write_result(
    base: Path,
    result: Result,
    image: str,
    extra: Mapping[str, Any] | None = None,
    preview: bytes | None = None,
) -> dict[str, Any]:
    """Write label map and record, the record last; return the record.

    Parameters
    ----------
    image : name of the image's file.
    extra : what else the record shall have.
    preview : the picture (PNG), if one shall be left; else one of an earlier run goes.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    from recallseg import __version__

    record = {
        "image": image,
        "mask": mask_file(base).name,
        "recallseg": __version__,
        **result.to_json(),
        **(extra or {}),
    }
    make_folder(base.parent)
    with no_halves(base, mask_file(base), *preview_files(base)):
        write_label_map(mask_file(base), result.label_map)
        remove_previews(base)
        if preview is not None:
            replace_file(preview_files(base)[0], preview)
        replace_file(record_file(base), json_text(record).encode())
    return record


def remove_previews(base: Path) -> None:
    """Remove the pictures of an earlier run, which show another result."""
    for path in preview_files(base):
        path.unlink(missing_ok=True)


@contextmanager
def no_halves(base: Path, *written: Path) -> Iterator[None]:
    """Where a result fails, remove those of its files that were not there before it.

    So it can be asked for again. The record goes with them even if it was written: what failed then
    is to make its name survive. If one was there and has been replaced, the record before is of
    another, and goes.
    """
    before = {path: _state(path) for path in (record_file(base), *written)}
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if any(found is not None and _state(path) != found for path, found in before.items()):
                record_file(base).unlink(missing_ok=True)
            for path, found in before.items():
                if found is None:
                    path.unlink(missing_ok=True)
        raise


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _safe(name: str, *, folder: bool = False) -> str:
    """Return a file name without anything that a shell or another system trips over.

    A name that had to be changed gets the digest of the whole, so that no other becomes the same.
    Bytes that are no UTF-8 (lone surrogates, PEP 383) stay: the file is found under its own name.
    """
    cleaned = re.sub(r"[^\w.()+=@ \udc80-\udcff-]", "_", name).strip(" .")
    taken = folder and name.lower().endswith(WRITTEN)
    if cleaned == name and not taken and len(os.fsencode(name)) <= MOST_BYTES:
        return name
    digest = _digest(name)
    kept = os.fsencode(cleaned)[: MOST_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{kept}-{digest}" if kept else digest


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def is_done(base: Path, request: str, provenance: Provenance) -> bool:
    """Whether ``base`` has the whole result of a request by the same provenance.

    Parameters
    ----------
    request : stands in the record under that name: a digest of inputs and settings.

    Raises
    ------
    InputError
        If a record is there of anything else.
    """
    try:
        data = json.loads(read_file(record_file(base)))
        made = data["request"], data["provenance"]["digest"]
        files = [base.with_name(data["mask"])] if data["mask"] else []
    except FileNotFoundError:
        return False  # or what was to be written before the record, which comes last
    except (ValueError, KeyError, TypeError, RecursionError):
        made, files = ("", ""), []
    if made != (request, provenance.digest):
        raise InputError(
            f"{printable(record_file(base))} is of another image, other settings or another state "
            "of the library; nothing was written. Choose another --output, or give --overwrite."
        )
    return all(file.is_file() for file in files)
