"""Checkpoints in parts, and weights as a folder that the loaders read like any other model."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from recallseg.engines.durable import replace_folder

__all__ = ["load_checkpoint", "save_checkpoint", "save_tensors", "save_weights"]

# Artefact stores and code hosts have limits on single files; eight parts of this size are enough.
PART_BYTES = 15 * 1024 * 1024


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a training state as ``part-00``, ... in a folder, replacing the one before at once."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    with replace_folder(folder) as fresh:
        for number, start in enumerate(range(0, len(data), PART_BYTES)):
            (fresh / f"part-{number:02d}").write_bytes(data[start : start + PART_BYTES])


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote."""
    parts = sorted(folder.glob("part-*"))
    if not parts:
        raise FileNotFoundError(f"no checkpoint parts in {folder}; train from the start instead")
    data = b"".join(part.read_bytes() for part in parts)
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return state


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as half-precision safetensors, at once; those that are not floating stay."""
    half = {n: v.half() if v.is_floating_point() else v for n, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    save_file({name: value.contiguous() for name, value in half.items()}, fresh)
    os.replace(fresh, path)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as half-precision safetensors with its configuration; each file at once.

    The model itself is left in single precision.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    state: dict[str, Tensor] = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.save_pretrained(fresh, state_dict=state)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    shutil.rmtree(fresh)
