"""The same graph with other number types: ``fp16``, ``bf16``, and ``mixed``.

TensorRT's networks are strongly typed: precision lives in the graph and nowhere else. The types are
changed by ONNX Runtime's converter (``onnxruntime.transformers.float16``, MIT), which knows which
inputs of which operators have to stay what they are; ``bf16`` is its result with the other type,
the weights rounded anew from fp32. Inputs and outputs of a graph stay fp32.

``mixed`` is fp16 where products dominate, and fp32 where range or cancellation does: the core of
every attention (65,536 keys are more than the largest fp16 number: pitfall 5), normalisations,
positions, and the whole of ``embed``: on the demo model it loses ten times as much to fp16 as any
other graph (relative error 1e-2 against 1e-3), to the products themselves and not to any one kind
of layer, and it is a twentieth of the work.

``bf16`` leaves ``decode`` in fp32: a logit is a difference of large products, which 7 bits of
mantissa do not hold (relative error 0.12 on the demo model, where all other graphs together make
0.003), and it is a hundredth of the work.

:func:`emulate` turns a converted graph into an fp32 one that rounds every tensor to the type that
it has in the converted graph, so that a CPU shows what the types do. Sums are kept in fp32 inside
of an operator, as tensor cores do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from recallseg.engines.errors import ExportError, InputError
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.operators import DOMAIN
from recallseg.engines.precisions import PRECISIONS, precisions_made

__all__ = ["FLOATING", "convert_graph", "emulate"]

FLOATING = tuple(name for name in precisions_made("floating") if not PRECISIONS[name].native)
"""Precisions in other types than fp32, by operators that every runtime has."""

_SENSITIVE = (
    "LayerNormalization",
    "SkipLayerNormalization",
    "ReduceL2",
    "ReduceMean",
    "Softmax",
    "Sin",
    "Cos",
    "Pow",
)
"""Operators that ``mixed`` leaves in fp32 wherever they stand."""

_ALWAYS = ("ReduceL2", "Clip")
"""The embedding's length is a sum of squares, which leaves the range of fp16, and its guard against
zero is smaller than fp16 knows: both stay in fp32 in every precision."""

_NO_BF16 = ("Conv", "ConvTranspose", "MaxPool", "Resize", "Sin", "Cos")
"""Operators that take no bfloat16 before operator set 22."""

_WHOLE = {"bf16": ("decode", "correct"), "mixed": ("embed",)}
"""Graphs that a precision leaves in fp32 altogether."""

_LOW = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def convert_graph(model: ModelProto, precision: str, graph: str) -> ModelProto:
    """Return an fp32 model in another precision; ``model`` is left as it is.

    Parameters
    ----------
    model : with fp32 inputs, outputs and weights, weights loaded.
    precision : one of :data:`FLOATING`.
    graph : its name.

    Raises
    ------
    InputError
        For another precision.
    ExportError
        If the result is no valid model.
    """
    if precision not in FLOATING:
        raise InputError(f"graphs are converted to {', '.join(FLOATING)}, not '{precision}'.")
    float16 = import_onnxruntime("transformers.float16", wanted_by="convert", extra="export")
    keep_types = [*float16.DEFAULT_OP_BLOCK_LIST, *_ALWAYS]
    if precision == "bf16":
        keep_types += _NO_BF16
    elif precision == "mixed":
        keep_types += _SENSITIVE
    work = copy.deepcopy(model)
    if graph in _WHOLE.get(precision, ()):
        return work
    for index, node in enumerate(work.graph.node):
        node.name = node.name or f"node_{index}"  # what is kept is kept by name
    keep_nodes = list(attention_products(work)) if precision == "mixed" else []
    if graph == "correct":
        keep_nodes += exact_in_correct(work)
    converted: ModelProto = float16.convert_float_to_float16(
        work, keep_io_types=True, op_block_list=keep_types, node_block_list=keep_nodes
    )
    _join_fp32(converted)
    if precision == "bf16":
        _retype(converted, model)
    _sort_nodes(converted)
    del converted.graph.value_info[:]  # types of before; whoever needs them infers them
    try:
        onnx.checker.check_model(converted)
        onnx.shape_inference.infer_shapes(converted, check_type=True, strict_mode=True)
    except Exception as error:  # checker and inference have an error class each, in C++
        raise ExportError(f"graph '{graph}' in {precision}: {error}") from error
    return converted


def _join_fp32(model: ModelProto) -> None:
    """Let what stays in fp32 hand on fp32, in place.

    The converter surrounds every node that it leaves alone with casts, also where two of them
    follow each other: a score of fp32 attention would go through fp16 on its way to the softmax.
    """

    def is_cast(node: onnx.NodeProto | None, to: int) -> bool:
        return (
            node is not None
            and node.op_type == "Cast"
            and any(a.name == "to" and a.i == to for a in node.attribute)
        )

    made_by = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        down = made_by.get(node.input[0]) if is_cast(node, TensorProto.FLOAT) else None
        if down is None or not is_cast(down, TensorProto.FLOAT16):
            continue
        if node.output[0] in outputs:
            del node.attribute[:]
            node.op_type, node.input[0] = "Identity", down.input[0]
        else:
            renamed[node.output[0]] = down.input[0]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            while name in renamed:
                name = renamed[name]
            node.input[index] = name
    kept = [copy.deepcopy(node) for node in model.graph.node]
    while True:  # a cast that nobody reads may have been the only reader of another
        used = {name for node in kept for name in node.input} | outputs
        fewer = [node for node in kept if node.op_type != "Cast" or used & set(node.output)]
        if len(fewer) == len(kept):
            break
        kept = fewer
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _sort_nodes(model: ModelProto) -> None:
    """Put every node behind those that it reads from: the converter appends its casts."""
    known = {""} | {t.name for t in model.graph.initializer} | {t.name for t in model.graph.input}
    waiting: list[onnx.NodeProto] = list(model.graph.node)
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later: list[onnx.NodeProto] = []
        for node in waiting:
            (ordered if known.issuperset(node.input) else later).append(node)
            if ordered and ordered[-1] is node:
                known.update(node.output)
        if len(later) == len(waiting):
            raise ExportError(f"graph '{model.graph.name}' has a cycle or an unknown input.")
        waiting = later
    copies = [copy.deepcopy(node) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def exact_in_correct(model: ModelProto) -> list[str]:
    """Return the names of the nodes of ``correct`` that no lower precision may touch.

    From points to their codes: an angle has up to 20 radians, a place up to 1,024 pixels. From the
    comparisons of logits on: counts go beyond what fp16 holds (65,536 places).
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kept: dict[str, None] = {}
    waiting = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        kept[node.name] = None
        waiting += [made_by[name] for name in node.input if name in made_by]
    waiting = [node for node in model.graph.node if node.op_type == "Greater"]
    while waiting:
        node = waiting.pop()
        if node.op_type not in ("Greater", "Cast", "ReduceSum", "Mul", "GreaterOrEqual"):
            continue
        kept[node.name] = None
        waiting += [reader for name in node.output for reader in readers.get(name, [])]
    return [*kept]


def attention_products(model: ModelProto) -> Iterator[str]:
    """Yield the names of the two products around every softmax, and of the query's scaling."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        before = made_by.get(node.input[0]) if node.op_type == "MatMul" else None
        if before is not None and before.op_type == "Softmax":
            yield node.name
        if node.op_type != "Softmax":
            continue
        for source in _upwards(node, made_by, ("MatMul", "Mul")):
            yield source.name


def _upwards(
    node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], kinds: tuple[str, ...]
) -> Iterator[onnx.NodeProto]:
    """Yield the product before a softmax, and the scaling before that."""
    product = made_by.get(node.input[0])
    if product is None or product.op_type != kinds[0]:
        return
    yield product
    for name in product.input:
        scaling = made_by.get(name)
        if scaling is not None and scaling.op_type == kinds[1]:
            yield scaling


def _retype(converted: ModelProto, original: ModelProto) -> None:
    """Make every fp16 of the converter's a bf16, in place; weights are rounded from fp32."""
    exact = {tensor.name: tensor for tensor in original.graph.initializer}
    for tensor in converted.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            source = exact.get(tensor.name, tensor)
            tensor.CopyFrom(_bf16(numpy_helper.to_array(source), tensor.name))
    for node in converted.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(_bf16(numpy_helper.to_array(attribute.t), attribute.t.name))


def _bf16(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]], name: str) -> TensorProto:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).reshape(values.shape).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, rounded.tobytes(), raw=True)


def emulate(model: ModelProto) -> ModelProto:
    """Return an fp32 model that rounds as ``model`` does, for runtimes without its number types.

    Every node computes in fp32; what ``model`` holds in fp16 or bf16 is rounded to that type when
    it is made. Run it without optimizations: they may take the two casts for nothing.

    Parameters
    ----------
    model : from :func:`convert_graph`.
    """
    types = _types(model)
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    for tensor in out.graph.initializer:
        if tensor.data_type in _LOW:
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    for node in model.graph.node:
        made = out.graph.node.add()
        made.CopyFrom(node)
        for attribute in made.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _LOW:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in _LOW:
                exact = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(exact, attribute.t.name))
        for index, name in enumerate(node.output):
            if types.get(name) in _LOW:
                wide, low = f"{name}__wide", f"{name}__low"
                made.output[index] = wide
                if made.domain == DOMAIN:
                    _spell_out(out, made)
                out.graph.node.append(helper.make_node("Cast", [wide], [low], to=types[name]))
                out.graph.node.append(helper.make_node("Cast", [low], [name], to=TensorProto.FLOAT))
    return out


def _types(model: ModelProto) -> dict[str, int]:
    """Element types by name. Inference ends at operators that ONNX does not know, ONNX Runtime's
    and ours: what they give out is of the type of their first input, and so is what is behind.
    """
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {
        value.name: value.type.tensor_type.elem_type
        for value in (*typed.graph.value_info, *typed.graph.output, *typed.graph.input)
    }
    for node in model.graph.node:
        if all(name in types for name in node.output if name):
            continue
        if node.op_type in _OTHER_TYPE:
            kind = _OTHER_TYPE[node.op_type]
        elif node.op_type == "Cast":
            kind = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "Where":
            kind = types[node.input[1]]
        else:
            kind = types[node.input[0]]
        types |= {name: kind for name in node.output if name}
    return types


_OTHER_TYPE = {
    "Shape": TensorProto.INT64,
    "Size": TensorProto.INT64,
    "ArgMax": TensorProto.INT64,
    "Greater": TensorProto.BOOL,
    "Less": TensorProto.BOOL,
    "Equal": TensorProto.BOOL,
}
"""What these give out, whatever they are given."""


def _spell_out(model: ModelProto, linear: onnx.NodeProto) -> None:
    """Replace a ``HalfLinear``, the last node, by the nodes that compute the same in fp32."""
    x, weights, bias = linear.input
    (out,) = linear.output
    (activation,) = (a.i for a in linear.attribute if a.name == "activation")
    nodes = [
        helper.make_node("MatMul", [x, weights], [f"{out}__product"]),
        helper.make_node("Add", [f"{out}__product", bias], [f"{out}__sum"]),
        helper.make_node("Identity", [f"{out}__sum"], [out])
        if activation == 0
        else helper.make_node("Gelu", [f"{out}__sum"], [out], approximate="tanh")
        if activation == 1
        else helper.make_node("Relu", [f"{out}__sum"], [out]),
    ]
    del model.graph.node[-1]
    model.graph.node.extend(nodes)
