from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fake_bundle import make_fake_bundle

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle").path


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_bundle_says_what_it_is(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.precisions == {"portable": ("fp32",)}
    assert "RANDOM" in bundle.notice
    assert bundle.identity[:12] in repr(bundle)


def test_graph_files_are_found_in_the_order_of_variants(folder: Path) -> None:
    path, variant = Bundle.open(folder).graph_file("attend", ("ort-cpu", "portable"), "fp32")
    assert (path.name, variant) == ("attend.onnx", "portable")


def test_a_missing_precision_names_what_there_is(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"portable.*fp32"):
        Bundle.open(folder).graph_file("attend", ("portable",), "int8")


def test_a_changed_graph_file_is_refused(folder: Path) -> None:
    bundle = Bundle.open(folder)
    path = folder / "graphs" / "portable" / "fp32" / "attend.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="changed or damaged"):
        bundle.graph_file("attend", ("portable",), "fp32")


def test_changed_external_weights_are_refused(folder: Path) -> None:
    data = folder / "graphs" / "attend.onnx.data"
    data.write_bytes(b"weights")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["graphs"]["portable/fp32/attend"]
    entry["data"] = {"file": "graphs/attend.onnx.data", "sha256": "0" * 64}
    rewrite(folder, graphs=manifest["graphs"])
    with pytest.raises(BundleError, match=r"attend\.onnx\.data was changed"):
        Bundle.open(folder).graph_file("attend", ("portable",), "fp32")


def test_a_manifest_cannot_name_files_outside_the_bundle(folder: Path) -> None:
    rewrite(folder, golden={"file": "../../secret", "sha256": "0" * 64})
    with pytest.raises(BundleError, match="outside"):
        _ = Bundle.open(folder).golden_file


def test_the_identity_covers_geometry_and_memory_semantics(folder: Path) -> None:
    for changes in (
        {"memory": {"object_pointers": True, "pointer_time": 0.5}},
        {"geometry": {**Bundle.open(folder).geometry.to_json(), "embed_size": 42}},
    ):
        before = (folder / "manifest.json").read_text()
        rewrite(folder, **changes)
        with pytest.raises(BundleError, match="was changed"):
            Bundle.open(folder)
        (folder / "manifest.json").write_text(before)


def test_the_identity_leaves_out_what_does_not_matter(folder: Path) -> None:
    bundle = Bundle.open(folder)
    rewrite(folder, geometry={**bundle.geometry.to_json(), "max_k": 5}, name="other")
    assert Bundle.open(folder).identity == bundle.identity


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "not the manifest"),
        (b'{"format": "other"}', "not the manifest"),
        (b'{"format": "recallseg-bundle", "version": 99}', "version 99"),
        (b'{"format": "recallseg-bundle", "version": 1}', "incomplete"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path)


def test_no_bundle_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="recallseg export"):
        Bundle.open(tmp_path / "nothing")
