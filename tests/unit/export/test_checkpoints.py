"""Sources: random, demo and missing ones, image sizes, what is recorded about the weights."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    Sam2VideoModel,
    Sam2VisionModel,
)

from recallseg.engines.errors import CheckpointError, InputError
from recallseg.export.checkpoints import (
    Loaded,
    architectures,
    files,
    load_dinov2,
    load_embedder,
    load_sam2,
    load_segmenter,
    sources,
    state_digest,
)
from recallseg.export.checkpoints.files import read_tensors
from recallseg.export.checkpoints.random_weights import draw, random_state
from recallseg.export.checkpoints.strict import tensor_shapes


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_sam2("random:tiny", image_size=256)


@pytest.fixture
def small_is_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``random:small`` of DINOv2 quick to load."""
    mini = architectures.Dinov2Architecture(width=64, depth=2)
    monkeypatch.setitem(architectures.DINOV2, "small", mini)  # type: ignore[arg-type]


def test_random_sam2_is_the_true_architecture_at_the_asked_size(tiny: Loaded) -> None:
    assert tiny.architecture == "sam2.1-hiera-tiny"
    assert tiny.source == "random"
    assert "no useful masks" in tiny.description
    assert sum(p.numel() for p in tiny.model.parameters()) == 38_962_498
    assert not tiny.model.training
    assert {p.dtype for p in tiny.model.parameters()} == {torch.float32}
    config: Any = tiny.model.config
    assert config.image_size == config.prompt_encoder_config.image_size == 256
    assert config.vision_config.backbone_feature_sizes == [[64, 64], [32, 32], [16, 16]]
    assert config.vision_config.backbone_config.image_size == [256, 256]
    assert config.memory_attention_rope_feat_sizes == [16, 16]


def test_no_parameter_of_random_weights_is_zero_or_constant(tiny: Loaded) -> None:
    dull = [
        name
        for name, tensor in tiny.model.state_dict().items()
        if float(tensor.abs().mean()) < 1e-2 or (tensor.numel() > 1 and float(tensor.std()) < 1e-2)
    ]
    assert dull == []


def test_random_weights_say_that_objects_are_present(tiny: Loaded) -> None:
    image = torch.from_numpy(_noise((1, 3, 256, 256)))
    model: Any = tiny.model
    with torch.inference_mode():
        score = model._single_frame_forward(pixel_values=image).object_score_logits
    assert float(score.min()) > 1


def _noise(shape: tuple[int, ...]) -> Any:
    return draw("image", shape, seed=0).numpy()


@pytest.mark.usefixtures("small_is_mini")
def test_random_weights_follow_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_dinov2("random:small", seed=s) for s in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_weights_stay_the_same_between_versions() -> None:
    # Bundles made from random weights keep their identity only while these values do.
    values = draw("memory_encoder.projection.weight", (64, 256, 1, 1), seed=3).reshape(-1)[:3]
    expected = torch.tensor([0.0613498166, 0.0795928016, 0.0364307128])
    assert torch.allclose(values, expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("small_is_mini")
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("random:s", "dinov2-small"),
        ("random:vits14", "dinov2-small"),
        ("random:small-registers", "dinov2-small-registers"),
        ("random:s-reg", "dinov2-small-registers"),
    ],
)
def test_random_dinov2(source: str, architecture: str) -> None:
    loaded = load_dinov2(source)
    assert loaded.architecture == architecture
    kind = Dinov2WithRegistersModel if "registers" in architecture else Dinov2Model
    assert type(loaded.model) is kind
    assert loaded.model.config.image_size == 518


@pytest.mark.parametrize("alias", ["base-plus", "base+", "b+", "base_plus"])
def test_aliases_of_base_plus(alias: str) -> None:
    assert architectures.SAM2_ALIASES[alias] == "base-plus"


@pytest.mark.parametrize("load", [lambda s: load_sam2(s, image_size=256), load_dinov2])
def test_unknown_architecture_lists_the_known_ones(load: Callable[[str], Loaded]) -> None:
    with pytest.raises(
        CheckpointError, match=r"'random:huge' names no .*random:small.*random:demo"
    ):
        load("random:huge")


@pytest.mark.parametrize("size", [0, 224, 250, 1000, -256, 256.0, True, "512"])
def test_image_size_that_does_not_fit_is_refused_with_those_that_do(size: Any) -> None:
    with pytest.raises(InputError, match=r"256, 384, 512, 768, 1024.*multiple of 32 from 256"):
        load_sam2("random:tiny", image_size=size)


@pytest.mark.usefixtures("small_is_mini")
@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_seed_must_be_a_natural_number(seed: Any) -> None:
    with pytest.raises(InputError, match="seed"):
        load_dinov2("random:small", seed=seed)


@pytest.mark.parametrize("name", ["tiny", "base-plus", "large"])
def test_every_architecture_runs_at_every_size(name: str) -> None:
    """All windows, backgrounds and block counts; small differs from tiny in its count only."""
    config = architectures.sam2_config(name, newer=True, image_size=256)
    vision: Any = config.vision_config
    with torch.device("meta"):
        encoder = Sam2VisionModel(vision).eval()
        for size in (256, 288, 384, 512, 1024) if name == "tiny" else (288,):
            architectures.set_image_size(config, size)
            maps = encoder(torch.empty(1, 3, size, size)).fpn_hidden_states
            assert [list(m.shape[-2:]) for m in maps] == vision.backbone_feature_sizes


@pytest.mark.parametrize("name", ["tiny", "base-plus"])
def test_no_weight_depends_on_the_image_size(name: str) -> None:
    shapes = [
        tensor_shapes(Sam2VideoModel, architectures.sam2_config(name, newer=True, image_size=size))
        for size in (256, 1024)
    ]
    assert shapes[0] == shapes[1]


def test_digest_is_that_of_the_model_and_sees_name_shape_and_value(tiny: Loaded) -> None:
    assert tiny.former_digests == (state_digest(tiny.model.state_dict()),)
    ones = torch.ones(2, 3)
    changed = ones.clone()
    changed[1, 2] = 1 + 1e-6
    digests = {
        state_digest({"a": ones}),
        state_digest({"b": ones}),
        state_digest({"a": ones.reshape(3, 2)}),
        state_digest({"a": ones.to(torch.float16)}),
        state_digest({"a": changed}),
        state_digest({"a": ones, "b": ones}),
    }
    assert len(digests) == 6
    # Neither the order of the names nor the strides count.
    both = {"a": ones, "b": changed}
    assert state_digest(both) == state_digest({"b": changed.t().contiguous().t(), "a": ones})


@pytest.mark.usefixtures("small_is_mini")
def test_licence_can_be_said() -> None:
    assert load_dinov2("random:small").licence == "Apache-2.0"
    assert load_dinov2("random:small", licence="CC-BY-4.0").licence == "CC-BY-4.0"


def test_hub_name_is_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        CheckpointError, match=r"no local folder or file.*hf download .*--local-dir"
    ):
        load_sam2("facebook/sam2.1-hiera-tiny", image_size=256)
    with pytest.raises(CheckpointError, match=r"Nothing is downloaded.*dinov2_vits14_pretrain.pth"):
        load_dinov2("facebook/dinov2-small")


def test_without_demo_weights_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "DEMO_WEIGHTS", tmp_path)
    for source in ("demo", "random:demo"):
        with pytest.raises(CheckpointError, match=r"SAM 2 weights are .* not in this installation"):
            load_sam2(source, image_size=256)
        with pytest.raises(
            CheckpointError, match=r"DINOv2 weights are .* not in this installation"
        ):
            load_dinov2(source)


def test_demo_and_random_demo_share_the_shipped_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    state = random_state(tensor_shapes(Dinov2Model, config), seed=9)
    model = Dinov2Model(config)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "dinov2")
    monkeypatch.setattr(sources, "DEMO_WEIGHTS", tmp_path)
    demo, random = load_dinov2("demo"), load_dinov2("random:demo")
    assert (demo.source, random.source) == ("demo", "random")
    assert demo.former_digests[0] == state_digest(state) != random.former_digests[0]
    assert demo.digest != random.digest
    assert demo.architecture == random.architecture == "dinov2-custom"
    assert demo.model.state_dict().keys() == random.model.state_dict().keys()


@pytest.mark.skipif(
    not (sources.DEMO_WEIGHTS / "sam2" / "config.json").is_file(),
    reason="the demo weights are not in this checkout",
)
def test_shipped_demo_weights_load() -> None:
    sam2, dinov2 = load_sam2("demo", image_size=256), load_dinov2("demo")
    assert sam2.source == dinov2.source == "demo"
    assert load_sam2("random:demo", image_size=256).digest != sam2.digest


@pytest.mark.parametrize("name", ["x.pt", "model.safetensors"])
@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"\n<!doctype html><title>401</title>", "is a web page.*gated model"),
        (b"not weights at all", "cannot be read as weights|no readable safetensors"),
    ],
)
def test_what_downloads_leave_is_named(tmp_path: Path, name: str, head: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(head)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_tensors(file)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to execute it


def test_a_header_of_any_length_is_no_web_page(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header: of 15392 bytes, that is " <"."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for length in (15392, 316):
        data = struct.pack("<Q", length) + header.ljust(length) + struct.pack("<f", 2.5)
        (tmp_path / "a.safetensors").write_bytes(data)
        assert read_tensors(tmp_path / "a.safetensors")["a"].item() == 2.5


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_weights_that_the_machine_does_not_give_are_not_called_damaged(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    reader = (files, "load_file") if name.endswith("safetensors") else (torch, "load")

    def fail(error: Exception) -> None:
        def read(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(*reader, read)

    fail(OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error\. The file may"):
        read_tensors(tmp_path / name)
    fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: Cannot allocate memory"))
    with pytest.raises(MemoryError, match="needs more memory"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", "~nobody-is-called-so/x"])
def test_a_name_that_no_file_can_have_is_no_file(source: str) -> None:
    for load in (load_segmenter, load_embedder):
        with pytest.raises(CheckpointError, match="is no local folder or file"):
            load(source)


def test_a_seed_is_looked_at_whatever_the_network() -> None:
    with pytest.raises(InputError, match="seed -1 cannot be used"):
        load_embedder("random:dinov3-small", seed=-1)
