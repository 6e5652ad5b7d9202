"""The one way in which a bundle is written: in full, proven, and then put in its place."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recallseg.engines.digest import digest_file
from recallseg.engines.durable import replace_folder
from recallseg.engines.errors import ExportError
from recallseg.engines.manifest import MANIFEST
from recallseg.engines.reading import is_there

__all__ = ["check_output", "entry", "graph_file", "write_bundle", "write_folder", "write_manifest"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise ExportError if no bundle may be written to ``output``; ask before the work.

    What is replaced must be a bundle: another folder's contents would be gone.
    """
    try:
        if not is_there(output):
            return
        bundle = output.is_dir() and (is_there(output / MANIFEST) or not any(output.iterdir()))
    except OSError as error:
        raise ExportError(
            f"{error.filename} cannot be looked at: {error.strerror}. Choose another folder."
        ) from error
    if not overwrite:
        raise ExportError(f"{output} exists. Choose another folder, or allow it to be overwritten.")
    if not bundle:
        raise ExportError(
            f"{output} holds something else than a bundle, which is not overwritten. Choose "
            "another folder, or remove it yourself."
        )


@contextmanager
def write_bundle(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder to fill with a bundle; it is put at ``output`` when the block ends.

    Raises
    ------
    ExportError
        If something is at ``output`` that may not be replaced, it cannot be written, or what it
        is made of cannot be read. What was there stays, and nothing is left of the attempt.
    """
    check_output(output, overwrite=overwrite)
    with write_folder(output, "bundle") as folder:
        yield folder


@contextmanager
def write_folder(output: Path, what: str) -> Iterator[Path]:
    """Yield a new folder to fill; it is put at ``output`` when the block ends.

    Raises
    ------
    ExportError
        If it cannot be written, or what it is made of cannot be read. What was there stays, and
        nothing is left of the attempt.
    """
    try:
        with replace_folder(output) as folder:
            try:
                yield folder
            except OSError as error:
                # Of a copy that finds no room, ``shutil`` names what it was made of.
                if error.filename is None or error.errno in _FULL:
                    raise
                source = Path(error.filename)
                if folder in source.parents:
                    raise
                raise ExportError(
                    f"{source} cannot be read: {error.strerror}. The {what} {output} was not "
                    "written; what was there before is unharmed."
                ) from error
    except OSError as error:
        raise ExportError(
            f"the {what} {output} cannot be written: {error}. What was there before is unharmed. "
            "Free some space, or choose another folder."
        ) from error


def graph_file(folder: Path, variant: str, precision: str, graph: str) -> Path:
    """Return where a graph goes, in a folder that is there: one for all, and for their weights."""
    path = folder / "graphs" / f"{variant}.{precision}.{graph}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def entry(folder: Path, path: Path) -> dict[str, Any]:
    """Manifest entry of a file, and of the weights beside it where ONNX had to split them."""
    found: dict[str, Any] = {
        "file": path.relative_to(folder).as_posix(),
        "sha256": digest_file(path),
        "bytes": path.stat().st_size,
    }
    data = path.with_name(path.name + ".data")
    if data.exists():
        found["data"] = entry(folder, data)
    return found


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest; numbers that are not finite are refused (ValueError)."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
