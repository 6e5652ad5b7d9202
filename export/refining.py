"""The graph of a head: filters of the image and of logits, units, and the mix; the same for all.

``python -m recallseg.export.refining`` writes ``engines/heads/filters.onnx``, ``refine.onnx`` and
``refine-native.onnx``, the second one as an operator of our own (``engines/native/operators``).
What a head has learnt comes in as inputs, so that the graph is part of RecallSeg, and the head is
data of a library. The first graph makes the numbers that a head is fitted on, the second makes them
by the same nodes and goes on to logits. Filters are those that pixel classifiers use (Arganda-
Carreras et al., Trainable Weka Segmentation, Bioinformatics 2017; Berg et al., ilastik, Nature
Methods 2019): Gaussian, gradient magnitude and eigenvalues of the Hessian, at scales of 1, 2, 4, 8
and 16 pixels by a pyramid; of colour, its smoothed opponents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recallseg.engines.heads import FILTERS, HEADS, REFINE, REFINE_NATIVE, SCALES
from recallseg.engines.operators import DOMAIN

__all__ = ["build", "build_native", "main"]

OPSET, IR_VERSION = 18, 9
RADIUS = 2
COLOUR_SCALES = 3
LOGITS = ("logits", "around")
BAND = 2 ** (SCALES - 1)
"""Rows that go through the units at a time; the padded height is a multiple of it."""


class _Graph:
    """Nodes as they are put together."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def split(self, value: str, outputs: list[str], sizes: str) -> None:
        self.nodes.append(helper.make_node("Split", [value, sizes], outputs, axis=1))

    def model(self, name: str, inputs: list[Any], outputs: list[Any]) -> Any:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self.nodes):
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        made = helper.make_model(graph, opset_imports=opsets, producer_name="recallseg")
        made.ir_version = IR_VERSION
        onnx.checker.check_model(made, full_check=True)
        return made


def derivatives() -> NDArray[np.float32]:
    """Return correlation kernels 6x5x5 at a scale of 1: smoothed, dx, dy, dxx, dyy, dxy.

    Exact for images that are polynomials of the second degree, so that scales can be compared.
    """
    at = np.arange(-RADIUS, RADIUS + 1, dtype=np.float64)
    smooth = np.exp(-at * at / 2)
    smooth /= smooth.sum()
    first = at * smooth
    first /= (at * first).sum()
    second = (at * at - 1) * smooth
    second -= second.mean()
    second *= 2 / (at * at * second).sum()
    pairs = [
        (smooth, smooth),
        (smooth, first),
        (first, smooth),
        (smooth, second),
        (second, smooth),
        (first, first),
    ]
    return np.stack([np.outer(rows, columns) for rows, columns in pairs]).astype(np.float32)


def build(units: bool) -> Any:
    """Return the graph: up to the filters, or with units and mix."""
    g = _Graph()
    side = 2 ** (SCALES - 1)
    g.op("Shape", ["image"], "size", start=2, end=4)
    g.constant("side", np.array([side, side], np.int64))
    g.constant("before", np.zeros(6, np.int64))
    g.op("Mod", ["size", "side"], "over")
    g.op("Sub", ["side", "over"], "short")
    g.op("Mod", ["short", "side"], "added")
    g.op("Concat", ["before", "added"], "pads", axis=0)
    g.op("Pad", ["image", "pads"], "padded", mode="edge")
    opponents = np.array([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [0.5, 0.5, -1]], np.float32)
    g.op("Conv", ["padded", g.constant("opponents", opponents[:, :, None, None])], "channels")
    g.split("channels", ["grey0", "colour0"], g.constant("one_two", np.array([1, 2], np.int64)))
    found = ["grey0", *_filters(g), *_colours(g), *_logits(g)]
    last = g.op("Concat", found, "features" if not units else "filtered", axis=1)
    if not units:
        out = helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, "F", "Hp", "Wp"])
        return g.model("filters", _seen(), [out])
    _units(g, last)
    g.op("Sub", ["own", "logits_padded"], "apart")
    g.op("Mul", ["apart", "mix"], "share")
    g.op("Add", ["logits_padded", "share"], "mixed")
    g.constant("axes", np.array([2, 3], np.int64))
    g.constant("start", np.zeros(2, np.int64))
    g.op("Slice", ["mixed", "start", "size", "axes"], "refined")
    return g.model("refine", *_tensors())


def build_native() -> Any:
    """Return the graph with units and mix as one operator."""
    g = _Graph()
    inputs, outputs = _tensors()
    g.op("Refine", [one.name for one in inputs], "refined", domain=DOMAIN)
    return g.model("refine", inputs, outputs)


def _seen() -> list[Any]:
    shapes: dict[str, list[Any]] = {
        "image": [1, 3, "H", "W"],
        "logits": [1, "n", "H", "W"],
        "around": [1, "m", "H", "W"],
    }
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]


def _tensors() -> tuple[list[Any], list[Any]]:
    """Return the inputs of the graph with units, and its output."""
    tensor, inputs = helper.make_tensor_value_info, _seen()
    for layer, (rows, columns) in enumerate((("u", "F"), ("v", "u"), ("n", "v")), 1):
        inputs.append(tensor(f"weights{layer}", TensorProto.FLOAT, [rows, columns, 1, 1]))
        inputs.append(tensor(f"biases{layer}", TensorProto.FLOAT, [rows]))
    inputs.append(tensor("mix", TensorProto.FLOAT, [1, "n", 1, 1]))
    return inputs, [tensor("refined", TensorProto.FLOAT, [1, "n", "H", "W"])]


def _filters(g: _Graph) -> list[str]:
    """Gaussian, gradient magnitude, mean and half difference of the Hessian's eigenvalues."""
    g.constant("kernels", derivatives()[:, None])
    g.constant("margins", np.array([0, 0, RADIUS, RADIUS] * 2, np.int64))
    g.constant("tiny", np.float32(1e-8))
    g.constant("half", np.float32(0.5))
    g.constant("ones", np.ones(6, np.int64))
    made = []
    for level in range(SCALES):
        g.op("Pad", [f"grey{level}", "margins"], f"framed{level}", mode="edge")
        g.op("Conv", [f"framed{level}", "kernels"], f"taken{level}")
        names = [f"{name}{level}" for name in ("smooth", "dx", "dy", "dxx", "dyy", "dxy")]
        g.split(f"taken{level}", names, "ones")
        smooth, dx, dy, dxx, dyy, dxy = names
        g.op("Add", [dxx, dyy], f"trace{level}")
        mean = g.op("Mul", [f"trace{level}", "half"], f"mean{level}")
        g.op("Sub", [dxx, mean], f"off{level}")
        slope = _length(g, dx, dy, f"slope{level}")
        apart = _length(g, f"off{level}", dxy, f"apart{level}")
        both = g.op("Concat", [smooth, slope, mean, apart], f"four{level}", axis=1)
        made.append(_grown(g, both, level))
        if level + 1 < SCALES:
            _halved(g, "grey", level)
    return made


def _colours(g: _Graph) -> list[str]:
    made = []
    for level in range(COLOUR_SCALES):
        made.append(_grown(g, f"colour{level}", level))
        if level + 1 < COLOUR_SCALES:
            _halved(g, "colour", level)
    return made


def _logits(g: _Graph) -> list[str]:
    """Logits of memory attention and their means around, which come on the image's own grid."""
    return [g.op("Pad", [name, "pads"], f"{name}_padded", mode="edge") for name in LOGITS]


def _units(g: _Graph, filtered: str) -> None:
    """Units of one band of rows after the other, so that what they make stays in the cache."""
    band = _Graph()
    band.constant("rows_of_band", np.array([BAND], np.int64))
    band.constant("along_rows", np.array([2], np.int64))
    band.op("Mul", ["band", "rows_of_band"], "first_row")
    band.op("Add", ["first_row", "rows_of_band"], "end_row")
    last = band.op("Slice", [filtered, "first_row", "end_row", "along_rows"], "banded")
    for layer, following in ((1, "hidden1"), (2, "hidden2")):
        band.op("Conv", [last, f"weights{layer}", f"biases{layer}"], f"sum{layer}")
        last = band.op("Relu", [f"sum{layer}"], following)
    band.op("Conv", [last, "weights3", "biases3"], "of_band")
    band.op("Identity", ["more"], "still_more")
    tensor = helper.make_tensor_value_info
    body = helper.make_graph(
        band.nodes,
        "units",
        [tensor("band", TensorProto.INT64, []), tensor("more", TensorProto.BOOL, [])],
        [
            tensor("still_more", TensorProto.BOOL, []),
            tensor("of_band", TensorProto.FLOAT, [1, "n", BAND, "Wp"]),
        ],
        band.constants,
    )
    g.op("Shape", [filtered], "padded_size", start=2, end=4)
    g.op("Shape", [filtered], "height", start=2, end=3)
    g.op("Div", ["height", g.constant("band_rows", np.array([BAND], np.int64))], "bands")
    g.op("Squeeze", ["bands"], "band_count")
    g.op(
        "Loop",
        [
            "band_count",
            "",
        ],
        "by_band",
        body=body,
    )
    g.op("Transpose", ["by_band"], "in_rows", perm=[1, 2, 0, 3, 4])
    g.op("Shape", ["biases3"], "structures")
    one = g.constant("one", np.array([1], np.int64))
    g.op("Concat", [one, "structures", "padded_size"], "own_shape", axis=0)
    g.op("Reshape", ["in_rows", "own_shape"], "own")


def _length(g: _Graph, one: str, other: str, name: str) -> str:
    g.op("Mul", [one, one], f"{name}_a")
    g.op("Mul", [other, other], f"{name}_b")
    g.op("Add", [f"{name}_a", f"{name}_b"], f"{name}_c")
    g.op("Add", [f"{name}_c", "tiny"], f"{name}_d")
    return g.op("Sqrt", [f"{name}_d"], name)


def _grown(g: _Graph, name: str, level: int) -> str:
    if not level:
        return name
    scales = g.constant(f"by_{name}", np.array([1, 1, 2**level, 2**level], np.float32))
    return g.op(
        "Resize",
        [name, "", scales],
        f"{name}_grown",
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )


def _halved(g: _Graph, name: str, level: int) -> None:
    g.op(
        "AveragePool",
        [f"{name}{level}"],
        f"{name}{level + 1}",
        kernel_shape=[2, 2],
        strides=[2, 2],
    )


def main(folder: Path = HEADS) -> None:
    """Write the graphs."""
    graphs = {FILTERS: build(False), REFINE: build(True), REFINE_NATIVE: build_native()}
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
