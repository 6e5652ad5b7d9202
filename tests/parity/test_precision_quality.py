"""Precisions judged by what matters: Dice on real images, and 16 exemplars at 1024 px."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from transformers import Dinov2Model, Sam2VideoModel

from recallseg import Bundle, Library, Segmenter
from recallseg.engines import registry
from recallseg.engines.engine import Tensor
from recallseg.engines.specs import graph_specs
from recallseg.engines.verification import mask_dice, relative_error
from recallseg.export import tensorrt
from recallseg.export.checkpoints import load_dinov2, load_sam2
from recallseg.export.converting import convert_bundle
from recallseg.export.emulation import EmulatedEngine
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.onnx_export import export_graph
from recallseg.export.precision import convert_graph
from recallseg.runtime.reports.demo import STRUCTURES, fill_library, load_slices

LOSS = 0.005
"""Most Dice that a precision may cost on average over structures and slices."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dice_on_a_real_brain_in_every_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is made in fp32, as it would be; the query runs in the precision."""
    monkeypatch.setitem(
        registry.ENGINES, "emulated", ("recallseg.export.emulation", "EmulatedEngine")
    )
    precisions = ("fp16", "bf16", "mixed")
    bundle = convert_bundle(Bundle.open("demo"), tmp_path / "demo", precisions)
    slices = load_slices()
    dice: dict[str, list[float]] = {}
    with Library.create(tmp_path / "library", bundle) as library:
        fill_library(library, slices, lambda text: None)
        for precision in ("fp32", *precisions):
            engine = "onnxruntime-cpu" if precision == "fp32" else "emulated"
            segmenter = Segmenter(
                library, k=8, structures=STRUCTURES, engine=engine, precision=precision
            )
            for query in slices.queries[2:12:3]:
                masks = segmenter.segment(query.image).masks
                dice.setdefault(precision, []).extend(
                    mask_dice(masks[name], query.masks[name])
                    for name in STRUCTURES
                    if name in query.masks
                )
    means = {precision: float(np.mean(values)) for precision, values in dice.items()}
    print(means)
    assert means["fp32"] > 0.7
    for precision in precisions:
        assert means["fp32"] - means[precision] < LOSS, means


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sixteen_exemplars_at_1024_px(tmp_path: Path) -> None:
    """65,536 keys are one more than fp16 can count to with its largest number (pitfall 5)."""
    sam2 = load_sam2("random:tiny", image_size=1024).model
    dinov2 = load_dinov2("random:small").model
    assert isinstance(sam2, Sam2VideoModel)
    assert isinstance(dinov2, Dinov2Model)
    geometry = read_geometry(sam2, dinov2, embed_size=224)
    spec = graph_specs(geometry)["attend"]
    path = tmp_path / "attend.onnx"
    with tensorrt.fusable_attention(sam2, dinov2):
        module = build_graphs(sam2, dinov2)["attend"]
        export_graph(module, spec, geometry, path, opset=tensorrt.OPSET)
    rng = np.random.default_rng(0)
    k = 16
    inputs: dict[str, Tensor] = {
        tensor.name: rng.normal(size=tensor.resolve(n=1, k=k)).astype(np.float32)
        for tensor in spec.inputs
    }
    inputs["pointer_time"][:] = 1 / 15
    assert k * geometry.tokens > float(np.finfo(np.float16).max)
    found = {}
    for precision in ("fp32", "fp16", "mixed", "bf16"):
        file = tmp_path / f"{precision}.onnx"
        model = onnx.load(path)
        onnx.save(model if precision == "fp32" else convert_graph(model, precision, "attend"), file)
        engine = EmulatedEngine(spec, file)
        out = engine.allocate_outputs(n=1, k=k)
        engine.run(inputs, out)
        found[precision] = out["conditioned"]
        assert np.isfinite(out["conditioned"]).all()
    errors = {p: relative_error(found[p], found["fp32"]) for p in found}
    print(errors)
    assert 0 < errors["mixed"] < 5e-3
    assert errors["fp16"] < 3e-2
    assert errors["bf16"] < 1e-1
