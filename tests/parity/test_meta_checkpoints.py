"""Meta's files give the outputs of Meta's own code, and every official layout is known.

The references were made by ``tests/fixtures/checkpoints/make_meta_reference.py`` with Meta's
packages; the weights are made again here by ``recipe.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.checkpoints import recipe
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Sam2VideoModel,
)

from recallseg.export.checkpoints import (
    architectures,
    load_dinov2,
    load_sam2,
    meta_dinov2,
    meta_sam2,
    state_digest,
)
from recallseg.export.checkpoints.strict import tensor_shapes
from recallseg.export.graphs import Attend, Decode, Encode, MaskHead, Memorize

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "checkpoints"

TOLERANCE = 1e-5
"""Relative to the largest sampled value. Both are PyTorch in fp32; 7e-7 was measured. These outputs
depend on every parameter but :data:`UNREACHED` and key biases, which a softmax cancels."""

SIZE = 256

DINOV2_CLASSES: dict[type, Any] = {
    Dinov2Config: Dinov2Model,
    Dinov2WithRegistersConfig: Dinov2WithRegistersModel,
}


LAYOUTS: dict[str, Any] = json.loads((FIXTURES / "meta_layouts.json").read_text())


def _sam2_layout(name: str, newer: bool) -> dict[str, tuple[int, ...]]:
    entry = LAYOUTS[f"sam2.1-hiera-{name}"]
    shapes = recipe.unfold(entry["tensors"])
    return {n: s for n, s in shapes.items() if newer or n not in entry["not_in_sam2"]}


def _dinov2_layout(name: str, registers: bool) -> dict[str, tuple[int, ...]]:
    shapes = recipe.unfold(LAYOUTS[f"dinov2-{name}"]["tensors"])
    return {n: s for n, s in shapes.items() if registers or n != "register_tokens"}


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(np.asarray(recipe.weight(n, s))) for n, s in shapes.items()}


def _shells(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _error(reference: np.ndarray, name: str, tensor: Tensor) -> float:
    """Largest difference in norm or sampled values, relative to the largest sampled value."""
    found = recipe.sample(name, tensor.numpy())
    norm = abs(float(found[0] / reference[0]) - 1)
    return max(norm, float(np.abs(found[1:] - reference[1:]).max() / np.abs(reference[1:]).max()))


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("name", list(architectures.SAM2))
def test_every_sam2_layout_is_recognised_and_used_up(name: str, newer: bool) -> None:
    layout = _sam2_layout(name, newer)
    config = meta_sam2.infer_config(_shells(layout), "file", image_size=512)
    assert architectures.sam2_name(config) == f"sam2{'.1' if newer else ''}-hiera-{name}"
    shapes = tensor_shapes(Sam2VideoModel, config)
    pieces = {n: meta_sam2.resolve(n, {}) for n in shapes}
    sources = {s: p.source_shape(shapes[n]) for n, p in pieces.items() for s in p.sources}
    assert sources == layout


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("name", list(architectures.DINOV2))
def test_every_dinov2_layout_is_recognised_and_used_up(name: str, registers: bool) -> None:
    layout = _dinov2_layout(name, registers)
    config = meta_dinov2.infer_config(_shells(layout), "file")
    assert architectures.dinov2_name(config) == f"dinov2-{name}{'-registers' * registers}"
    assert config.num_attention_heads == LAYOUTS[f"dinov2-{name}"]["heads"]
    assert config.image_size == 518
    shapes = tensor_shapes(DINOV2_CLASSES[type(config)], config)
    pieces = {n: meta_dinov2.resolve(n, {}) for n in shapes}
    sources = {s: p.source_shape(shapes[n]) for n, p in pieces.items() for s in p.sources}
    assert sources == layout


@pytest.mark.parametrize("name", list(architectures.SAM2))
def test_what_shapes_do_not_tell_is_as_in_metas_code(name: str) -> None:
    with torch.device("meta"):
        model = Sam2VideoModel(architectures.sam2_config(name, newer=True, image_size=1024))
    blocks: Any = model.vision_encoder.backbone.blocks
    found = [
        [b.attn.num_attention_heads, b.window_size, b.query_stride[0] if b.query_stride else 1]
        for b in blocks
    ]
    assert found == LAYOUTS[f"sam2.1-hiera-{name}"]["blocks"]


@pytest.fixture(scope="module", params=["sam2.1", "sam2"])
def sam2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our outputs for Meta's tiny architecture, and Meta's."""
    weights = _weights(_sam2_layout("tiny", newer=request.param == "sam2.1"))
    folder = tmp_path_factory.mktemp("meta")
    if request.param == "sam2.1":
        # A name that tells nothing; the wrapper of Meta's files; what trainings keep beside it.
        file = folder / "finetuned.pt"
        torch.save({"model": weights, "epoch": 3, "optimizer": {"state": {}}}, file)
    else:
        file = folder / "weights.safetensors"
        save_file(weights, file)
    loaded = load_sam2(str(file), image_size=SIZE)
    file.unlink()
    assert loaded.architecture == f"{request.param}-hiera-tiny"
    assert loaded.source == "pretrained"
    assert loaded.digest == state_digest(weights)  # of the file as Meta wrote it
    assert isinstance(loaded.model, Sam2VideoModel)
    assert not loaded.model.training
    with torch.inference_mode():
        outputs = _sam2_outputs(loaded.model)
    with np.load(FIXTURES / "meta_sam2.npz") as stored:
        prefix = f"{request.param}/"
        reference = {k[len(prefix) :]: stored[k] for k in stored.files if k.startswith(prefix)}
    state = loaded.model.state_dict()
    return outputs, reference, {name: state[name] for name in UNREACHED}


UNREACHED = {
    "no_memory_embedding": "no_mem_embed",
    "no_memory_positional_encoding": "no_mem_pos_enc",
    "prompt_encoder.point_embed.weight": "sam_prompt_encoder.point_embeddings.*.weight",
} | {
    f"mask_decoder.output_hypernetworks_mlps.{mask}.{ours}.{leaf}": (
        f"sam_mask_decoder.output_hypernetworks_mlps.{mask}.layers.{layer}.{leaf}"
    )
    for mask in range(4)
    for layer, ours in enumerate(("proj_in", "layers.0", "proj_out"))
    for leaf in ("weight", "bias")
}
"""Tensors that these outputs do not depend on, and their names in Meta's files."""


def test_tensors_that_no_output_reaches_are_the_right_ones(sam2: Any) -> None:
    _, _, state = sam2
    for ours, theirs in UNREACHED.items():
        names = [theirs.replace("*", str(i)) for i in range(4)] if "*" in theirs else [theirs]
        shape = state[ours].shape
        part = (shape[0] // len(names), *shape[1:])
        wanted = np.concatenate([recipe.weight(name, part) for name in names])
        np.testing.assert_array_equal(state[ours].numpy(), wanted)


def _sam2_outputs(model: Sam2VideoModel) -> dict[str, Tensor]:
    head = MaskHead(model)
    encode, memorize, decode = Encode(model), Memorize(model, head), Decode(head)
    given = torch.from_numpy(recipe.masks(SIZE))
    outputs: dict[str, Tensor] = {}
    memories, pointers = [], []
    for index in (0, 1):
        image = torch.from_numpy(recipe.image(f"exemplar {index}", SIZE))
        features, skip0, skip1 = encode(image)
        memory, pointer = memorize(features, skip0, skip1, given if index == 0 else given.flip(-1))
        memories.append(memory)
        pointers.append(pointer)
        grid = memory.transpose(1, 2).unflatten(2, (SIZE // 16, SIZE // 16))
        outputs |= {f"skip0 {index}": skip0, f"skip1 {index}": skip1}
        outputs |= {f"features {index}": features, f"memories {index}": grid}
        outputs |= {f"pointers {index}": pointer}
    features, skip0, skip1 = encode(torch.from_numpy(recipe.image("query", SIZE)))
    # Frames 0 and 1 seen from frame 3, over the most pointers (16) less one.
    time = torch.tensor([[3.0, 2.0], [3.0, 2.0]]) / 15
    conditioned = Attend(model)(features, torch.stack(memories, 1), torch.stack(pointers, 1), time)
    logits, iou, score = decode(conditioned, skip0, skip1)
    outputs |= {"conditioned": conditioned, "logits": logits, "iou": iou, "object_score": score}
    return outputs


SAM2_OUTPUTS = (
    *(f"{n} {i}" for n in ("features", "skip0", "skip1", "memories", "pointers") for i in (0, 1)),
    *("conditioned", "logits", "iou", "object_score"),
)


@pytest.mark.parametrize("tensor", SAM2_OUTPUTS)
def test_sam2_file_gives_the_outputs_of_metas_code(sam2: Any, tensor: str) -> None:
    outputs, reference, _ = sam2
    assert _error(reference[tensor], tensor, outputs[tensor]) < TOLERANCE


def test_transformers_differs_from_meta_only_in_the_pointer_of_a_given_mask(sam2: Any) -> None:
    """Meta takes the single-mask token, transformers the best of three; the memories agree."""
    outputs, reference, _ = sam2
    for index in (0, 1):
        memory = _error(
            reference[f"memories of Meta {index}"],
            f"memories of Meta {index}",
            outputs[f"memories {index}"],
        )
        pointer = _error(
            reference[f"pointers of Meta {index}"],
            f"pointers of Meta {index}",
            outputs[f"pointers {index}"],
        )
        assert memory < TOLERANCE
        assert pointer > 100 * TOLERANCE


@pytest.fixture(scope="module")
def dinov2_reference() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "meta_dinov2.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def dinov2_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[bool, int], tuple[np.ndarray, np.ndarray]]:
    models: dict[bool, Any] = {}

    def run(registers: bool, size: int) -> tuple[np.ndarray, np.ndarray]:
        if registers not in models:
            file = tmp_path_factory.mktemp("dinov2") / "x.pth"
            weights = _weights(_dinov2_layout("small", registers))
            torch.save(weights, file)
            loaded = load_dinov2(str(file))
            assert loaded.digest == state_digest(weights)
            models[registers] = loaded.model
            file.unlink()
        with torch.inference_mode():
            out = models[registers](torch.from_numpy(recipe.image("query", size)))
        patches = out.last_hidden_state[:, 1 + 4 * registers :].numpy()
        return out.pooler_output.numpy(), recipe.sample("patches", patches)

    return run


@pytest.mark.parametrize(
    ("case", "registers", "size"),
    [
        ("small/native", False, 518),
        ("small/224 without shift", False, 224),
        ("small-registers/224", True, 224),
    ],
)
def test_dinov2_file_gives_the_outputs_of_metas_code(
    dinov2_reference: dict[str, np.ndarray],
    dinov2_run: Callable[[bool, int], tuple[np.ndarray, np.ndarray]],
    case: str,
    registers: bool,
    size: int,
) -> None:
    for found, name in zip(dinov2_run(registers, size), ("token", "patches"), strict=True):
        wanted = dinov2_reference[f"{case}/{name}"]
        assert np.abs(found - wanted).max() / np.abs(wanted).max() < TOLERANCE


def test_metas_shift_of_the_position_grid_is_the_only_difference_at_224(
    dinov2_reference: dict[str, np.ndarray],
    dinov2_run: Callable[[bool, int], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Without registers Meta shifts the grid by 0.1 patch, transformers does not (pitfall 9).

    With white noise for a position embedding, the worst case, the cosine changes by 5e-5.
    """
    token, _ = dinov2_run(False, 224)
    wanted = dinov2_reference["small/224/token"]
    cosine = float((token * wanted).sum() / np.linalg.norm(token) / np.linalg.norm(wanted))
    assert 1e-6 < 1 - cosine < 1e-3


def test_swiglu_halves_are_taken_in_metas_order(
    dinov2_reference: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    mini = architectures.Dinov2Architecture(width=64, depth=2, swiglu=True)
    monkeypatch.setitem(architectures.DINOV2, "mini", mini)  # type: ignore[arg-type]
    config = architectures.dinov2_config("mini", registers=0, image_size=56)
    shapes = tensor_shapes(DINOV2_CLASSES[type(config)], config)
    layout = {
        source: piece.source_shape(shapes[name])
        for name in shapes
        for piece in (meta_dinov2.resolve(name, {}),)
        for source in piece.sources
    }
    file = tmp_path / "mini.safetensors"
    save_file(_weights(layout), file)
    loaded = load_dinov2(str(file))
    assert loaded.digest == state_digest(_weights(layout))
    model: Any = loaded.model
    with torch.inference_mode():
        out = model(torch.from_numpy(recipe.image("query", 56)))
    wanted = dinov2_reference["mini swiglu/token"]
    assert np.abs(out.pooler_output.numpy() - wanted).max() / np.abs(wanted).max() < TOLERANCE
