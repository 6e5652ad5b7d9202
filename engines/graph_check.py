"""What an ONNX graph may be, looked at before any runtime parses it.

A graph is a program. Runtimes read files that it names (before 1.24, ONNX Runtime also followed
``../`` and absolute paths; some operators name files of their own), and run loops without end. So a
graph is read here first, without its weights: only operators from a list, none with a graph inside,
no functions (which can nest and double), no tensors larger than their files, and weights beside the
graph only in the files that the manifest names.

The format is that of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) in
Protocol Buffers' wire format (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from recallseg.engines.errors import BundleError
from recallseg.engines.reading import naming
from recallseg.engines.wire import INTEGER, INTEGERS, MESSAGE, MESSAGES, Kinds, Wire

__all__ = ["OPERATORS", "check_graph", "find_outputs", "with_output"]

_STANDARD = """
    Abs Acos Add And ArgMax ArgMin Asin Atan Attention AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Compress
    Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod
    Mul Neg NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear
    RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding
    Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
"""
_MICROSOFT = """
    Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu DequantizeLinear DynamicQuantizeMatMul
    FastGelu FusedConv FusedGemm FusedMatMul Gelu GroupNorm GroupQueryAttention MatMulBnb4
    MatMulInteger16 MatMulIntegerToFloat MatMulNBits MultiHeadAttention NhwcConv NhwcMaxPool
    PackedMultiHeadAttention QAttention QGemm QLinearAdd QLinearAveragePool QLinearConcat
    QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid
    QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu RotaryEmbedding SkipGroupNorm
    SkipLayerNormalization SkipSimplifiedLayerNormalization SimplifiedLayerNormalization
"""
OPERATORS = {
    "": frozenset(_STANDARD.split()),
    "ai.onnx": frozenset(_STANDARD.split()),
    "com.microsoft": frozenset(_MICROSOFT.split()),
    "recallseg": frozenset(("Linear", "HalfLinear", "Attention", "QuantizedAttention")),
}
"""Operators by domain: what a network of tensors needs. Left out is what branches and repeats
(``If``, ``Loop``, ``Scan``, sequences), decodes text and images, or names files (``EPContext``)."""

_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 8: 8, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64,
         14: 64, 15: 128, 16: 16}  # fmt: skip
"""Bits of one element by ``TensorProto.DataType``; the newer, smaller ones have at least 2."""
_LARGEST_ELEMENT = max(_BITS.values())
_EXTERNAL = 1
_MODEL: Kinds = {7: MESSAGES, 20: MESSAGES, 25: MESSAGES}
_GRAPH: Kinds = {1: MESSAGES, 5: MESSAGES, 15: MESSAGES}
_NODE: Kinds = {1: MESSAGES, 2: MESSAGES, 4: MESSAGE, 5: MESSAGES, 7: MESSAGE}
_ATTRIBUTE: Kinds = {
    **dict.fromkeys((5, 6, 22), MESSAGE),
    **dict.fromkeys((10, 11, 23), MESSAGES),
}
_TENSOR: Kinds = {1: INTEGERS, 2: INTEGER, 13: MESSAGES, 14: INTEGER}
_SPARSE: Kinds = {1: MESSAGE, 2: MESSAGE, 3: INTEGERS}
_ENTRY: Kinds = {1: MESSAGE, 2: MESSAGE}
"""The fields that are looked at, by message."""


_PASSED: set[tuple[str, tuple[tuple[str, int], ...]]] = set()
"""Digests of what this process looked at and let pass, with names and sizes of its weights."""


def check_graph(path: Path, weights: Sequence[Path] = (), *, digest: str | None = None) -> None:
    """Refuse a graph that is more than a network of tensors.

    Parameters
    ----------
    path : the ``.onnx`` file.
    weights : the files beside it that hold weights of it, as the manifest names them.
    digest : SHA-256 of the file where it was just found to have it: the same contents are looked at
        once in a process, which for a demo bundle's graphs takes as long as loading them.

    Raises
    ------
    BundleError
        Saying what the graph asks for.
    """
    for data in weights:
        if data.parent != path.parent:
            raise BundleError(
                f"{data} must lie beside the graph {path.name}, whose weights it holds."
            )
    try:
        sizes = tuple((data.name, data.stat().st_size) for data in weights)
        if digest is not None and (digest, sizes) in _PASSED:
            return
        size = path.stat().st_size
        if not size:
            raise BundleError(f"the graph {path} is empty. Restore it or export the bundle again.")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BundleError(f"the graph {path} cannot be read: {error.strerror}.") from error
    with content:
        _Check(path, content, sizes).model(0, size)
    if digest is not None:
        _PASSED.add((digest, sizes))


def find_outputs(path: Path, operators: Collection[str]) -> tuple[str, ...]:
    """Return the names of the first outputs of these operators, in the order of the graph."""
    with (
        naming(path),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        check = _Check(path, content)
        return tuple(check.outputs(operators))


def with_output(graph: bytes, name: str) -> bytes:
    """Return an ONNX model that gives one of its inner tensors too.

    A message that is appended to a Protocol Buffers message is merged with it: this one holds a
    graph (field 7) with one more output (field 12) of this name (field 1).
    """
    value = b"\x0a" + _length(len(name.encode())) + name.encode()
    output = b"\x62" + _length(len(value)) + value
    return graph + b"\x3a" + _length(len(output)) + output


def _length(number: int) -> bytes:
    """Return a varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


class _Check(Wire):
    """One walk through a file; positions are those of the file."""

    def __init__(
        self, path: Path, content: mmap.mmap, sizes: Sequence[tuple[str, int]] = ()
    ) -> None:
        super().__init__(content)
        self._path = path
        self._weights = dict(sizes)
        self._outside = 8 * sum(self._weights.values())
        self._bits = 8 * len(content) + self._outside
        self._nodes: list[tuple[list[str], list[str]]] = []

    def model(self, start: int, end: int) -> None:
        graphs = 0
        for number, at, stop in self.parts(start, end, _MODEL):
            if number == 7:  # graph
                graphs += 1
                self._graph(at, stop)
            elif number in (20, 25):  # training_info, functions
                raise self.refused("holds functions or training steps")
        if graphs != 1:
            raise self.refused(f"holds {graphs} graphs, not 1")

    def _graph(self, start: int, end: int) -> None:
        for number, at, stop in self.parts(start, end, _GRAPH):
            if number == 1:  # node
                self._node(at, stop)
            elif number == 5:  # initializer
                self._tensor(at, stop)
            elif number == 15:  # sparse_initializer
                self._sparse(at, stop)
        self._check_order()

    def outputs(self, operators: Collection[str]) -> Iterator[str]:
        """Yield the first outputs of nodes that are one of ``operators``."""
        for number, start, end in self.parts(0, len(self.content)):
            if number != 7:
                continue
            for part, at, stop in self.parts(start, end):
                if part != 1:
                    continue
                fields = [(n, self.text(a, s)) for n, a, s in self.parts(at, stop) if n in (2, 4)]
                if dict(fields).get(4) in operators:
                    yield next(text for n, text in fields if n == 2)

    def _check_order(self) -> None:
        """Refuse a graph that goes in circles, which ONNX Runtime looks for in vain for long."""
        makers: dict[str, int] = {}
        for index, (_, outputs) in enumerate(self._nodes):
            for name in outputs:
                if name and makers.setdefault(name, index) != index:
                    raise self.refused(f"makes {name!a} twice")
        waits = [len({makers[n] for n in inputs if n in makers}) for inputs, _ in self._nodes]
        users: dict[int, set[int]] = {}
        for index, (inputs, _) in enumerate(self._nodes):
            for name in inputs:
                if name in makers:
                    users.setdefault(makers[name], set()).add(index)
        ready = [index for index, count in enumerate(waits) if count == 0]
        done = 0
        while ready:
            done += 1
            for user in users.get(ready.pop(), ()):
                waits[user] -= 1
                if waits[user] == 0:
                    ready.append(user)
        if done < len(self._nodes):
            raise self.refused("goes in circles: an operator needs what is made of its own output")

    def _node(self, start: int, end: int) -> None:
        operator, domain, attributes = "", "", []
        inputs: list[str] = []
        outputs: list[str] = []
        self._nodes.append((inputs, outputs))
        for number, at, stop in self.parts(start, end, _NODE):
            if number in (1, 2):
                (inputs if number == 1 else outputs).append(self.text(at, stop))
            elif number == 4:
                operator = self.text(at, stop)
            elif number == 7:
                domain = self.text(at, stop)
            elif number == 5:
                attributes.append((at, stop))
        if operator not in OPERATORS.get(domain, ()):
            name = f"{domain}::{operator}" if domain else operator
            raise self.refused(f"has the operator {name!a}, which no graph of ours needs")
        for at, stop in attributes:
            for number, inner, inner_stop in self.parts(at, stop, _ATTRIBUTE):
                if number in (6, 11):  # g, graphs
                    raise self.refused(f"has a graph inside of an operator {operator}")
                if number in (5, 10):  # t, tensors
                    self._tensor(inner, inner_stop)
                elif number in (22, 23):  # sparse_tensor, sparse_tensors
                    self._sparse(inner, inner_stop)

    def _sparse(self, start: int, end: int) -> None:
        dims: list[int] = []
        for number, at, stop in self.parts(start, end, _SPARSE):
            if number in (1, 2):  # values, indices
                self._tensor(at, stop)
            elif number == 3:  # of what it is unpacked to
                dims += self.numbers(at, stop)
        self._check_size(dims, _LARGEST_ELEMENT)

    def _tensor(self, start: int, end: int) -> None:
        dims: list[int] = []
        kind, location = 0, 0
        entries: dict[str, str] = {}
        for number, at, stop in self.parts(start, end, _TENSOR):
            if number == 1:  # dims
                dims += self.numbers(at, stop)
            elif number == 2:  # data_type
                kind = self.numbers(at, stop)[0]
            elif number == 13:  # external_data
                pair = {n: self.text(a, s) for n, a, s in self.parts(at, stop, _ENTRY)}
                entries[pair.get(1, "")] = pair.get(2, "")
            elif number == 14:  # data_location
                location = self.numbers(at, stop)[0]
        if not 0 <= kind < 2**31:  # of a longer one, parsers take the lower bits
            raise self.refused(f"has a constant of the type {kind}")
        bits = self._check_size(dims, _BITS.get(kind, 2))
        if entries or location:
            self._external(entries, location)
            self._outside -= bits
            if self._outside < 0:  # many constants of the same bytes
                raise self.refused("declares more weights than the files beside it hold")

    def _check_size(self, dims: list[int], each: int) -> int:
        """Return the bits of a constant; more than there are in all files are refused."""
        bits = math.prod(dims) * each
        if any(not 0 <= size < 2**40 for size in dims) or bits > self._bits:
            raise self.refused(f"declares a constant of {dims}, more than its files hold")
        return bits

    def _external(self, entries: dict[str, str], location: int) -> None:
        name = entries.get("location", "")
        try:
            offset, length = (int(entries.get(key) or 0) for key in ("offset", "length"))
        except ValueError:
            offset, length = -1, -1
        if location != _EXTERNAL or name not in self._weights:
            names = ", ".join(map(repr, self._weights))
            allowed = f"only {names}" if names else "none"
            raise self.refused(f"asks for weights in the file {name!a}; the manifest {allowed}")
        if offset < 0 or length < 0 or offset + length > self._weights[name]:
            raise self.refused(f"asks for weights beyond the end of {name}")

    def refused(self, why: str) -> BundleError:
        return BundleError(
            f"the graph {self._path} is not opened: it {why}. Export the bundle again, or ask for "
            "it anew from who made it."
        )
