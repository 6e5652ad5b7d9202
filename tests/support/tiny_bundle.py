"""A bundle of the smallest networks that have every input, output and axis of the true ones.

For what surrounds networks: buffers, streams, recordings, copies, counts. Each output depends on
each input, so that one that is stale, missing or another's changes it; a memory's mask comes back
in the logits, at its place. What masks are worth is for the demo model to show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from recallseg.engines.bundle import Bundle
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.specs import Geometry, GraphSpec, graph_specs
from support.fake_bundle import fake_geometry, write_bundle

__all__ = ["GRAPHS", "make_tiny_bundle", "tiny_graphs"]

EMBED = """
    cells = Conv<strides = [7, 7]>(image, w_3x3x7x7)
    flat = Flatten(cells)
    even = LayerNormalization(flat, w_D, w_D)
    embedding = LpNormalization<axis = 1, p = 2>(even)
"""
ENCODE = """
    coarse = Conv<strides = [16, 16]>(image, w_Cx3x16x16)
    fine = Conv<strides = [4, 4]>(image, w_Ax3x4x4)
    middle = Conv<strides = [8, 8]>(image, w_Bx3x8x8)
    features = Tanh(coarse)
    skip0 = Tanh(fine)
    skip1 = Tanh(middle)
"""
MEMORIZE = """
    coverage = AveragePool<kernel_shape = [16, 16], strides = [16, 16]>(masks)
    near0 = AveragePool<kernel_shape = [4, 4], strides = [4, 4]>(skip0)
    near1 = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(skip1)
    seen = Concat<axis = 1>(features, near0, near1)
    inside = Mul(seen, coverage)
    look = Conv(inside, w_LxSx1x1)
    both = Concat<axis = 1>(coverage, look)
    rows = Reshape(both, i_0_M_T)
    memories = Transpose<perm = [0, 2, 1]>(rows)
    mean = ReduceMean<keepdims = 0>(inside, i_2_3)
    pointers = MatMul(mean, w_SxC)
"""
ATTEND = """
    places = Reshape(features, i_1_C_T)
    turned = Transpose<perm = [0, 2, 1]>(places)
    asked = MatMul(turned, w_CxM)
    query = Add(asked, place_TxM)
    placed = Add(memories, place_TxM)
    keys = Reshape(placed, i_0_R_M)
    across = Transpose<perm = [0, 2, 1]>(keys)
    near = MatMul(query, across)
    weights = Softmax<axis = -1>(near)
    values = Reshape(memories, i_0_R_M)
    recalled = MatMul(weights, values)
    wide = MatMul(recalled, first_MxC)
    time = Unsqueeze(pointer_time, i_2)
    timed = Mul(pointers, time)
    object = ReduceMean<keepdims = 1>(timed, i_1)
    with_object = Add(wide, object)
    back = Transpose<perm = [0, 2, 1]>(with_object)
    map = Reshape(back, i_0_C_H_H)
    little = Mul(features, tenth)
    conditioned = Add(map, little)
"""
RAISED = """
    cell = Conv(conditioned, first_1xCx1x1)
    large = ConvTranspose<strides = [4, 4]>(cell, one_1x1x4x4)
    fine = Conv(skip0, w_1xAx1x1)
    between = Conv(skip1, w_1xBx1x1)
    middle = ConvTranspose<strides = [2, 2]>(between, one_1x1x2x2)
    detail = Add(fine, middle)
    few = Mul(detail, tenth)
    raised = Add(large, few)
"""
CLICKED = """
    label = Cast<to = 1>(point_labels)
    sign = Unsqueeze(label, i_2)
    said = Mul(points, sign)
    click = ReduceMean<keepdims = 0>(said, i_0_1_2)
    known = Cast<to = 1>(has_prior)
    before = Mul(prior, known)
    told = Add(before, click)
    less = Mul(told, tenth)
    all = Add(raised, less)
"""
LOGITS = """
    mask = Sub(all, third)
    strong = Mul(mask, gain)
    logits = Squeeze(strong, i_1)
    flat = Flatten<axis = 1>(logits)
    mean = ReduceMean<keepdims = 0>(flat, i_1)
    iou = Sigmoid(mean)
    object_score = ReduceMax<keepdims = 0>(flat, i_1)
"""
GRAPHS = {
    "embed": EMBED,
    "encode": ENCODE,
    "memorize": MEMORIZE,
    "attend": ATTEND,
    "decode": RAISED + "all = Identity(raised)" + LOGITS,
    "correct": RAISED + CLICKED + LOGITS,
}
SCALARS = {"tenth": 0.1, "third": 0.3, "gain": 20.0}


def make_tiny_bundle(path: Path) -> Bundle:
    """Write the bundle, portable and in fp32, and open it."""
    geometry = replace(fake_geometry(128), channels=16, memory_dim=16)
    content = {name: graph.SerializeToString() for name, graph in tiny_graphs(geometry).items()}
    return write_bundle(path, geometry, content, OnnxRuntimeCpu, name="tiny")


def tiny_graphs(
    geometry: Geometry, bodies: Mapping[str, str] = GRAPHS
) -> dict[str, onnx.ModelProto]:
    """Return a graph of each of these nodes, whose constants are what they are called."""
    specs = graph_specs(geometry, optional=("correct",))
    return {name: _graph(specs[name], body, geometry) for name, body in bodies.items()}


def _graph(spec: GraphSpec, body: str, g: Geometry) -> onnx.ModelProto:
    """Parse a graph; constants are what their names say, see :func:`_constant`."""

    def declared(tensors: tuple[object, ...]) -> str:
        kinds = {"float32": "float", "int32": "int32", "bool": "bool"}
        return ", ".join(
            f"{kinds[t.dtype]}[{','.join(map(str, t.shape))}] {t.name}" for t in tensors
        )

    text = f"{spec.name} ({declared(spec.inputs)}) => ({declared(spec.outputs)}) {{{body}}}"
    graph = parser.parse_graph(text)
    made = {name for node in graph.node for name in node.output} | {t.name for t in spec.inputs}
    needed = dict.fromkeys(name for node in graph.node for name in node.input if name not in made)
    rng = np.random.default_rng(len(body))
    graph.initializer.extend(
        numpy_helper.from_array(_constant(name, g, rng), name) for name in needed
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="tests"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _constant(name: str, g: Geometry, rng: np.random.Generator) -> NDArray[np.generic]:
    """Return a constant by its name: ``KIND_SIZES``, sizes in numbers or a geometry's letters."""
    if name in SCALARS:
        return np.float32(SCALARS[name]).reshape(())
    letters = {
        "C": g.channels,
        "A": g.skip0_channels,
        "B": g.skip1_channels,
        "S": g.channels + g.skip0_channels + g.skip1_channels,  # seen: features and both skips
        "M": g.memory_dim,
        "L": g.memory_dim - 1,  # but for the coverage
        "T": g.tokens,
        "H": g.feature_size,
        "D": g.embedding_dim,
        "E": 3 * (g.embed_size // 7) ** 2,  # cells of the embedder's image
        "R": -1,  # the rest
    }
    kind, _, sizes = name.partition("_")
    numbers = [letters.get(size) or int(size) for size in re.split("[x_]", sizes)]
    if kind == "i":
        return np.array(numbers, np.int64)
    if kind == "one":
        return np.ones(numbers, np.float32)
    if kind == "shared":  # the same in every graph
        rng = np.random.default_rng(0)
    drawn = rng.normal(size=numbers).astype(np.float32)
    if kind == "place":  # near what lies at the same place
        return 3 * drawn
    drawn /= math.sqrt(max(1, math.prod(numbers[1:])))
    if kind == "first":  # one channel goes to the other's first, a little of all everywhere
        drawn *= 0.1
        drawn[0, 0] = 1.0
    return drawn
