"""Weights that graphs share are stored once, and nothing else of a bundle changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.former_bundle import write_former

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.digest import digest_file
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import BundleError
from recallseg.engines.golden import GoldenTensors, run_case
from recallseg.engines.registry import load_engines
from recallseg.export import converting
from recallseg.export.converting import convert_bundle
from recallseg.export.sharing import share_weights


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_former(Bundle.open("demo"), tmp_path_factory.mktemp("former") / "demo")


@pytest.fixture(scope="module")
def shared(former: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert_bundle(former, tmp_path_factory.mktemp("shared") / "demo", ())


@pytest.fixture
def copy(shared: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(shared.path, tmp_path / "copy"))


def size(bundle: Bundle) -> int:
    return sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())


def digests(bundle: Bundle) -> dict[str, str]:
    return {
        f"{variant}/{precision}/{graph}": bundle.graph_digest(graph, variant, precision)
        for variant, precision, graph in (key.split("/") for key in bundle.manifest["graphs"])
    }


def results(bundle: Bundle, variants: tuple[str, ...], precision: str) -> dict[str, Any]:
    engines = load_engines(
        bundle,
        "onnxruntime-cpu",
        precision,
        options=EngineOptions(threads=1),
        graphs=bundle.graphs_for(variants, precision),
        variants=variants,
    )
    case = GoldenTensors.load(bundle.golden_file).case
    composition = Composition(engines)
    return run_case(case, composition, bundle.geometry, bundle.normalisation, bundle.memory)


@pytest.mark.parametrize(
    ("variants", "precision"),
    [
        (("portable",), "fp32"),
        (("ort-cpu", "portable"), "fp32"),
        (("ort-cpu", "portable"), "int8"),
    ],
)
def test_results_are_the_same_bit_for_bit(
    former: Bundle, shared: Bundle, variants: tuple[str, ...], precision: str
) -> None:
    before = results(former, variants, precision)
    after = results(shared, variants, precision)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, name, strict=True)


def test_what_several_graphs_have_is_stored_once(former: Bundle, shared: Bundle) -> None:
    assert size(shared) < 0.65 * size(former)
    assert shared.identity == former.identity
    assert shared.precisions == former.precisions
    assert (former.manifest["version"], shared.manifest["version"]) == (2, 3)
    shared.check_files()
    former.check_files()
    for file in {str(entry["file"]) for entry in shared.manifest["graphs"].values()}:
        before = next(k for k, e in shared.manifest["graphs"].items() if e["file"] == file)
        whole = onnx.load(former.path / former.manifest["graphs"][before]["file"])
        found = onnx.load(shared.path / file)
        for one, other in zip(whole.graph.initializer, found.graph.initializer, strict=True):
            left, right = numpy_helper.to_array(one), numpy_helper.to_array(other)
            assert (one.name, left.dtype, left.shape) == (other.name, right.dtype, right.shape)
            assert left.tobytes() == right.tobytes()
        del whole.graph.initializer[:], found.graph.initializer[:]
        assert whole == found  # of everything else nothing changed
    assert not [p for p in (shared.path / "graphs").iterdir() if p.suffix == ".new" or p.is_dir()]


def test_every_file_beside_the_graphs_is_in_the_manifest(shared: Bundle) -> None:
    stated = {
        str(file["file"])
        for entry in shared.manifest["graphs"].values()
        for file in (entry, *entry["data"])
    }
    found = {p.relative_to(shared.path).as_posix() for p in (shared.path / "graphs").iterdir()}
    assert stated == found


def test_graphs_that_are_stored_so_stay_as_they_are(
    shared: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = convert_bundle(shared, tmp_path / "again", ())
    assert again.manifest == shared.manifest
    monkeypatch.setattr(converting, "convert_graph", lambda model, precision, graph: model)
    made = convert_bundle(shared, tmp_path / "more", ["bf16"])
    assert digests(shared).items() <= digests(made).items()
    assert made.precisions["portable"] == ("fp32", "bf16")
    added = size(made) - size(shared)
    assert 0 < added < 2_000_000  # graphs, and no weights: these are the ones of fp32
    weights = {p.name for p in (made.path / "graphs").glob("*.weights")}
    assert weights == {p.name for p in (shared.path / "graphs").glob("*.weights")}


def users(bundle: Bundle, file: str) -> list[str]:
    return [
        key
        for key, entry in bundle.manifest["graphs"].items()
        if any(data["file"] == file for data in entry["data"])
    ]


def most_shared(bundle: Bundle) -> tuple[str, list[str]]:
    """Return the file that most graphs have, and these."""
    files = {d["file"] for entry in bundle.manifest["graphs"].values() for d in entry["data"]}
    return max(((file, users(bundle, file)) for file in sorted(files)), key=lambda f: len(f[1]))


def test_a_changed_file_of_weights_is_refused_for_each_graph_that_has_it(copy: Bundle) -> None:
    file, having = most_shared(copy)
    assert len(having) > 2
    content = bytearray((copy.path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy.path / file).write_bytes(content)
    for key in copy.manifest["graphs"]:
        variant, precision, graph = key.split("/")
        if key in having:
            with pytest.raises(BundleError, match=rf"{file} was changed or damaged"):
                copy.graph_file(graph, (variant,), precision)
        else:
            copy.graph_file(graph, (variant,), precision)
    with pytest.raises(BundleError, match="changed or damaged"):
        copy.check_files()
    # Who changes the manifest too has another graph: results, plans and verdicts tell them apart.
    before = digests(copy)
    manifest = json.loads((copy.path / "manifest.json").read_text())
    for entry in manifest["graphs"].values():
        for data in entry["data"]:
            if data["file"] == file:
                data["sha256"] = digest_file(copy.path / file)
    (copy.path / "manifest.json").write_text(json.dumps(manifest))
    after = digests(Bundle.open(copy.path))
    assert {key for key in before if before[key] != after[key]} == {*having}


def lose(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "match"), [(lose, "lacks graphs/"), (link, "it is a link"), (cut, "was changed")]
)
def test_weights_that_are_not_there_as_they_were_are_refused(
    copy: Bundle, harm: Callable[[Path], None], match: str
) -> None:
    file, having = most_shared(copy)
    harm(copy.path / file)
    variant, precision, graph = having[0].split("/")
    with pytest.raises(BundleError, match=match):
        load_engines(copy, "onnxruntime-cpu", precision, graphs=(graph,), variants=(variant,))


def test_graphs_may_only_name_files_of_their_own_entry(copy: Bundle) -> None:
    key = "portable/fp32/embed"
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["graphs"][key]["data"].pop()
    (copy.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"asks for weights in the file '\w+\.weights'"):
        Bundle.open(copy.path).graph_file("embed", ("portable",), "fp32")


@pytest.mark.parametrize(
    "data",
    [
        "graphs/x.weights",
        [["graphs/x.weights"]],
        [{"file": "x", "sha256": "0"}],
        [{"file": "x", "sha256": "0" * 64, "data": {"file": "y", "sha256": "0" * 64}}],
        7,
    ],
)
def test_a_manifest_with_other_weights_than_files_is_refused(copy: Bundle, data: object) -> None:
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["graphs"]["portable/fp32/embed"]["data"] = data
    (copy.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="unusable 'graphs'"):
        Bundle.open(copy.path)


def test_only_a_bundle_that_is_what_it_says_is_stored_anew(former: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(former.path, tmp_path / "copy"))
    outside = tmp_path / "mine.onnx"
    outside.write_bytes(b"mine")
    entry = bundle.manifest["graphs"]["ort-cpu/int8/decode"]
    entry.update(file="../mine.onnx", sha256=digest_file(outside))
    with pytest.raises(BundleError, match="outside"):
        convert_bundle(bundle, tmp_path / "out", ())
    assert outside.read_bytes() == b"mine"
    assert not (tmp_path / "out").exists()


def test_equal_constants_of_one_graph_have_bytes_of_their_own(tmp_path: Path) -> None:
    """Or a graph would declare more weights than its files hold, which is refused."""
    (tmp_path / "graphs").mkdir()
    value = np.arange(2**15, dtype=np.float32)
    tensors = [numpy_helper.from_array(value, name) for name in ("a", "b")]
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "graphs/old.onnx")
    graphs: dict[str, Any] = {"portable/fp32/embed": {"file": "graphs/old.onnx", "sha256": ""}}
    share_weights(tmp_path, graphs)
    (data,) = graphs["portable/fp32/embed"]["data"]
    assert data["bytes"] == 2 * value.nbytes
    found = onnx.load(tmp_path / graphs["portable/fp32/embed"]["file"])
    for tensor in found.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), value)
