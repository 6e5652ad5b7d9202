"""The graph ``correct`` is SAM 2's own step for prompts, in every variant and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import Sam2VideoModel

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import ExportError, ParityError
from recallseg.engines.golden import golden_prompts
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.precisions import PRECISIONS
from recallseg.engines.specs import Geometry, GraphSpec, graph_specs
from recallseg.engines.verification import relative_error
from recallseg.export import tensorrt
from recallseg.export.checkpoints import load_sam2
from recallseg.export.correcting import Correct, is_corrector, with_corrector
from recallseg.export.emulation import EmulatedEngine
from recallseg.export.onnx_export import example_inputs
from recallseg.export.parity import TorchEngine, check_corrections, check_graph
from recallseg.export.precision import FLOATING, convert_graph

SIZE = 256


@pytest.fixture(scope="module")
def sam2() -> Sam2VideoModel:
    model = load_sam2("random:demo", image_size=SIZE).model
    assert isinstance(model, Sam2VideoModel)
    return model


@pytest.fixture(scope="module")
def spec(sam2: Sam2VideoModel) -> GraphSpec:
    channels = int(sam2.hidden_dim)
    geometry = Geometry(
        SIZE, 28, 8, channels, SIZE // 16, channels // 8, channels // 4, int(sam2.mem_dim)
    )
    return graph_specs(geometry, optional=("correct",))["correct"]


@pytest.fixture(scope="module")
def files(exported: Bundle) -> dict[str, Path]:
    """The graph by variant: ``sam2`` is the segmenter of this bundle too."""
    variants = ("portable", "tensorrt")
    found = {v: exported.graph_file("correct", (v,), "fp32") for v in variants}
    assert [variant for _, variant in found.values()] == [*variants]
    return {variant: file for variant, (file, _) in found.items()}


@pytest.fixture(scope="module")
def image(spec: GraphSpec) -> dict[str, Any]:
    """A conditioned image as the golden case has it."""
    drawn = example_inputs(spec, torch.Generator().manual_seed(3))
    return {name: drawn[name].numpy() for name in ("conditioned", "skip0", "skip1")}


@pytest.mark.parametrize("stable", [False, True])
def test_the_module_is_the_video_models_step_for_0_to_8_points_boxes_and_priors(
    sam2: Sam2VideoModel,
    spec: GraphSpec,
    image: dict[str, Any],
    stable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stable:  # with random weights the single mask never is, and both ways have to be gone
        monkeypatch.setattr(sam2.mask_decoder, "dynamic_multimask_stability_thresh", 0.0)
    modules = Composition({"correct": TorchEngine(spec, Correct(sam2).eval())})
    measured = list(check_corrections(modules, sam2, image))
    inputs = {one.inputs for one in measured}
    for count in range(9):
        assert {f"random, {count} points", f"random, {count} points, a prior"} <= inputs
    assert "random, box and 6 points, a prior" in inputs
    assert max(one.error for one in measured) < 1e-6


@pytest.mark.parametrize("wrong", ["padding", "few", "stability", "clamp", "prior"])
def test_the_gate_sees_what_is_left_out(
    sam2: Sam2VideoModel,
    spec: GraphSpec,
    image: dict[str, Any],
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wrong == "few":
        monkeypatch.setattr(sam2.mask_decoder, "dynamic_multimask_stability_thresh", 0.0)
    module = Correct(sam2).eval()
    if wrong == "padding":
        embed = module.embed_points
        monkeypatch.setattr(module, "embed_points", lambda *a: embed(*a)[:, :-1])
    elif wrong == "few":
        module.most_for_three = 2
    elif wrong == "stability":
        module.threshold = -1.0
    elif wrong == "clamp":
        monkeypatch.setattr("recallseg.export.correcting.PRIOR_CLAMP", 1e6)
    else:
        candidates = module.decode

        def without(*given: Any) -> Any:
            return candidates(*given[:-1], torch.zeros_like(given[-1]))

        monkeypatch.setattr(module, "decode", without)
    modules = Composition({"correct": TorchEngine(spec, module)})
    with pytest.raises(ParityError, match="is off by"):
        list(check_corrections(modules, sam2, image))


@pytest.mark.parametrize("variant", ["portable", "tensorrt"])
def test_every_variant_passes_the_gate(
    variant: str, files: dict[str, Path], sam2: Sam2VideoModel, spec: GraphSpec
) -> None:
    engine = OnnxRuntimeCpu(spec, files[variant], EngineOptions())
    measured = list(check_graph(engine, Correct(sam2).eval(), variant=variant))
    assert len({one.inputs for one in measured}) == 9 * 2 + 7 * 2
    assert max(one.error for one in measured) < 1e-5
    if variant == "tensorrt":
        tensorrt.check_operators(files[variant])


@pytest.fixture(scope="module")
def prompted(spec: GraphSpec, files: dict[str, Path], image: dict[str, Any]) -> Any:
    """Inputs as the golden case has them, and what fp32 makes of them."""
    engine = OnnxRuntimeCpu(spec, files["portable"], EngineOptions())
    prior = np.random.default_rng(0).normal(0, 5, (SIZE // 4, SIZE // 4)).astype(np.float32)
    inputs = {**image, **vars(golden_prompts(prior))}
    expected = engine.allocate_outputs()
    engine.run(inputs, expected)
    return inputs, expected


@pytest.mark.parametrize("precision", FLOATING)
@pytest.mark.parametrize("variant", ["portable", "tensorrt"])
def test_every_floating_precision_is_within_its_tolerance(
    variant: str, precision: str, files: dict[str, Path], spec: GraphSpec, prompted: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    inputs, expected = prompted
    converted = convert_graph(onnx.load(files[variant]), precision, "correct")
    file = tmp_path / "correct.onnx"
    onnx.save(converted, file)
    found = {name: np.empty_like(array) for name, array in expected.items()}
    EmulatedEngine(spec, file).run(inputs, found)
    for name, array in expected.items():
        assert relative_error(found[name], array) < PRECISIONS[precision].tolerance


def test_a_corrector_of_its_own_leaves_the_segmenter_as_it_is(sam2: Sam2VideoModel) -> None:
    before = {name: value.clone() for name, value in sam2.state_dict().items()}
    tensors = {name: value + 1 for name, value in before.items() if is_corrector(name)}
    own = with_corrector(sam2, tensors)
    assert all(torch.equal(value, before[name]) for name, value in sam2.state_dict().items())
    for name, value in own.state_dict().items():
        assert torch.equal(value, tensors.get(name, before[name]))
    assert not any("conv_s" in name for name in tensors)
    with pytest.raises(ExportError, match="1 are missing, unknown or of another shape"):
        with_corrector(sam2, dict(list(tensors.items())[1:]))
