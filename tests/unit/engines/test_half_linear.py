"""The operator for CUDA, in ONNX Runtime, with a stand-in for cuBLASLt on the CPU.

In processes of their own: which provider an operator is for is settled when the first session of a
process is told of the library.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support.native import passed

from recallseg.engines.graph_check import OPERATORS
from recallseg.engines.operators import DOMAIN, HALF_LINEAR
from recallseg.export.native import use_half_linear

SOURCE = Path(__file__).parents[2] / "support" / "cublaslt_stand_in.cpp"

PROGRAM = """
import ctypes, sys
import numpy as np
import onnxruntime
library, stand_in, model, feeds, out = sys.argv[1:]
operators = ctypes.CDLL(library)
if stand_in:
    operators.recallseg_operators_stand_in(stand_in.encode())
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
inputs = np.load(feeds)
np.savez(out, *[session.run(None, {"x": inputs[key]})[0] for key in inputs.files])
if stand_in:
    del session
    assert ctypes.CDLL(stand_in).stand_in_handles() == 0
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    file = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    passed("c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
           "-o", file, SOURCE)  # fmt: skip
    return file


def layers(columns: int = 24) -> ModelProto:
    """A product with GELU, one with a sum and ReLU, one with a bias, and one with nothing."""
    rng = np.random.default_rng(0)

    def half(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.normal(size=shape) / 4).astype(np.float16), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["p0"]),
        helper.make_node("BiasGelu", ["p0", "b0"], ["h0"], domain="com.microsoft"),
        helper.make_node("MatMul", ["h0", "w1"], ["p1"]),
        helper.make_node("Add", ["b1", "p1"], ["s1"]),
        helper.make_node("Relu", ["s1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["p2"]),
        helper.make_node("Add", ["p2", "b2"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w3"], ["y"]),
    ]
    weights = [half("w0", 16, columns), half("b0", columns), half("w1", columns, 40),
               half("b1", 40), half("w2", 40, 8), half("b2", 8), half("w3", 8, 8)]  # fmt: skip
    kind = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", kind, ["n", "t", 16])],
        [helper.make_tensor_value_info("y", kind, ["n", "t", 8])],
        weights,
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=9)


def run(
    library: Path, stand_in: Path | str, model: ModelProto, folder: Path, *inputs: np.ndarray
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "in.npz", *inputs)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), str(stand_in), str(folder / "model.onnx"),
         str(folder / "in.npz"), str(folder / "out.npz")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_computes_what_the_nodes_computed(
    operators_file: Path, stand_in: Path, tmp_path: Path
) -> None:
    plain = layers()
    fused = use_half_linear(plain)
    found = [(node.domain, node.op_type) for node in fused.graph.node]
    assert found == [(DOMAIN, HALF_LINEAR)] * 3 + [("", "MatMul")]
    assert HALF_LINEAR in OPERATORS[DOMAIN]  # a bundle may have it
    assert [node.op_type for node in plain.graph.node][:2] == ["MatMul", "BiasGelu"]
    rng = np.random.default_rng(1)
    # The second size is another plan of the same node, the third the first again.
    inputs = [rng.normal(size=shape).astype(np.float16) for shape in ((2, 3, 16), (1, 9, 16))]
    inputs += [inputs[0], inputs[0][:0]]
    done = run(operators_file, stand_in, fused, tmp_path, *inputs)
    assert done.returncode == 0, done.stderr
    weights = {t.name: numpy_helper.to_array(t).astype(float) for t in plain.graph.initializer}
    results = np.load(tmp_path / "out.npz")
    for x, y in zip(inputs, (results[key] for key in results.files), strict=True):
        h = x.astype(float) @ weights["w0"] + weights["b0"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        h = np.maximum(h @ weights["w1"] + weights["b1"], 0)
        expected = (h @ weights["w2"] + weights["b2"]) @ weights["w3"]
        assert y.shape == expected.shape
        assert np.abs(y - expected).max(initial=0) < 4e-3 * np.abs(expected).max(initial=1)


def test_it_says_what_it_cannot_do(operators_file: Path, stand_in: Path, tmp_path: Path) -> None:
    x = np.ones((1, 2, 16), np.float16)
    refused = run(operators_file, stand_in, use_half_linear(layers(13)), tmp_path / "a", x)
    assert "cuBLASLt has no product of 2x16 and 16x13 with a bias" in refused.stderr
    missing = run(
        operators_file, tmp_path / "none.so", use_half_linear(layers()), tmp_path / "b", x
    )
    assert "libcublasLt.so.13 nor libcublasLt.so.12 can be opened" in missing.stderr
    # Without the stand-in it is an operator of CUDA's provider, which is not here.
    elsewhere = run(operators_file, "", use_half_linear(layers()), tmp_path / "c", x)
    assert elsewhere.returncode != 0
    assert "HalfLinear" in elsewhere.stderr
