"""The ``tensorrt`` variant: the graphs in the form that TensorRT fuses, on old and new ones.

TensorRT recognises attention as MatMul, Softmax, MatMul on tensors B x heads x length x width with
nothing in between. It wants the scale on the query *before* the first product, for the sake of the
numbers as much as of speed (its guide, "Fused Attention"; with the scale after the product, fused
kernels have been wrong: pitfall 6). PyTorch's own export multiplies the keys too, which at k = 16
is a pass over 65,536 of them, and guards the softmax with IsNaN and Where, which ends the fusion.

``encode`` and ``decode`` are rearranged as :mod:`.ort_cuda` has them: no padding of windows,
convolutions as products, biases folded, positions as constants, fewer transposes; what is one node
there is spelled out here. TensorRT-RTX makes fewer kernels of them. Of ``embed`` and ``attend`` it
does not, which stay as they are (docs/device/tensorrt.md).

The standard ``Attention`` operator says the same in one node, but wants a parser of TensorRT 10.14;
JetPack 6 has 10.3. So the pattern is written out, in operators that its parser takes, and
:func:`check_operators` holds every exported graph to that list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from recallseg.engines.errors import ExportError
from recallseg.export.attention import register_attention, use_attention
from recallseg.export.families import Embedder, Segmenter
from recallseg.export.fused import attend, spelled_out
from recallseg.export.ort_cuda import build_ort_cuda_graphs
from recallseg.export.reading import read_graph

__all__ = [
    "MAX_OPSET",
    "OPERATORS",
    "OPSET",
    "REARRANGED",
    "build_tensorrt_graphs",
    "check_operators",
    "fusable_attention",
]

REARRANGED = ("encode", "decode")
"""Graphs of which TensorRT-RTX makes fewer kernels in the form that ``ort-cuda`` has."""

OPSET = 18
"""Has LayerNormalization as one operator; nothing newer is needed."""

MAX_OPSET = 20
"""The newest operator set that the parser of TensorRT 10.3 (JetPack 6) takes."""

_SINCE_8_4 = """
    Add And ArgMax AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose
    Cos Div Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gemm
    GlobalAveragePool Greater GreaterOrEqual Identity Less LessOrEqual Log MatMul Max MaxPool Min
    Mul Neg Not Or Pad Pow Range ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape
    Resize Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze
    Where
"""

OPERATORS = frozenset((*_SINCE_8_4.split(), "Reciprocal", "LayerNormalization"))
"""Operators that a graph of this variant may use: taken by TensorRT's ONNX parser since 8.4
(docs/operators.md of onnx-tensorrt), and one each since 8.5 and 8.6."""

_NAME = "recallseg_tensorrt"


def _attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Adapt to the signature of ``transformers``, which wants B x length x heads x width back."""
    if attention_mask is not None:
        raise ExportError(f"{type(module).__name__} passes an attention mask; none is expected.")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, float(scale)).transpose(1, 2), None


register_attention(_NAME, _attention_of_transformers)


@contextmanager
def fusable_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Let these models, and what was rearranged, be written in TensorRT's patterns meanwhile."""
    with use_attention(_NAME, *models), spelled_out():
        yield


def build_tensorrt_graphs(
    sam2: Segmenter, dinov2: Embedder, *, object_pointers: bool = True
) -> dict[str, nn.Module]:
    """Return this variant's modules by graph name; the others are the portable ones.

    Parameters are those of :func:`recallseg.export.ort_cuda.build_ort_cuda_graphs`.
    """
    return build_ort_cuda_graphs(sam2, dinov2, object_pointers=object_pointers, graphs=REARRANGED)


def check_operators(path: Path) -> None:
    """Refuse a graph that the parser of TensorRT 10.3 would not take.

    Raises
    ------
    ExportError
        Naming the operators or the operator set that are too new or foreign.
    """
    model = read_graph(path, weights=False)
    foreign = sorted(
        {
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for node in model.graph.node
            if node.domain or node.op_type not in OPERATORS
        }
    )
    if foreign:
        raise ExportError(
            f"{path.name} uses {', '.join(foreign)}, which TensorRT 10.3 (JetPack 6) may not "
            "take. Add it to recallseg.export.tensorrt.OPERATORS if its parser does, or export "
            "the model without it."
        )
    for opset in model.opset_import:
        if opset.domain or opset.version > MAX_OPSET:
            raise ExportError(
                f"{path.name} uses operator set {opset.version} of domain '{opset.domain}'; "
                f"TensorRT 10.3 takes the standard operators up to {MAX_OPSET}."
            )
