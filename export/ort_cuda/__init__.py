"""The ``ort-cuda`` variant: ``embed``, ``encode``, ``attend`` and ``decode`` as a GPU likes them.

On a GPU these graphs are bound by bytes moved and kernels launched, not by products. All steps are
exact up to the order of summation:

- biases are not written and read for themselves: one of a key adds the same to all scores of a
  query and falls out of the softmax; one of a value passes through it (its rows sum to 1) into the
  output's; that goes into ``SkipLayerNormalization``, which adds residual and bias and normalises
  in one pass; a GELU's into ``BiasGelu``. A maximum over places commutes with them;
- tokens lie in the order in which windows want them (:mod:`.order`), so that most partitions need
  no work; where windows do not divide the map, one ``Gather`` with a table of this configuration,
  in which padding is rows times 0, takes the place of pad, reshape and transpose;
- convolutions that look at each place once are products, channels last; the neck's and the mask
  decoder's 1x1 convolutions behind it are one product; what depends on the model alone (positions,
  the first self-attention of ``decode``) is a constant;
- object pointers are tokens beside those of their exemplar with an angle of zero, so that nothing
  has to be joined after the rotation;
- nothing is joined or split that is not of equal size: for other sizes ONNX Runtime's kernels copy
  tables from pinned memory, which is lent out again while a recording still reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from recallseg.export.families import Embedder, Segmenter, segmenter_family
from recallseg.export.families.embedders import embedder_family
from recallseg.export.graphs import Attend, Decode, Encode, build_graphs
from recallseg.export.ort_cuda.attend import CudaAttend
from recallseg.export.ort_cuda.decode import CudaDecode
from recallseg.export.ort_cuda.embed import CudaEmbed
from recallseg.export.ort_cuda.encode import CudaEncode
from recallseg.export.reading import read_graph

__all__ = ["GRAPHS", "OPSET", "build_ort_cuda_graphs", "forget_unread_outputs"]

GRAPHS = ("embed", "encode", "attend", "decode")
"""Those that have a form of their own."""

OPSET = 20
"""As for ``ort-cpu``."""


def build_ort_cuda_graphs(
    sam2: Segmenter,
    dinov2: Embedder,
    *,
    object_pointers: bool = True,
    graphs: Sequence[str] = GRAPHS,
) -> dict[str, nn.Module]:
    """Return this variant's modules by graph name; the others are the portable ones.

    Parameters
    ----------
    sam2, dinov2 : the models; they stay as they are.
    object_pointers : whether memory attention takes SAM 2's object pointers too.
    graphs : which of :data:`GRAPHS`; those that a model has no such form of are left out.

    Raises
    ------
    ExportError
        If a model is not built as every published SAM 2 and DINOv2 is, naming the part.
    """
    modules = build_graphs(sam2, dinov2, object_pointers=object_pointers)
    encode, attend, decode = modules["encode"], modules["attend"], modules["decode"]
    if not (
        isinstance(encode, Encode) and isinstance(attend, Attend) and isinstance(decode, Decode)
    ):  # for the type checker
        raise TypeError(f"{type(encode)}, {type(attend)}, {type(decode)}")
    size: Any = sam2.config.image_size  # one number in every SAM 2
    made: dict[str, nn.Module] = {}
    if "attend" in graphs:
        made["attend"] = CudaAttend(attend).eval()
    if "decode" in graphs:
        made["decode"] = CudaDecode(decode).eval()
    if "embed" in graphs and embedder_family(dinov2).has_cuda_form:
        made["embed"] = CudaEmbed(dinov2).eval()
    if "encode" in graphs and segmenter_family(sam2).has_hiera:
        made["encode"] = CudaEncode(encode, int(size)).eval()
    return made


def forget_unread_outputs(path: Path) -> None:
    """Leave out, in a stored graph, outputs of ``SkipLayerNormalization`` that nothing reads."""
    model = read_graph(path, weights=False)
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "SkipLayerNormalization":
            kept = [name if name in read else "" for name in node.output]
            while kept and not kept[-1]:
                kept.pop()
            node.output[:] = kept
    onnx.save(model, path)
