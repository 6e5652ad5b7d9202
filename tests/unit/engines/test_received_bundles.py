"""Bundles as a stranger could have made them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import BundleError
from recallseg.engines.golden import GoldenTensors
from recallseg.engines.graph_check import check_graph
from recallseg.engines.paths import SHIPPED

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])


@pytest.fixture
def folder(tmp_path: Path, fake_bundle: Bundle) -> Path:
    return Path(shutil.copytree(fake_bundle.path, tmp_path / "bundle"))


def model(*nodes: onnx.NodeProto, constants: tuple[onnx.TensorProto, ...] = ()) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [X], [Y], list(constants)))


def external(location: str, **entries: str) -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model(helper.make_node("Add", ["x", "w"], ["y"]), constants=(tensor,))


def in_attribute() -> onnx.ModelProto:
    found = external("/etc/passwd")
    constant = helper.make_node("Constant", [], ["w"], value=found.graph.initializer[0])
    return model(constant, helper.make_node("Add", ["x", "w"], ["y"]))


def sparse() -> onnx.ModelProto:
    made = model(helper.make_node("Identity", ["x"], ["y"]))
    made.graph.sparse_initializer.add().values.CopyFrom(
        external("../../secret").graph.initializer[0]
    )
    return made


def loop() -> onnx.ModelProto:
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    step = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    kept = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "b", [step, condition], [kept]
    )
    return model(
        helper.make_node("Loop", ["", "x"], [], body=body),
        helper.make_node("Identity", ["x"], ["y"]),
    )


def hidden_graph() -> onnx.ModelProto:
    made = model(helper.make_node("Identity", ["x"], ["y"]))
    attribute = made.graph.node[0].attribute.add()
    attribute.name, attribute.type = "body", onnx.AttributeProto.GRAPH
    attribute.g.name = "inside"
    return made


def functions() -> onnx.ModelProto:
    made = model(helper.make_node("Identity", ["x"], ["y"]))
    made.functions.add().name = "twice"
    return made


def circular() -> onnx.ModelProto:
    return model(
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    )


def made_twice() -> onnx.ModelProto:
    return model(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"]))


def enormous() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**20, 2**20])
    return model(helper.make_node("Add", ["x", "w"], ["y"]), constants=(tensor,))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: external("/etc/passwd"), "weights in the file '/etc/passwd'; the manifest none"),
        (lambda: external("../../secret"), "weights in the file '../../secret'"),
        (lambda: external("*/_ORT_MEM_ADDR_/*", offset="4096", length="8"), "_ORT_MEM_ADDR_"),
        (in_attribute, "weights in the file '/etc/passwd'"),
        (sparse, "weights in the file '../../secret'"),
        (loop, "operator 'Loop'"),
        (hidden_graph, "graph inside of an operator Identity"),
        (functions, "functions"),
        (circular, "goes in circles"),
        (made_twice, "makes 'y' twice"),
        (enormous, r"constant of \[1048576, 1048576\]"),
        (
            lambda: model(helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")),
            "operator 'com.microsoft::EPContext'",
        ),
        (lambda: model(helper.make_node("ImageDecoder", ["x"], ["y"])), "ImageDecoder"),
        (lambda: model(helper.make_node("Add", ["x", "x"], ["y"], domain="evil")), "evil::Add"),
    ],
)  # fmt: skip
def test_a_graph_is_a_network_of_tensors(
    folder: Path, make: Callable[[], onnx.ModelProto], match: str
) -> None:
    file = folder / "graphs/portable/fp32/attend.onnx"
    file.write_bytes(make().SerializeToString())
    rewrite(folder, "graphs/portable\\/fp32\\/attend/sha256", digest_file(file))
    with pytest.raises(BundleError, match=match):
        Bundle.open(folder).graph_file("attend", ("portable",), "fp32")


def test_a_graph_is_an_onnx_file(folder: Path) -> None:
    """By another name ONNX Runtime takes a file for a graph in its own format, which none reads."""
    (folder / "graphs/portable/fp32/attend.onnx").rename(folder / "graphs/portable/fp32/attend.ort")
    rewrite(folder, "graphs/portable\\/fp32\\/attend/file", "graphs/portable/fp32/attend.ort")
    with pytest.raises(BundleError, match=r"attend\.ort' is no \.onnx file"):
        Bundle.open(folder)


def test_weights_may_lie_in_the_one_file_beside_the_graph(tmp_path: Path) -> None:
    data = tmp_path / "g.onnx.data"
    data.write_bytes(bytes(16))
    graph = tmp_path / "g.onnx"
    onnx.save(external("g.onnx.data", offset="8", length="8"), graph)
    check_graph(graph, [data])
    for entries in ({"offset": "8", "length": "16"}, {"offset": "-1"}, {"length": "x"}):
        onnx.save(external("g.onnx.data", **entries), graph)
        with pytest.raises(BundleError, match="beyond the end"):
            check_graph(graph, [data])
    for location in ("./g.onnx.data", str(data), "other"):
        onnx.save(external(location), graph)
        with pytest.raises(BundleError, match=r"the manifest only 'g\.onnx\.data'"):
            check_graph(graph, [data])
    twice = external("g.onnx.data", length="8")
    for name in "abc":
        twice.graph.initializer.add().CopyFrom(twice.graph.initializer[0])
        twice.graph.initializer[-1].name = name
    onnx.save(twice, graph)
    with pytest.raises(BundleError, match="more weights than the files beside it hold"):
        check_graph(graph, [data])
    elsewhere = tmp_path / "in" / "g.onnx.data"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(bytes(16))
    with pytest.raises(BundleError, match="must lie beside"):
        check_graph(graph, [elsewhere])


def test_every_shipped_graph_passes() -> None:
    bundle = Bundle.open("demo")
    assert len([*SHIPPED.rglob("*.onnx")]) > 9
    bundle.check_files()


def test_a_damaged_graph_is_refused_or_read(tmp_path: Path) -> None:
    graph, _ = Bundle.open("demo").graph_file("decode", ("portable",), "fp32")
    whole = graph.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole[: 1 + int(rng.integers(len(whole)))])
        for at in rng.integers(0, len(data), 20):
            data[at] = rng.integers(256)
        (tmp_path / "x.onnx").write_bytes(data)
        try:
            check_graph(tmp_path / "x.onnx")
        except BundleError:
            refused += 1
    assert refused > 100
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="empty"):
        check_graph(tmp_path / "x.onnx")


def test_no_file_of_a_bundle_is_a_link(folder: Path, tmp_path: Path) -> None:
    for name in (
        "manifest.json",
        "golden/golden.npz",
        "graphs/portable/fp32/attend.onnx",
        "graphs",
    ):
        moved = (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(moved)
        with pytest.raises(BundleError, match="link"):
            use(folder)
        (folder / name).unlink()
        if moved.is_file():
            os.mkfifo(folder / name)
            with pytest.raises(BundleError, match="not a file"):
                use(folder)
            (folder / name).unlink()
        moved.rename(folder / name)
    use(folder)


def test_golden_tensors_do_not_unpack_without_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = io.BytesIO()
    np.savez_compressed(archive, images=np.zeros((2**14, 2**14), np.uint8))
    (folder / "golden/golden.npz").write_bytes(archive.getvalue())
    rewrite(folder, "golden/sha256", digest_file(folder / "golden/golden.npz"))
    monkeypatch.setenv("RECALLSEG_MAX_BYTES", "1M")
    with pytest.raises(BundleError, match=r"unpacks to 26843.* bytes.*RECALLSEG_MAX_BYTES"):
        use(folder)


def test_a_folder_does_not_stand_for_a_shipped_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert Bundle.open("demo").path == SHIPPED / "demo"
    shutil.copytree(folder, tmp_path / "demo", dirs_exist_ok=True)
    with pytest.raises(BundleError, match=r"Say which: '\./demo'"):
        Bundle.open("demo")
    assert Bundle.open("./demo").path == Path("demo")
    assert Bundle.open(SHIPPED / "demo").name == "demo"


STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "../..", "/etc/passwd", [], {}),
    *([[]], {"file": 1}, [None] * 3, "x" * 100_000, "\x1b[2J", "\0"),
)


def test_a_malformed_manifest_is_never_our_defect(folder: Path) -> None:
    whole = json.loads((folder / "manifest.json").read_text())
    tried = 0
    for path in places(whole):
        for value in (*STRANGE, ...):
            changed = copy.deepcopy(whole)
            place(changed, path, value)
            (folder / "manifest.json").write_text(json.dumps(changed))
            tried += 1
            with contextlib.suppress(BundleError):
                use(folder)
    assert tried > 1000
    for text in ("[" * 100_000, "\xff", "", "[]", "null", '{"format": 1}'):
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(BundleError):
            use(folder)


def use(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.notice is not None
    assert repr(bundle)
    assert bundle.precisions is not None
    for graph in bundle.specs:
        bundle.graph_file(graph, ("portable",), "fp32")
    GoldenTensors.load(bundle.golden_file)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, inner in inside:
        if not isinstance(key, int) or key < 2:
            yield from places(inner, (*path, key))


def place(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    if new is ...:
        del value[path[-1]]
    else:
        value[path[-1]] = new


def rewrite(folder: Path, at: str, value: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = at.replace("\\/", "\0").split("/")
    place(manifest, tuple(key.replace("\0", "/") for key in keys), value)
    (folder / "manifest.json").write_text(json.dumps(manifest))
