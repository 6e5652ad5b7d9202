"""Meta's files: what is wrong with one is named; damaged and hostile files are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.checkpoints import recipe
from safetensors.torch import save_file
from torch import Tensor

from recallseg.engines.errors import CheckpointError
from recallseg.export.checkpoints import Loaded, architectures, load_dinov2, load_sam2

LAYOUTS = Path(__file__).resolve().parents[2] / "fixtures" / "checkpoints" / "meta_layouts.json"

State = dict[str, Tensor]


def _load(path: Path) -> Loaded:
    return load_sam2(str(path), image_size=256)


@pytest.fixture(scope="module")
def tiny() -> State:
    """Meta's SAM 2.1 tiny with one stored value per tensor, so that files are small."""
    layout = recipe.unfold(json.loads(LAYOUTS.read_text())["sam2.1-hiera-tiny"]["tensors"])
    return {name: torch.full((1,), 0.5).expand(shape) for name, shape in layout.items()}


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
def test_wrapped_and_parallel_state_dicts(tmp_path: Path, wrapper: str | None) -> None:
    mini = architectures.Dinov2Architecture(64, 2)
    state = _mini_dinov2(mini)
    content: Any = {f"module.{name}": tensor for name, tensor in state.items()}
    file = tmp_path / "x.pth"
    torch.save({wrapper: content, "epoch": 1} if wrapper else content, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.DINOV2, "mini", mini)  # type: ignore[arg-type]
        loaded = load_dinov2(str(file))
    assert loaded.architecture == "dinov2-mini"
    found = loaded.model.state_dict()["encoder.layer.1.attention.k_proj.bias"]
    assert torch.equal(found, state["blocks.1.attn.qkv.bias"][64:128])


def _mini_dinov2(mini: architectures.Dinov2Architecture) -> State:
    layout = recipe.unfold(json.loads(LAYOUTS.read_text())["dinov2-small"]["tensors"])
    scale = mini.width / 384
    state = {}
    for name, shape in layout.items():
        if name == "register_tokens" or (name.startswith("blocks.") and name.split(".")[1] > "1"):
            continue
        if name == "pos_embed":
            shape = (1, 17, 384)
        small = tuple(round(s * scale) if s % 384 == 0 else s for s in shape)
        state[name] = torch.from_numpy(recipe.weight(name, small))
    return state


def test_meta_and_hugging_face_give_the_same_digest(tmp_path: Path) -> None:
    mini = architectures.Dinov2Architecture(64, 2)
    torch.save(_mini_dinov2(mini), tmp_path / "x.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.DINOV2, "mini", mini)  # type: ignore[arg-type]
        from_meta = load_dinov2(str(tmp_path / "x.pth"))
    from_meta.model.save_pretrained(tmp_path / "folder")
    from_folder = load_dinov2(str(tmp_path / "folder"))
    assert from_folder.digest == from_meta.digest


def test_missing_tensor_of_a_meta_file_has_its_name_there(tmp_path: Path, tiny: State) -> None:
    state = dict(tiny)
    del state["memory_encoder.fuser.layers.1.gamma"]
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"missing tensors \(1\): 'memory_encoder.fuser.layers.1.gamma'"
    ):
        _load(tmp_path / "x.pt")


def test_half_of_what_sam_2_1_added_is_no_sam_2(tmp_path: Path, tiny: State) -> None:
    state = {n: t for n, t in tiny.items() if n != "no_obj_embed_spatial"}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\): 'no_obj_embed_spatial'"):
        _load(tmp_path / "x.pt")


def test_unknown_image_encoder_is_described(tmp_path: Path, tiny: State) -> None:
    state = {n: t for n, t in tiny.items() if ".blocks.11." not in n}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\(1, 2, 7, 1\) blocks per stage.*none of SAM 2's"):
        _load(tmp_path / "x.pt")
    state = {n: t for n, t in tiny.items() if not n.startswith("image_encoder.")}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'image_encoder.trunk.pos_embed'"):
        _load(tmp_path / "x.pt")


def test_file_of_the_other_model(tmp_path: Path, tiny: State) -> None:
    torch.save({"model": tiny}, tmp_path / "sam2.pt")
    torch.save(_mini_dinov2(architectures.Dinov2Architecture(64, 2)), tmp_path / "dinov2.pth")
    with pytest.raises(
        CheckpointError, match=r"no DINOv2 file in its .* layout; it is one of SAM 2"
    ):
        load_dinov2(str(tmp_path / "sam2.pt"))
    with pytest.raises(CheckpointError, match="no SAM 2 file in its publisher's layout"):
        _load(tmp_path / "dinov2.pth")
    with pytest.raises(CheckpointError, match=r"64 channels, 2 blocks.*none of DINOv2's"):
        load_dinov2(str(tmp_path / "dinov2.pth"))


def test_weights_of_a_folder_are_passed_as_the_folder(tmp_path: Path) -> None:
    save_file({"vision_encoder.neck.convs.0.bias": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="for a file from a Hugging Face folder, that folder"):
        _load(tmp_path / "model.safetensors")


# --- damaged and hostile files --------------------------------------------------------------------


class _Trap:
    """Unpickled without care, this makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["archive", "plain pickle", "folder"])
def test_pickle_is_never_executed(tmp_path: Path, kind: str) -> None:
    sprung = tmp_path / "sprung"
    if kind == "folder":
        architectures.sam2_config("tiny", newer=True, image_size=256).save_pretrained(tmp_path)
        source, file = tmp_path, tmp_path / "pytorch_model.bin"
    else:
        source = file = tmp_path / "x.pt"
    if kind == "plain pickle":
        file.write_bytes(pickle.dumps({"model": _Trap(str(sprung))}))
    else:
        torch.save({"model": {"a": torch.ones(1)}, "trap": _Trap(str(sprung))}, file)
    with pytest.raises(CheckpointError, match="would have to be executed, which is never done"):
        _load(source)
    assert not sprung.exists()
    # The trap works: the loader, not the trap, is what stopped it.
    torch.load(file, weights_only=False) if kind != "plain pickle" else pickle.loads(
        file.read_bytes()
    )
    assert sprung.is_dir()


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors", "x.txt"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text\n", b"\x80\x02}q\x00.", b"PK\x03\x04"]
)
def test_file_that_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        _load(file)


def test_truncated_archive(tmp_path: Path, tiny: State) -> None:
    file = tmp_path / "x.pt"
    torch.save({"model": tiny}, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="damaged"):
        _load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; expected a dictionary"),
        ({"model": {"a": 3}}, r"no tensors \(1\): a"),
        ({"epoch": 3, "weights": torch.ones(1)}, r"no tensors \(1\): epoch"),
        ({"model": {}}, "holds no tensors"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "x.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        _load(file)


@pytest.mark.parametrize("shape", [(), (3,), (1, 96, 7)])
@pytest.mark.parametrize("name", ["pos_embed", "pos_embed_window"])
def test_what_tells_the_architecture_of_sam_2_has_four_axes(
    tmp_path: Path, tiny: State, name: str, shape: tuple[int, ...]
) -> None:
    name = f"image_encoder.trunk.{name}"
    torch.save({**tiny, name: torch.zeros(shape)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"'{name}', which tells .* expected 4 axes"):
        _load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "register_tokens"])
def test_what_tells_the_architecture_of_dinov2_has_its_axes(tmp_path: Path, name: str) -> None:
    mini = architectures.Dinov2Architecture(64, 2)
    for shape in ((), (3,)):
        torch.save({**_mini_dinov2(mini), name: torch.zeros(shape)}, tmp_path / "x.pth")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(architectures.DINOV2, "mini", mini)  # type: ignore[arg-type]
            with pytest.raises(CheckpointError, match=f"'{name}', which tells the architecture"):
                load_dinov2(str(tmp_path / "x.pth"))


def test_a_block_of_any_number_costs_no_time(tmp_path: Path, tiny: State) -> None:
    name = "image_encoder.trunk.blocks.999999999999.norm1.weight"
    torch.save({**tiny, name: torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"unexpected tensors .*{name}"):
        _load(tmp_path / "x.pt")
