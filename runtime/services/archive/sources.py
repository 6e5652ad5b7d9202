"""What an archive is made of: folders, files, patterns, tables of such, and object stores.

Sources are listed one by one and looked into when their turn comes, so that however long the list
is, little of it is in memory.
"""

from __future__ import annotations

import csv
import glob
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

from recallseg.engines.errors import InputError
from recallseg.engines.imports import import_needed
from recallseg.engines.reading import walk
from recallseg.runtime.formats.dicom_headers import Header
from recallseg.runtime.formats.finding import Finding, find_in_folder, find_inputs
from recallseg.runtime.formats.walking import mode_of
from recallseg.runtime.json_text import printable

__all__ = ["TABLES", "Source", "find", "import_pyarrow", "is_url", "list_sources"]

TABLES = (".csv", ".parquet")
_ROWS = 1024  # of a table in memory at once
_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """What is looked into as one: a series lies in one source, or is several.

    Attributes
    ----------
    named : as a person named it, for messages.
    paths : a folder, files of one folder, or the URLs of such.
    place : of its outputs, a folder below that of all outputs.
    trouble : why there is nothing to look into; empty if there is.
    matched : whether a pattern found it: then what is no image is no fault.
    """

    named: str
    paths: tuple[str, ...]
    place: str = ""
    trouble: str = ""
    matched: bool = False

    @property
    def remote(self) -> bool:
        """Whether it lies in an object store, and is fetched by who segments it."""
        return is_url(self.paths[0])


def is_url(text: str) -> bool:
    """Whether it is fsspec's to read: ``s3://bucket/key`` and the like."""
    return "://" in text


def import_pyarrow(part: str = "") -> Any:
    """Return pyarrow, or a module of it; EngineUnavailableError if it is not installed."""
    module = f"pyarrow.{part}" if part else "pyarrow"
    return import_needed(module, "a parquet table", "pip install 'recallseg[archive]'")


def import_fsspec() -> Any:
    """Return fsspec; EngineUnavailableError if it is not installed."""
    return import_needed("fsspec", "an input at a URL", "pip install 'recallseg[archive]'")


def find(source: Source, kind: str | None, read: Callable[[Path], Header] | None) -> Finding:
    """Look into a source on this machine: images under names that are their identity's.

    The rest as :func:`recallseg.runtime.formats.finding.find_inputs`.
    """
    paths = [Path(path) for path in source.paths]
    if len(paths) == 1 and stat.S_ISDIR(mode_of(paths[0])):
        return find_in_folder(paths[0], by_folder=False, kind=kind, read=read)
    missing = [path for path in paths if not mode_of(path)]
    if missing:
        raise InputError(f"there is no file {printable(missing[0])}.")
    return find_inputs(paths, kind, by_folder=False, read=read, named=not source.matched)


def list_sources(inputs: Sequence[str | Path]) -> Iterator[Source]:
    """Yield what was named, one by one.

    Parameters
    ----------
    inputs : each a folder, a file, a pattern (``studies/*/ct``), a URL or pattern of URLs
        (``s3://bucket/studies/*``), or a table (``.csv``, ``.parquet``) with a column ``path`` of
        such, patterns excepted, and perhaps a column ``name``: the folder of its outputs. What is
        relative in a table lies beside it.

    Raises
    ------
    InputError
        For a table without that column, or one that cannot be read; if the machine does not say
        what is there.
    EngineUnavailableError
        If ``fsspec``, or for parquet ``pyarrow``, is needed and not installed.
    """
    for each in inputs:
        text = str(each)
        if is_url(text):
            yield from _in_store(text) if _MAGIC & {*text} else [Source(text, (text,))]
        elif Path(text).suffix.lower() in TABLES and stat.S_ISREG(mode_of(Path(text))):
            yield from _in_table(Path(text).absolute())
        elif mode_of(Path(text)):
            yield Source(text, (str(Path(text).absolute()),))
        elif _MAGIC & {*text}:
            yield from _by_pattern(text)
        else:
            yield Source(text, (text,), trouble=f"there is no file or folder {printable(text)}.")


def _by_pattern(pattern: str) -> Iterator[Source]:
    """Yield folders that match one by one, and files that match by their folder."""
    _check_listed(pattern)
    root = _root(Path(pattern).absolute().parts, Path)
    none = True
    for folder, found in groupby(glob.iglob(pattern, recursive=True), lambda p: Path(p).parent):
        paths = [Path(path).absolute() for path in found]
        none = False
        place = folder.absolute().relative_to(root)
        for path in paths:
            if path.is_dir():
                yield Source(str(path), (str(path),), str(path.relative_to(root)))
        files = tuple(str(path) for path in paths if not path.is_dir())
        if files:
            named = files[0] if len(files) == 1 else str(folder)
            yield Source(named, files, str(place), matched=True)
    if none:
        yield Source(pattern, (pattern,), trouble=f"nothing matches {printable(pattern)}.")


def _check_listed(pattern: str) -> None:
    """Raise InputError for what cannot be looked at on the way: ``glob`` would pass it over."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        above = str(Path(*parts[:number]))
        listed = bool(_MAGIC & {*part})
        if not listed and not _MAGIC & {*above}:
            continue
        for place in glob.iglob(above, recursive=True) if _MAGIC & {*above} else [above]:
            if not stat.S_ISDIR(mode_of(Path(place))):
                continue
            if not listed:
                mode_of(Path(place, part))
                continue
            try:
                for _ in walk(Path(place)):
                    if part != "**":
                        break
            except OSError as error:
                raise InputError(
                    f"{printable(error.filename or place)} cannot be looked into: "
                    f"{error.strerror}. See to the disk, or the permission, and try again."
                ) from error


def _root(parts: Iterable[str], kind: Callable[..., Any]) -> Any:
    """Return the folder above the first part of a pattern."""
    fixed = []
    for part in parts:
        if _MAGIC & {*part}:
            break
        fixed.append(part)
    return kind(*fixed)


def _in_store(pattern: str) -> Iterator[Source]:
    store, path = open_store(pattern)
    try:
        found = sorted(store.glob(path, detail=True).items())
    except Exception as error:  # of whatever store it is
        why = f"{pattern} cannot be listed: {type(error).__name__}: {printable(error)}"
        yield Source(pattern, (pattern,), trouble=why)
        return
    if not found:
        yield Source(pattern, (pattern,), trouble=f"nothing matches {pattern}.")
    root = _root(PurePosixPath(path).parts, PurePosixPath)
    for folder, of_it in groupby(found, lambda each: PurePosixPath(each[0].rstrip("/")).parent):
        files = []
        for name, about in of_it:
            url = store.unstrip_protocol(name)
            if about.get("type") == "directory":
                place = PurePosixPath(name.rstrip("/")).relative_to(root)
                yield Source(url, (url,), str(place))
            else:
                files.append(url)
        if files:
            named = files[0] if len(files) == 1 else store.unstrip_protocol(str(folder))
            yield Source(named, tuple(files), str(folder.relative_to(root)), matched=True)


def open_store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises
    ------
    InputError
        If there is none such, or its package (``s3fs``, ``gcsfs``, ...) is not installed.
    """
    try:
        store, path = import_fsspec().core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {error}") from error
    return store, str(path)


def _in_table(table: Path) -> Iterator[Source]:
    rows = _parquet_rows(table) if table.suffix.lower() == ".parquet" else _csv_rows(table)
    for number, (text, name) in enumerate(rows, 1):
        where = f"{table.name}, row {number}"
        source = _of_row(table, text, where)
        yield replace(source, place=name) if name and not source.trouble else source


def _of_row(table: Path, text: str, where: str) -> Source:
    if not text:
        return Source(where, (where,), trouble=f"{where}: the path is empty.")
    if is_url(text):
        below = PurePosixPath(text.partition("://")[2].rstrip("/"))
        return Source(text, (text,), str(below.parent if below.suffix else below))
    path = table.parent / text
    if not path.exists():
        return Source(text, (text,), trouble=f"{where}: there is no {printable(text)}.")
    place = Path(*(part for part in Path(text).parts if part not in (Path(text).anchor, "..", ".")))
    return Source(text, (str(path),), str(place if path.is_dir() else place.parent))


def _csv_rows(table: Path) -> Iterator[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            yield from _csv_of(table, stream)
    except (csv.Error, OSError) as error:
        raise InputError(f"{table} cannot be read: {error}") from error


def _csv_of(table: Path, stream: IO[str]) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**20))
    reader = csv.DictReader(stream)
    _check_columns(table, reader.fieldnames or ())
    for row in reader:
        yield (row["path"] or "").strip(), (row.get("name") or "").strip()


def _parquet_rows(table: Path) -> Iterator[tuple[str, str]]:
    parquet = import_pyarrow("parquet")
    error_kind = import_pyarrow().ArrowException
    try:
        with parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            _check_columns(table, names)
            wanted = [name for name in ("path", "name") if name in names]
            for batch in file.iter_batches(_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    yield str(row["path"] or "").strip(), str(row.get("name") or "").strip()
    except (error_kind, OSError) as error:
        raise InputError(f"{table} cannot be read: {error}") from error


def _check_columns(table: Path, names: Sequence[str]) -> None:
    if "path" not in names:
        raise InputError(
            f"{table} has no column 'path'; it has {', '.join(map(repr, names)) or 'none'}. Name "
            "the column of files and folders 'path'."
        )
