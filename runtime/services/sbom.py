"""A software bill of materials (CycloneDX) of what runs: packages, interpreter, native libraries.

What is listed is what is installed, read from the distributions' own metadata; a package that
RecallSeg needs and that is missing is an error, not a gap. Wheels bring shared libraries of their
own (OpenCV's: OpenSSL, FFmpeg, ...), which no package manager sees: each is listed with its hash.
So are bundles, whose weights and graphs run as much as any code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import struct
import sysconfig
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.manifest import data_files
from recallseg.engines.reading import read_file, reason

__all__ = ["make_sbom", "needed_libraries"]

ROOT = "recallseg"
_VENDORED = re.compile(
    r"(?P<name>lib.+?)(?:-[0-9a-f]{8})*(?:\.(?P<inner>[0-9.]+))?\.so(?:\.(?P<version>.+))?"
)
LICENCE_NAME = 80
"""Longest licence name taken from a metadata field that may also hold the whole text."""


def make_sbom(
    extras: Sequence[str], libraries: Sequence[Path] = (), bundles: Sequence[str | Path] = ()
) -> str:
    """Return the bill as CycloneDX 1.6 JSON.

    Parameters
    ----------
    extras : of recallseg, that the device uses, e.g. ``("cpu",)``.
    libraries : shared libraries (ELF) to list with what they link to, e.g. librecallseg.so.
    bundles : folders, or names of shipped ones.

    Raises
    ------
    InputError
        If recallseg or something that it needs is not installed, an extra is unknown, a file is no
        ELF library, or ``SOURCE_DATE_EPOCH`` no time.
    BundleError
        If a bundle cannot be opened.

    Notes
    -----
    Where the environment has ``SOURCE_DATE_EPOCH`` the same installation gives the same bytes: the
    bill is of that time, and its serial number comes from what it lists.
    """
    made = _made()
    bom = Bom()
    needs: dict[str, list[str]] = {}
    found = dict(_closure(extras, needs))
    components = {name: _python_component(dist) for name, dist in found.items()}
    root = components[ROOT]
    root.type = ComponentType.APPLICATION
    bom.metadata.component = root
    native = [_interpreter()]
    for file in libraries:
        native += _native_components(file, bom)
    for source in bundles:
        native.append(_bundle_component(Bundle.open(source)))
    for name, dist in found.items():
        vendored = list(_vendored(name, dist))
        for component in vendored:
            bom.components.add(component)
        if vendored:
            bom.register_dependency(components[name], vendored)
    for component in (*components.values(), *native):
        if component is not root:
            bom.components.add(component)
    for name, component in components.items():
        bom.register_dependency(component, [components[need] for need in needs[name]])
    bom.register_dependency(root, native)
    if made is not None:
        bom.metadata.timestamp = made
        bom.serial_number = UUID(int=0)
        bom.serial_number = uuid5(NAMESPACE_URL, JsonV1Dot6(bom).output_as_string())
    return JsonV1Dot6(bom).output_as_string(indent=1)


def needed_libraries(file: Path) -> tuple[str, ...]:
    """Return the NEEDED entries of a 64-bit little-endian ELF file, in order.

    Raises
    ------
    InputError
        If it is none (ELF-64 Object File Format, version 1.5).
    """
    data = read_file(file)
    if data[:6] != b"\x7fELF\x02\x01":
        raise InputError(f"{file} is no 64-bit ELF library.")
    try:
        offset, size, count = (
            struct.unpack_from("<Q", data, 32)[0],
            *struct.unpack_from("<HH", data, 54),
        )
        segments = [
            struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)
        ]  # type, flags, offset, address, physical address, size in the file
        loads = [s for s in segments if s[0] == 1]
        (dynamic,) = (s for s in segments if s[0] == 2)
        tags = [struct.unpack_from("<QQ", data, dynamic[2] + at) for at in range(0, dynamic[5], 16)]
        address = next(value for tag, value in tags if tag == 5)  # DT_STRTAB
        strings = next(s[2] + address - s[3] for s in loads if s[3] <= address < s[3] + s[5])
        starts = [strings + value for tag, value in tags if tag == 1]  # DT_NEEDED
        return tuple(data[start : data.index(b"\0", start)].decode() for start in starts)
    except (struct.error, ValueError, StopIteration, OverflowError) as error:
        raise InputError(f"{file} is no ELF library that can be read: {reason(error)}.") from error


def _made() -> datetime | None:
    """Return of when the bill is to be, if the environment says it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    try:
        return datetime.fromtimestamp(int(epoch), timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            f"SOURCE_DATE_EPOCH must be seconds since 1970, got '{epoch:.40}'."
        ) from error


def _closure(
    extras: Sequence[str], needs: dict[str, list[str]]
) -> Iterator[tuple[str, Distribution]]:
    """Yield everything that recallseg needs here, itself first; fill ``needs`` by name."""
    known = set(_distribution(ROOT, ROOT).metadata.get_all("Provides-Extra") or ())
    for extra in extras:
        if extra not in known:
            raise InputError(
                f"recallseg has no extra '{extra}'; it has {', '.join(sorted(known))}."
            )
    waiting: list[tuple[str, frozenset[str], str]] = [(ROOT, frozenset(extras), ROOT)]
    seen: dict[str, set[str]] = {}
    while waiting:
        name, wanted, by = waiting.pop(0)
        dist = _distribution(name, by)
        first = name not in seen
        done = seen.setdefault(name, set())
        if not first and wanted <= done:
            continue
        if first:
            yield name, dist
        done |= wanted
        listed = needs.setdefault(name, [])
        for text in dist.requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *done)):
                need = _normal(requirement.name)
                if need != name and need not in listed:
                    listed.append(need)
                waiting.append((need, frozenset(requirement.extras), name))


def _distribution(name: str, by: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        why = "" if by == name else f", which {by} needs"
        raise InputError(
            f"the distribution '{name}'{why}, is not installed here. Install it, or leave out the "
            "extra that asks for it."
        ) from error


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python_component(dist: Distribution) -> Component:
    name = _normal(dist.metadata["Name"])
    purl = PackageURL("pypi", name=name, version=dist.version)
    component = Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=dist.version,
        bom_ref=str(purl),
        purl=purl,
        description=_field(dist, "Summary"),
        licenses=[_licence(dist)],
    )
    origin = dist.read_text("direct_url.json")
    archive = json.loads(origin).get("archive_info", {}) if origin else {}
    if sha256 := archive.get("hashes", {}).get("sha256"):
        component.hashes.add(HashType(alg=HashAlgorithm.SHA_256, content=sha256))
    if record := dist.read_text("RECORD"):  # itself a list of every file's SHA-256
        digest = hashlib.sha256(record.encode()).hexdigest()
        component.properties.add(Property(name="recallseg:record-sha256", value=digest))
    return component


def _vendored(name: str, dist: Distribution) -> Iterator[Component]:
    """Yield the shared libraries that a wheel brings beside its own (``NAME.libs``)."""
    for file in dist.files or ():
        found = _VENDORED.fullmatch(file.name)
        if found is None or not file.parts[0].endswith(".libs"):
            continue
        component = Component(
            type=ComponentType.LIBRARY,
            name=found["name"],
            version=found["version"] or found["inner"],
            bom_ref=f"{name}:{file.name}",
            description=f"inside the wheel of {name} {dist.version}",
        )
        if file.hash is not None and file.hash.mode == "sha256":
            raw = base64.urlsafe_b64decode(f"{file.hash.value}=")
            component.hashes.add(HashType(alg=HashAlgorithm.SHA_256, content=raw.hex()))
        yield component


def _bundle_component(bundle: Bundle) -> Component:
    """Return a bundle, with the digests of its weights and of every file of its manifest."""
    properties = {"identity": bundle.identity}
    for role, weights in (("segmenter", bundle.segmenter), ("embedder", bundle.embedder)):
        properties[f"{role}"] = f"{weights.architecture}, {weights.source}, {weights.licence}"
        properties[f"{role}-digest"] = weights.digest
    for key, entry in bundle.manifest["graphs"].items():
        properties[f"graph-sha256:{key}"] = entry["sha256"]
        for data in data_files(entry):
            properties[f"weights-sha256:{data['file']}"] = data["sha256"]
    component = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=bundle.name,
        version=bundle.identity[:16],
        bom_ref=f"bundle:{bundle.identity}",
        hashes=[_hash(bundle.path / "manifest.json")],
    )
    for name, value in properties.items():
        component.properties.add(Property(name=f"recallseg:{name}", value=value))
    return component


def _licence(dist: Distribution) -> License:
    make = LicenseFactory()
    if expression := _field(dist, "License-Expression"):
        return make.make_from_string(expression)
    for field in dist.metadata.get_all("Classifier") or ():
        if field.startswith("License :: OSI Approved ::"):
            return make.make_with_name(field.rpartition(" :: ")[2])
    text = (_field(dist, "License") or "").strip()
    if text and len(text) <= LICENCE_NAME and "\n" not in text:
        return make.make_from_string(text)
    return make.make_with_name("not stated in the metadata: see the distribution's licence file")


def _field(dist: Distribution, name: str) -> str | None:
    return next(iter(dist.metadata.get_all(name) or ()), None)


def _interpreter() -> Component:
    version = platform.python_version()
    component = Component(
        type=ComponentType.PLATFORM,
        name=platform.python_implementation(),
        version=version,
        bom_ref=f"python@{version}",
        licenses=[LicenseFactory().make_from_string("PSF-2.0")],
    )
    name = sysconfig.get_config_var("INSTSONAME") or ""
    file = Path(sysconfig.get_config_var("LIBDIR") or "", name)
    if name.endswith(".so.1.0") and file.is_file():
        component.hashes.add(_hash(file))
    return component


def _native_components(file: Path, bom: Bom) -> list[Component]:
    """Return a library and what it links to."""
    library = Component(
        type=ComponentType.LIBRARY,
        name=file.name.partition(".so")[0],
        version=file.resolve().name.partition(".so.")[2] or None,
        bom_ref=f"file:{file.name}",
        hashes=[_hash(file)],
    )
    links = [
        Component(type=ComponentType.LIBRARY, name=name, bom_ref=f"{file.name}:{name}")
        for name in needed_libraries(file)
    ]
    bom.register_dependency(library, links)
    return [library, *links]


def _hash(file: Path) -> HashType:
    digest = hashlib.sha256(read_file(file)).hexdigest()
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
