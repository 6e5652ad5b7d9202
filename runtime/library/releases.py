"""A library as one signed file, for a fleet of devices.

A release is a tar file without freedom: the manifest, its signature, then the files that the
manifest names, in its order, with headers that follow from names and sizes. So every byte is in the
manifest, which is signed, or follows from it, and a change anywhere is found, with its place.

It brings the catalog, the memories and, if asked for, the images; never the table of identifiers,
who changed the library, where it lay, or a search index (every machine builds its own).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from recallseg.engines.durable import replace_folder, replacing
from recallseg.engines.errors import InputError, LibraryCorruptError, LibraryError
from recallseg.engines.reading import naming, walk
from recallseg.engines.signing import PublicKey, SigningKey, check_document, sign_document
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import backups
from recallseg.runtime.library.calibrations import calibrations
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.history import PREFIX
from recallseg.runtime.library.identifiers import is_hashed
from recallseg.runtime.library.identifying import identifies
from recallseg.runtime.library.storage import writing
from recallseg.runtime.library.store import CATALOG, MEMORIES, SOURCES, Store

__all__ = ["Release", "read_release", "release", "unpack", "version_number"]

FORMAT, FORMAT_VERSION = "recallseg-release", 1
MANIFEST, SIGNATURE = "release.json", "release.json.sig"
LIBRARY = "library"
KIND = "release"
_BLOCK, _CHUNK = 512, 1 << 20
_MOST_MANIFEST, _MOST_SIGNATURE = 2**26, 2**16
_LEAST_ENTRY = 120  # bytes of the manifest for each file
_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})")
_TEXTS = ("version", "name", "created", "recallseg", "bundle_name", "bundle_identity", "library")
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(_TEXTS, (str,)),
    **{"exemplars": (int,), "images": (bool,), "structures": (list,), "calibrated": (list,)},
    **dict.fromkeys(("evaluation", "sbom"), (dict, type(None))),
}
_NAME = re.compile(r"library/(library\.sqlite|(memories|sources)/[0-9a-z/]{1,60}\.(shard|npz))")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Release:
    """What a release says of itself, under its signature.

    Attributes
    ----------
    version : three numbers, e.g. ``1.2.0``.
    name : of the library.
    created : ISO 8601, UTC.
    recallseg : version of the program that made it.
    bundle_name, bundle_identity : what the library belongs to.
    library : the library's digest.
    exemplars : how many are in use.
    structures : in alphabetical order.
    images : whether annotated images are in it.
    calibrated : structures that quality is calibrated for.
    evaluation : of the library on held-out images, None where it was not evaluated.
    sbom : of what made it (CycloneDX); None without one.
    files : bytes and SHA-256 of every file, by name, in their order.
    """

    version: str
    name: str
    created: str
    recallseg: str
    bundle_name: str
    bundle_identity: str
    library: str
    exemplars: int
    structures: tuple[str, ...]
    images: bool
    calibrated: tuple[str, ...]
    evaluation: Mapping[str, Any] | None = field(repr=False)
    sbom: Mapping[str, Any] | None = field(repr=False)
    files: Mapping[str, tuple[int, str]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        values["files"] = [[name, *stated] for name, stated in self.files.items()]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, data: Any, path: Path) -> Release:
        """Rebuild from :meth:`to_json`; raises LibraryCorruptError for anything else."""
        try:
            values = dict(data)
            if (values.pop("format"), values.pop("format_version")) != (FORMAT, FORMAT_VERSION):
                raise ValueError("it is of another format, or of a newer RecallSeg")
            for name, kinds in _KINDS.items():
                if type(values[name]) not in kinds:
                    raise ValueError(f"its '{name}' is {ascii(values[name])[:80]}")
            for name in ("structures", "calibrated"):
                if not all(isinstance(structure, str) for structure in values[name]):
                    raise ValueError(f"its '{name}' are no names")
                values[name] = tuple(values[name])
            files = values["files"]
            for name, size, digest in files:
                if not _NAME.fullmatch(name) or type(size) is not int or size < 0:
                    raise ValueError(f"it names the file {ascii(name)[:80]}")
                if not isinstance(digest, str):
                    raise ValueError(f"its file {name} has no digest")
            values["files"] = FrozenMap({name: (size, digest) for name, size, digest in files})
            if len(files) != len(values["files"]):
                raise ValueError("it names a file twice")
            if f"{LIBRARY}/{CATALOG}" not in values["files"]:
                raise ValueError("it has no catalog")
            found = cls(**values)
            version_number(found.version)
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise LibraryCorruptError(f"{path} is no release that can be read: {error}.") from error
        return found


def version_number(version: str) -> tuple[int, int, int]:
    """Return the numbers of ``MAJOR.MINOR.PATCH``; raises InputError for anything else."""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise InputError(f"a release's version is three numbers like 1.2.0, got {version!r}.")
    return int(found[1]), int(found[2]), int(found[3])


def release(
    store: Store,
    path: Path,
    *,
    version: str,
    key: SigningKey,
    name: str,
    images: bool = False,
    evaluation: Mapping[str, Any] | None = None,
    sbom: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Release:
    """Write a release of a library as it is now, whatever is done to it meanwhile."""
    version_number(version)
    _check_names_nobody(store)
    if images and store.settings.keep_sources:
        _check_manifest(_LEAST_ENTRY * store.state.exemplars)
    work = path.with_name(f".{path.name}.library")
    shutil.rmtree(work, ignore_errors=True)  # of a process that died
    try:
        backups.backup(store, work, progress, images=images)
        with writing(path):
            _forget(work, images)
            described = _describe(work, version, name, images, evaluation, sbom)
        manifest = _canonical(described.to_json())
        _check_manifest(len(manifest))
        signature = sign_document(KIND, manifest, key)
        with (
            writing(path),
            replacing(path, mode=0o600) as descriptor,
            os.fdopen(os.dup(descriptor), "wb") as file,
        ):
            _add(file, MANIFEST, len(manifest), [manifest])
            _add(file, SIGNATURE, len(signature), [signature])
            for member, (size, _) in described.files.items():
                _add(file, member, size, _chunks(work / member.removeprefix(f"{LIBRARY}/")))
            file.write(bytes(2 * _BLOCK))
        return described
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_release(path: Path, trust: Sequence[PublicKey]) -> Release:
    """Return what a release says of itself; its files are not looked at.

    Raises
    ------
    SignatureError
        If none of ``trust`` signed it.
    LibraryCorruptError
        If it is damaged, or none.
    LibraryError
        If it cannot be read.
    """
    with _opened(path) as file:
        return _read_front(file, path, trust)


def unpack(
    path: Path, folder: Path, trust: Sequence[PublicKey], progress: Progress | None = None
) -> Release:
    """Write the library of a release to a new folder, each byte compared; nothing else is read.

    Raises
    ------
    SignatureError, LibraryCorruptError, LibraryError
        As :func:`read_release`; LibraryCorruptError says at which byte, and of what file.
    LibraryWriteError
        If the folder cannot be written.
    """
    with _opened(path) as file:
        described = _read_front(file, path, trust)
        with writing(folder), replace_folder(folder) as work:
            work.chmod(0o700)
            total = len(described.files)
            for done, (name, (size, digest)) in enumerate(described.files.items(), 1):
                target = work / name.removeprefix(f"{LIBRARY}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as copy:
                    _take(file, path, name, size, digest, copy)
                if progress is not None:
                    progress(done, total)
            place = file.tell()
            if _read(file, 2 * _BLOCK + 1) != bytes(2 * _BLOCK):
                raise _damaged(path, "its end", place)
            _open_once(work, described, path)
    return described


def _check_manifest(size: int) -> None:
    """Raise LibraryError for a manifest that nobody would read, before anything is written."""
    if size > _MOST_MANIFEST:
        raise LibraryError(
            f"the release would name so many files that its manifest has {size} bytes or more, and "
            f"at most {_MOST_MANIFEST} are read: some 500,000 images. Release it without images."
        )


def _check_names_nobody(store: Store) -> None:
    """Raise LibraryError if a tag tells whose image an exemplar is."""
    rows = store.catalog.database.execute("SELECT DISTINCT name, value FROM tags")
    for name, value in rows:
        if identifies(name, value) and not is_hashed(value):
            raise LibraryError(
                f"the library {store.path} has the tag '{name}', which tells whose image it is. "
                "Hash such values first: 'recallseg library anonymise'."
            )


def _forget(folder: Path, images: bool) -> None:
    """Take out of a copy who made it and where, and say whether it keeps images."""
    copied = Store.open(folder, "write")
    try:
        catalog = copied.catalog
        settings = dataclasses.replace(
            copied.settings, bundle_path="", keep_sources=images and copied.settings.keep_sources
        )
        with catalog.database.transaction():
            catalog.set_note("library", settings.to_text())
            catalog.database.execute(
                "DELETE FROM settings WHERE name >= ? AND name < ?", (PREFIX, "at!")
            )
    finally:
        copied.abandon()
    Database.vacuum(folder / CATALOG)


def _describe(
    work: Path,
    version: str,
    name: str,
    images: bool,
    evaluation: Mapping[str, Any] | None,
    sbom: Mapping[str, Any] | None,
) -> Release:
    from recallseg import __version__

    copied = Store.open(work, "read")
    try:
        facts: dict[str, Any] = {
            "bundle_name": copied.settings.bundle_name,
            "bundle_identity": copied.settings.identity,
            "library": copied.digest,
            "exemplars": copied.state.exemplars,
            "structures": tuple(
                sorted(row.name for row in copied.structures.values() if row.present)
            ),
            "calibrated": tuple(sorted({one.structure for one in calibrations(copied)})),
            "images": images and copied.settings.keep_sources,
        }
    finally:
        copied.abandon()
    made = (evaluation or {}).get("provenance") or {}
    if made.get("library_digest", facts["library"]) != facts["library"]:
        raise LibraryError(
            f"the evaluation is of another state of the library ({made['library_digest'][:12]}) "
            f"than what is released ({facts['library'][:12]}). Evaluate it as it is now."
        )
    files = {}
    names = [work / CATALOG]
    for place in (MEMORIES, SOURCES):
        names += sorted(
            Path(folder, name) for folder, _, found in walk(work / place) for name in found
        )
    for path in names:
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(path):
            digest.update(chunk)
            size += len(chunk)
        files[f"{LIBRARY}/{path.relative_to(work).as_posix()}"] = (size, digest.hexdigest())
    return Release(
        version=version,
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recallseg=__version__,
        evaluation=evaluation,
        sbom=sbom,
        files=FrozenMap(files),
        **facts,
    )


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _header(name: str, size: int) -> bytes:
    made = tarfile.TarInfo(name)
    made.size, made.mode = size, 0o600
    return made.tobuf(tarfile.USTAR_FORMAT)


def _add(file: IO[bytes], name: str, size: int, chunks: Sequence[bytes] | Iterator[bytes]) -> None:
    file.write(_header(name, size))
    written = 0
    for chunk in chunks:
        written += len(chunk)
        file.write(chunk)
    if written != size:
        raise LibraryError(f"{name} was changed while it was released. Try again.")
    file.write(bytes(-size % _BLOCK))


def _chunks(path: Path) -> Iterator[bytes]:
    with naming(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise LibraryError(f"the release {path} cannot be read: {error.strerror}.") from error


def _read(file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise LibraryError(f"the release {file.name} cannot be read: {error.strerror}.") from error


def _read_front(file: IO[bytes], path: Path, trust: Sequence[PublicKey]) -> Release:
    """Read manifest and signature, each behind the one header that it can have."""
    manifest = _read_member(file, path, MANIFEST, _MOST_MANIFEST)
    signature = _read_member(file, path, SIGNATURE, _MOST_SIGNATURE)
    check_document(f"release.json in the release {path}", KIND, manifest, signature, trust)
    try:
        stated = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, MANIFEST, _BLOCK) from error
    return Release.from_json(stated, path)


def _read_member(file: IO[bytes], path: Path, name: str, most: int) -> bytes:
    place = file.tell()
    header = _read(file, _BLOCK)
    digits = header[124:135]
    size = int(digits, 8) if re.fullmatch(rb"[0-7]{11}", digits) else -1
    if not 0 <= size <= most or header != _header(name, size):
        if not place and not header.startswith(name.encode() + b"\0"):
            raise LibraryCorruptError(
                f"{path} is no release of a library, or was changed from byte 0 on."
            )
        raise _damaged(path, f"the header of {name}", place)
    data, rest = _read(file, size), _read(file, -size % _BLOCK)
    if len(data) != size or rest != bytes(-size % _BLOCK):
        raise _damaged(path, name, place + _BLOCK)
    return data


def _take(file: IO[bytes], path: Path, name: str, size: int, digest: str, copy: IO[bytes]) -> None:
    place = file.tell()
    if _read(file, _BLOCK) != _header(name, size):
        raise _damaged(path, f"the header of {name}", place)
    found, left = hashlib.sha256(), size
    while left:
        chunk = _read(file, min(left, _CHUNK))
        if not chunk:
            raise _damaged(path, f"{name}, which is cut off", file.tell())
        found.update(chunk)
        copy.write(chunk)
        left -= len(chunk)
    if found.hexdigest() != digest:
        raise _damaged(path, name, place + _BLOCK)
    if _read(file, -size % _BLOCK) != bytes(-size % _BLOCK):
        raise _damaged(path, f"what follows {name}", place + _BLOCK + size)


def _open_once(work: Path, described: Release, path: Path) -> None:
    """Raise LibraryCorruptError if what was unpacked is not the library that was released."""
    store = Store.open(work, "read")
    try:
        found = store.digest
    finally:
        store.abandon()
    if found != described.library:
        raise LibraryCorruptError(
            f"{path} holds another library than it says ({found[:12]}, not "
            f"{described.library[:12]}). Ask for it anew from who made it."
        )


def _damaged(path: Path, what: str, place: int) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"the release {path} was changed since it was signed: {what}, from byte {place} on. "
        "Nothing of it was used. Copy it anew, or ask for it from who made it."
    )
