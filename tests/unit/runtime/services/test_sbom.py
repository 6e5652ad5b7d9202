from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError

try:
    distribution("recallseg")
except PackageNotFoundError:
    pytest.skip("recallseg is run from its source, not installed", allow_module_level=True)


def make_sbom(*arguments: Any, **options: Any) -> str:
    # Here: CycloneDX takes seconds to import, and every worker imports every file of tests.
    from recallseg.runtime.services import sbom

    return sbom.make_sbom(*arguments, **options)


def errors_of(bill: str) -> object:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill)


@pytest.fixture(scope="module")
def bill() -> str:
    return make_sbom(("cpu",), [Path(sys.executable)])


def test_it_follows_the_schema(bill: str) -> None:
    assert errors_of(bill) is None
    broken = bill.replace('"bomFormat": "CycloneDX"', '"bomFormat": "other"')
    assert errors_of(broken) is not None


def test_it_lists_what_is_installed_and_nothing_else(bill: str) -> None:
    data = json.loads(bill)
    assert data["metadata"]["component"]["name"] == "recallseg"
    components = {c["name"]: c for c in data["components"]}
    for name in ("numpy", "usearch", "typer", "onnxruntime", "opencv-python-headless"):
        assert components[name]["version"] == version(name)
        assert components[name]["licenses"]
    assert "torch" not in components  # belongs to another extra
    assert components["CPython"]["version"] == "{}.{}.{}".format(*sys.version_info[:3])
    dependencies = {d["ref"]: d.get("dependsOn", []) for d in data["dependencies"]}
    (root,) = (ref for ref in dependencies if ref.startswith("pkg:pypi/recallseg@"))
    assert f"pkg:pypi/numpy@{version('numpy')}" in dependencies[root]


def test_the_same_installation_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = make_sbom(("cpu",))
    assert make_sbom(("cpu",)) == first
    assert json.loads(first)["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000001")
    assert json.loads(make_sbom(("cpu",)))["serialNumber"] != json.loads(first)["serialNumber"]
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert make_sbom(("cpu",)) != make_sbom(("cpu",))


def test_linked_libraries_are_those_that_readelf_tells(tmp_path: Path) -> None:
    from recallseg.runtime.services.sbom import needed_libraries

    told = subprocess.run(
        ["readelf", "-d", sys.executable], capture_output=True, text=True, check=True
    ).stdout
    assert list(needed_libraries(Path(sys.executable))) == re.findall(r"NEEDED.*\[(.+)\]", told)
    (tmp_path / "not.so").write_bytes(b"\x7fELF\x02\x01")
    (tmp_path / "text.so").write_text("text")
    far = bytearray(b"\x7fELF\x02\x01" + bytes(100))
    struct.pack_into("<Q", far, 32, 2**64 - 1)  # where its headers are said to be
    struct.pack_into("<HH", far, 54, 56, 2)
    (tmp_path / "far.so").write_bytes(far)
    for name in ("not.so", "text.so", "far.so"):
        with pytest.raises(InputError, match="ELF"):
            needed_libraries(tmp_path / name)


def test_an_unknown_extra_is_refused() -> None:
    with pytest.raises(InputError, match="no extra 'steam'"):
        make_sbom(("steam",))


def test_what_wheels_bring_inside_is_listed_with_its_hash(bill: str) -> None:
    data = json.loads(bill)
    inside = {c["bom-ref"]: c for c in data["components"] if ".libs" not in c["name"]}
    wheel = distribution("opencv-python-headless")
    brought = [f for f in wheel.files or () if f.parts[0].endswith(".libs")]
    assert brought  # OpenSSL, FFmpeg and others
    for file in brought:
        component = inside[f"opencv-python-headless:{file.name}"]
        told = component["hashes"][0]["content"]
        assert told == hashlib.sha256(Path(str(file.locate())).read_bytes()).hexdigest()
    names = {c["name"] for c in data["components"]}
    assert {"libcrypto", "libssl", "libavcodec"} <= names


def test_a_bundle_is_listed_with_its_weights_and_graphs() -> None:
    bundle = Bundle.open("demo")
    text = make_sbom(("cpu",), bundles=("demo",))
    assert errors_of(text) is None
    (found,) = (c for c in json.loads(text)["components"] if c["type"] == "machine-learning-model")
    properties = {p["name"]: p["value"] for p in found["properties"]}
    assert properties["recallseg:identity"] == bundle.identity
    assert properties["recallseg:segmenter-digest"] == bundle.segmenter.digest
    path, variant = bundle.graph_file("attend", ("portable",), "fp32")
    told = properties[f"recallseg:graph-sha256:{variant}/fp32/attend"]
    assert told == hashlib.sha256(path.read_bytes()).hexdigest()
    for file in bundle.weights_files("attend", variant, "fp32"):
        told = properties[f"recallseg:weights-sha256:graphs/{file.name}"]
        assert told == hashlib.sha256(file.read_bytes()).hexdigest()
