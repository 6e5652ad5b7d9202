"""Hugging Face folders: ``config.json`` with safetensors or PyTorch weights, whole or in shards.

Only local folders are read; nothing here ever asks a model hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EdgeTamVideoConfig,
    Sam2VideoConfig,
)

from recallseg.engines.errors import CheckpointError
from recallseg.engines.reading import is_there, read_text
from recallseg.export.checkpoints.architectures import set_edgetam_size, set_image_size
from recallseg.export.checkpoints.files import read_tensors
from recallseg.export.checkpoints.names import RENAMED, TWINS
from recallseg.export.checkpoints.recognition import MODEL_TYPES
from recallseg.export.checkpoints.strict import Piece
from recallseg.export.families.repvit import RepVitConfig

__all__ = [
    "is_of",
    "read_dinov2_config",
    "read_edgetam_config",
    "read_json",
    "read_licence",
    "read_model_type",
    "read_sam2_config",
    "read_weights",
    "resolve",
]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weight files in order of preference; each may instead be shards listed in ``NAME.index.json``."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; CheckpointError if it holds none."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as JSON: {error}. Copy the folder again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(data).__name__}; expected a JSON object. Copy the folder "
            "again."
        )
    return data


def read_model_type(folder: Path, expected: tuple[str, ...]) -> str:
    """Return what the folder's ``config.json`` calls its model.

    Raises
    ------
    CheckpointError
        When there is none, or it is none of ``expected``.
    """
    return str(_read_config(folder, expected)["model_type"])


def _model_type(data: Mapping[str, Any]) -> str:
    """Return what a ``config.json`` calls its model; empty if it does not say."""
    kind = data.get("model_type")
    return kind if isinstance(kind, str) else ""


def is_of(folder: Path, model_types: tuple[str, ...]) -> bool:
    """Tell whether a folder's model is one of these, or whether that cannot be told."""
    file = folder / "config.json"
    return not file.is_file() or _model_type(read_json(file)) in model_types


def _read_config(folder: Path, expected: tuple[str, ...]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        gate = " A gated model's files come once its licence was accepted on the hub."
        raise CheckpointError(
            f"'{folder}' has no config.json. Pass the folder that holds config.json and "
            f"{WEIGHTS[0]}; in a Hugging Face cache that is snapshots/REVISION.{gate}"
        )
    data = read_json(path)
    kind = _model_type(data)
    if kind not in expected:
        known = f", which is {MODEL_TYPES[kind]}" if kind in MODEL_TYPES else ""
        raise CheckpointError(
            f"'{path}' says model_type {data.get('model_type')!r}{known}; expected "
            f"{' or '.join(map(repr, expected))}. Pass the folder of the right model."
        )
    return data


def read_sam2_config(folder: Path, *, image_size: int) -> Sam2VideoConfig:
    """Read the configuration of a ``sam2_video`` or ``sam2`` folder and set its image size.

    Raises
    ------
    CheckpointError
        When the folder is none of the two, or its configuration is damaged.
    """
    data = _read_config(folder, ("sam2_video", "sam2"))
    try:
        if data["model_type"] == "sam2":
            # The image-only configuration is that of the video model without its memory settings.
            parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
            data = {
                part: {k: v for k, v in (data.get(part) or {}).items() if k != "model_type"}
                for part in parts
            }
            data["vision_config"]["model_type"] = "sam2_vision_model"
        config = Sam2VideoConfig.from_dict(data)
        set_image_size(config, image_size)
    # transformers' validation has error classes of its own, and nonsense can break it in any way.
    except Exception as error:
        raise _bad_config(folder, error) from error
    return config


def read_edgetam_config(folder: Path, *, image_size: int) -> EdgeTamVideoConfig:
    """Read the configuration of an ``edgetam_video`` folder and set its image size.

    Raises
    ------
    CheckpointError
        When it is none, has another image encoder than RepViT-M1, or is damaged.
    """
    data = _read_config(folder, ("edgetam_video",))
    try:
        backbone = data["vision_config"]["backbone_config"]
        name = str(backbone["architecture"]).removeprefix("timm/").split(".")[0]
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad_config(folder, error) from error
    if name != "repvit_m1":
        raise CheckpointError(
            f"'{folder / 'config.json'}' has the image encoder '{name}'; EdgeTAM's is repvit_m1, "
            "and no other can be exported."
        )
    data["vision_config"]["backbone_config"] = {"model_type": RepVitConfig.model_type}
    try:
        config = EdgeTamVideoConfig.from_dict(data)
        set_edgetam_size(config, image_size)
    except Exception as error:
        raise _bad_config(folder, error) from error
    return config


def read_dinov2_config(folder: Path) -> Dinov2Config | Dinov2WithRegistersConfig:
    """Read the configuration of a ``dinov2`` or ``dinov2_with_registers`` folder.

    Raises
    ------
    CheckpointError
        When the folder is none of the two, or its configuration is damaged.
    """
    data = _read_config(folder, ("dinov2", "dinov2_with_registers"))
    kind = Dinov2Config if data["model_type"] == "dinov2" else Dinov2WithRegistersConfig
    try:
        return kind.from_dict(data)
    except Exception as error:
        raise _bad_config(folder, error) from error


def _bad_config(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"'{folder / 'config.json'}' is no usable configuration ({reason}). Copy the file again "
        "from where the weights came from."
    )


def read_licence(folder: Path) -> str | None:
    """Return the licence that the folder's model card (README.md) declares, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.match(
        r"---\s*\n(?:(?!---).*\n)*?license:\s*(\S+)", card.read_text("utf-8", "replace")
    )
    return found[1] if found else None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of the folder.

    Raises
    ------
    CheckpointError
        When there are none, a shard is missing, or a file is damaged.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    kind = _model_type(read_json(folder / "config.json"))
    family = f"{MODEL_TYPES[kind]}, model_type {kind!r}" if kind in MODEL_TYPES else repr(kind)
    raise CheckpointError(
        f"'{folder}' has a config.json (of {family}) but no weights. Expected "
        f"{' or '.join(WEIGHTS)} (or their shards with an index.json) beside it; finish the "
        "download. A gated model's files come once its licence was accepted on the hub."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"'{index}' has no weight_map. Copy the folder again.")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard or not is_there(path):
            raise CheckpointError(
                f"'{index}' lists the shard '{shard}', which is not in its folder. Finish the "
                "download, or copy the folder again."
            )
        tensors.update(read_tensors(path))
    return tensors


def resolve(name: str, tensors: Mapping[str, Tensor]) -> Piece:
    """Say where the model's tensor ``name`` lies in the folder, whichever transformers wrote it."""
    if name in tensors:
        return Piece((name,))
    if name in TWINS:
        return Piece(tuple(twin for twin in TWINS if twin in tensors) or (name,))
    for now, (before, part, parts) in RENAMED.items():
        source = name.replace(f".{now}.", f".{before}.")
        if source != name and source in tensors:
            return Piece((source,), part, parts)
    newer = tuple(
        source
        for now, (before, _, _) in RENAMED.items()
        if (source := name.replace(f".{before}.", f".{now}.")) != name and source in tensors
    )
    return Piece(newer or (name,))
