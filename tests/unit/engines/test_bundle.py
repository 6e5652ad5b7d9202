from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.correct_graph import write_correct
from support.fake_bundle import fake_geometry, make_fake_bundle

from recallseg import Library, Segmenter
from recallseg.engines.budget import memory_budget
from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import BundleError, EngineRunError
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import verify_engines


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


@pytest.mark.parametrize(
    ("precision", "command"),
    [
        ("fp16", "recallseg convert {} --precisions fp16 --output FOLDER"),
        ("int8-pooled", "recallseg convert {} --precisions int8-pooled --output FOLDER"),
        ("pooled", "recallseg export ... --pooled"),
        ("fp32", "recallseg export ... --variants tensorrt"),
    ],
)
def test_a_precision_that_is_missing_is_told_with_the_command_that_makes_it(
    folder: Path, precision: str, command: str
) -> None:
    with pytest.raises(BundleError, match=r"it has .*portable: fp32") as caught:
        Bundle.open(folder).graph_file("attend", ("tensorrt",), precision)
    assert command.format(folder) in str(caught.value)


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
        {"no_memory": [0.25] * 8},
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
        (
            b'{"format": "recallseg-bundle", "version": 4, "weights": {"segmenter": '
            b'{"architecture": "newtam"}, "embedder": {"architecture": "dinov9"}}}',
            r"\(of newtam, dinov9\) has format version 4",
        ),
        (b'{"format": "recallseg-bundle", "version": [2]}', r"version \[2\]"),
        (b'{"format": "recallseg-bundle", "version": true}', "version True"),
        (b'{"format": "recallseg-bundle", "version": 1}', "incomplete"),
        (b'{"format": "recallseg-bundle", "version": 2}', "incomplete"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path)


def test_no_bundle_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="recallseg export"):
        Bundle.open(tmp_path / "nothing")


def test_former_identities_are_known_and_others_are_not(tmp_path: Path) -> None:
    older = make_fake_bundle(tmp_path / "older", weights_digest="1" * 64)
    pairs = [("1" * 64, "1" * 64), ("1" * 64, "4" * 64)]
    bundle = make_fake_bundle(tmp_path / "heir", weights_digest="2" * 64, former=pairs)
    assert len(set(bundle.former_identities)) == 2
    assert bundle.known_as(bundle.identity)
    assert all(bundle.known_as(identity) for identity in bundle.former_identities)
    assert not bundle.known_as(older.identity)  # of format 2, so it never was a former one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_memory": [0.5] * 7}, "was changed"),
        ({"no_memory": [0.5] * 7 + [float("nan")]}, "no_memory is not a number"),
        ({"no_memory": None}, "incomplete"),
        ({"former_identities": None}, "incomplete"),
        ({"former_identities": [{"identity": "0" * 64}]}, "incomplete"),
        (
            {"former_identities": [{"identity": "0" * 64, "segmenter": "", "embedder": ""}]},
            "former identity 000000000000",
        ),
    ],
)
def test_a_tampered_manifest_is_refused(folder: Path, changes: Any, words: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(BundleError, match=words):
        Bundle.open(folder)


def test_a_bundle_without_an_optional_graph_says_so(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.optional_graphs == ()
    assert "correct" not in bundle.specs
    with pytest.raises(BundleError, match=r"without the graph 'correct', which is optional"):
        bundle.graph_file("correct", ("portable",), "fp32")
    with pytest.raises(BundleError, match=r"no graph 'mend'.*embed.*correct"):
        bundle.graph_file("mend", ("portable",), "fp32")


def test_an_optional_graph_runs_like_any_other(folder: Path) -> None:
    """``correct`` is here a graph that only tells its inputs apart; its tensors are the real."""
    path = folder / "graphs" / "portable" / "fp32" / "correct.onnx"
    write_correct(path, fake_geometry())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"file": "graphs/portable/fp32/correct.onnx", "sha256": digest_file(path)}
    rewrite(folder, graphs={**manifest["graphs"], "portable/fp32/correct": entry})
    bundle = Bundle.open(folder)
    assert bundle.optional_graphs == ("correct",)
    assert bundle.identity == manifest["identity"]
    engine = load_engines(bundle, "onnxruntime-cpu", graphs=("correct",))["correct"]
    for points in (1, 3):
        inputs = {t.name: np.zeros(t.resolve(p=points), t.dtype) for t in engine.spec.inputs}
        inputs["points"][:] = 2.5
        inputs["point_labels"][:] = 3
        inputs["prior"][:] = 7
        for has_prior in (False, True):
            inputs["has_prior"][:] = has_prior
            outputs = engine.allocate_outputs(p=points)
            engine.run(inputs, outputs)
            assert np.array_equal(outputs["logits"], inputs["prior"][0] * has_prior)
            assert outputs["iou"] == 5 * points
            assert outputs["object_score"] == 3 * points
    with pytest.raises(EngineRunError, match=r"'point_labels' must be int32"):
        engine.run({**inputs, "point_labels": inputs["point_labels"].astype(np.int64)}, outputs)


def test_memories_of_another_size_go_through_everything(tmp_path: Path) -> None:
    """As EdgeTAM's: fewer tokens than places, some of them without a place."""
    bundle = make_fake_bundle(tmp_path / "bundle", tokens=6, memory_grid=(2, 2))
    y, x = np.mgrid[:64, :64]
    mask = (y < 32) & (x >= 0)
    with Library.create(tmp_path / "library", bundle, engine="fake") as library:
        library.add(np.where(mask, 200, 20).astype(np.uint8), {"top": mask}, key="one")
        memories = np.zeros((1, 6, 4), np.float32)
        library.gather(library.memories(["one"], "top"), memories, np.zeros((1, 8), np.float32))
        assert 0 < memories.mean() < 1
        result = Segmenter(library, k=1, engine="fake").segment(
            np.where(mask, 200, 20).astype(np.uint8)
        )
    assert result.masks["top"][:16].all()
    assert not result.masks["top"][-16:].any()
    assert verify_engines(bundle, load_engines(bundle, "fake"), "fp32").passed


def test_a_budget_follows_the_manifests_tokens(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", tokens=6, memory_grid=(2, 2))
    small, large = (memory_budget(bundle, k=1, n=1, image_size=size) for size in (64, 128))
    assert small.exemplar == large.exemplar == 6 * 4 * 4
    assert large.scores == 4 * small.scores
