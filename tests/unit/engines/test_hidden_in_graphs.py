"""Graphs that say one thing to who looks at them and another to the parser of the runtime.

Protocol Buffers' parsers pass over a field of another wire type than theirs, take the lower 32 bits
of a longer field number, and merge a message that comes twice. ONNX Runtime ran the first two of
these graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from recallseg.engines.errors import BundleError
from recallseg.engines.graph_check import check_graph

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
WIRE = {"varint": 0, "64 bits": 1, "length": 2, "32 bits": 5}


def varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def field(number: int, body: bytes, more: int = 0) -> bytes:
    return varint((number << 3 | WIRE["length"]) + more) + varint(len(body)) + body


def model(*parts: bytes) -> bytes:
    """Return a model whose graph has further parts."""
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [1])
    made = helper.make_model(
        helper.make_graph([], "g", [X], [Y], [condition]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    graph = made.graph.SerializeToString() + b"".join(parts)
    made.ClearField("graph")
    return made.SerializeToString() + field(7, graph)


def node(operator: str, inputs: tuple[str, ...] = ("x",), output: str = "y") -> bytes:
    return helper.make_node(operator, inputs, [output]).SerializeToString()


def branch() -> bytes:
    """Return a node that would run a graph inside of it."""
    made = []
    for name, operator in (("then", "Neg"), ("else", "Identity")):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
        made.append(helper.make_graph([helper.make_node(operator, ["x"], [name])], name, [], [out]))
    return helper.make_node(
        "If", ["c"], ["y"], then_branch=made[0], else_branch=made[1]
    ).SerializeToString()


def long_number() -> bytes:
    return model(field(1, branch(), 1 << 32))


def another_operator(wire: str, seen: bytes) -> Callable[[], bytes]:
    return lambda: model(field(1, node("Neg") + varint(4 << 3 | WIRE[wire]) + seen))


def another_domain() -> bytes:
    hidden = node("EPContext") + field(7, b"com.microsoft")
    return model(field(1, hidden + varint(4 << 3 | WIRE["64 bits"]) + b"BiasGelu"))


def merged_constant() -> bytes:
    part = field(5, TensorProto(data_type=1, dims=[4]).SerializeToString())
    attribute = onnx.AttributeProto(name="value", type=4).SerializeToString() + part * 16
    constant = helper.make_node("Constant", [], ["w"]).SerializeToString()
    return model(field(1, constant + field(5, attribute)), field(1, node("Add", ("x", "w"))))


def second_operator() -> bytes:
    return model(field(1, node("Loop") + field(4, b"Neg")))


def second_type() -> bytes:
    tensor = TensorProto(name="w", dims=[2]).SerializeToString()
    tensor += varint(2 << 3) + varint((1 << 32) + 1) + field(9, bytes(8))
    return model(field(5, tensor), field(1, node("Add", ("x", "w"))))


def sparse_without_bound() -> bytes:
    sparse = onnx.SparseTensorProto(dims=[2**15, 2**12])
    sparse.values.CopyFrom(helper.make_tensor("s", 1, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("i", 7, [1], [0]))
    return model(field(15, sparse.SerializeToString()), field(1, node("Neg")))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (long_number, "number no message has"),
        (another_operator("32 bits", b"Relu"), "field 4 of another type"),
        (another_operator("64 bits", b"BiasGelu"), "field 4 of another type"),
        (another_operator("varint", b"\x01"), "field 4 of another type"),
        (another_domain, "field 4 of another type"),
        (merged_constant, "field 5 twice"),
        (second_operator, "field 4 twice"),
        (second_type, "a constant of the type 4294967297"),
        (sparse_without_bound, r"constant of \[32768, 4096\]"),
        (lambda: model(field(1, branch())), "operator 'If'"),
    ],
)
def test_what_is_looked_at_is_what_a_parser_sees(
    tmp_path: Path, make: Callable[[], bytes], match: str
) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(make())
    with pytest.raises(BundleError, match=match):
        check_graph(path)


@pytest.mark.parametrize("make", [long_number, another_operator("32 bits", b"Relu")])
def test_the_runtime_would_have_run_what_was_hidden(
    tmp_path: Path, make: Callable[[], bytes]
) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(make())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"x": np.array([1, 2], np.float32)})
    assert found.tolist() == [-1, -2]  # of Neg, which was not looked at
    path.write_bytes(model(field(1, node("Neg"))))
    check_graph(path)
