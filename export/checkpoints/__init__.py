"""Checkpoints in: official files, Hugging Face folders, random and demo weights -> a model.

A source (SRC on the command line) is

- a Hugging Face folder (``config.json`` with ``model.safetensors``, its shards, or
  ``pytorch_model.bin``);
- one of Meta's files (``sam2.1_hiera_tiny.pt``, ``edgetam.pt``, ``dinov2_vits14_pretrain.pth``,
  ...) or a fine-tuned file of the same layout, also as safetensors; the architecture is recognised
  by the tensors, not by the file's name;
- ``random:ARCHITECTURE`` for latency work and tests, ``random:demo`` for the demo model's shape;
- ``demo`` for the small demo model that is shipped.

Loading is strict (:mod:`.strict`), executes no pickle (:mod:`.files`) and reaches no network.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    PreTrainedModel,
    Sam2VideoConfig,
    Sam2VideoModel,
)

from recallseg.export.checkpoints import huggingface, meta_dinov2, meta_edgetam, meta_sam2
from recallseg.export.checkpoints.architectures import (
    DINOV2,
    DINOV2_ALIASES,
    DINOV2_REGISTERS,
    EDGETAM,
    SAM2,
    SAM2_ALIASES,
    dinov2_config,
    dinov2_name,
    edgetam_config,
    sam2_config,
    sam2_name,
)
from recallseg.export.checkpoints.digest import state_digest
from recallseg.export.checkpoints.embedders import DINOV3, load_folder, load_random_dinov3
from recallseg.export.checkpoints.fine_tuned import fine_tuned_sam2
from recallseg.export.checkpoints.sources import DEMO, RANDOM, Loaded, Loader, load, local_path
from recallseg.export.families.sam2 import SAM2_FAMILY

__all__ = ["Loaded", "load_dinov2", "load_embedder", "load_sam2", "load_segmenter", "state_digest"]

IMAGE_SIZE = 1024
"""Side in pixels at which SAM 2 and EdgeTAM were trained."""


def load_segmenter(
    src: str, *, image_size: int | None = None, seed: int = 0, licence: str | None = None
) -> Loaded:
    """Load SAM 2, SAM 2.1 or EdgeTAM, whichever the source is.

    Parameters
    ----------
    src : a source as listed in :mod:`recallseg.export.checkpoints`. ``random:tiny``,
        ``random:small``, ``random:base-plus`` and ``random:large`` are SAM 2.1; ``random:edgetam``.
    image_size : side in pixels of the square that the model sees; the weights do not depend on it.
        For SAM 2 a multiple of 32 from 256 on, for EdgeTAM one of 256. By default what the weights
        were trained at: 1024, or 512 for MedSAM2.
    seed : of random weights.
    licence : of the weights, when it is another than the one that is assumed.

    Raises
    ------
    InputError
        When the image size does not fit the family, or the seed is no natural number.
    CheckpointError
        When the source is missing, damaged, of another family, or differs in any tensor.
    """
    if image_size is None:
        known = fine_tuned_sam2(Path(src).name)
        image_size = known.image_size if known else IMAGE_SIZE
    return load((_sam2(image_size), _edgetam(image_size)), src, seed=seed, licence=licence)


def load_sam2(src: str, *, image_size: int, seed: int = 0, licence: str | None = None) -> Loaded:
    """Load SAM 2 or SAM 2.1 and nothing else; as :func:`load_segmenter`."""
    SAM2_FAMILY.sizes.check(image_size, SAM2_FAMILY.title)
    return load((_sam2(image_size),), src, seed=seed, licence=licence)


def _sam2(image_size: int) -> Loader:
    def official(kind: str) -> Sam2VideoConfig | None:
        if kind not in SAM2_ALIASES:
            return None
        return sam2_config(SAM2_ALIASES[kind], newer=True, image_size=image_size)

    return Loader(
        title="SAM 2",
        folder="sam2",
        hub_name="facebook/sam2.1-hiera-tiny",
        file_name="sam2.1_hiera_tiny.pt",
        architectures=tuple(SAM2),
        official=official,
        model_types=("sam2_video", "sam2"),
        read_config=partial(huggingface.read_sam2_config, image_size=image_size),
        is_meta=meta_sam2.is_meta_sam2,
        infer_config=partial(meta_sam2.infer_config, image_size=image_size),
        resolve=meta_sam2.resolve,
        model_class=lambda config: Sam2VideoModel,
        name=sam2_name,
        fine_tuned=fine_tuned_sam2,
        in_format_1=True,
    )


def _edgetam(image_size: int) -> Loader:
    def official(kind: str) -> EdgeTamVideoConfig | None:
        return edgetam_config(image_size=image_size) if kind == EDGETAM else None

    return Loader(
        title="EdgeTAM",
        folder="",
        hub_name="yonigozlan/EdgeTAM-hf",
        file_name="edgetam.pt",
        architectures=(EDGETAM,),
        official=official,
        model_types=("edgetam_video",),
        read_config=partial(huggingface.read_edgetam_config, image_size=image_size),
        is_meta=meta_edgetam.is_meta_edgetam,
        infer_config=partial(meta_edgetam.infer_config, image_size=image_size),
        resolve=meta_edgetam.resolve,
        model_class=lambda config: EdgeTamVideoModel,
        name=lambda config: EDGETAM,
        ignored=meta_edgetam.COUNTERS,
    )


def load_dinov2(src: str, *, seed: int = 0, licence: str | None = None) -> Loaded:
    """Load DINOv2, with or without registers.

    Parameters
    ----------
    src : a source as listed in :mod:`recallseg.export.checkpoints`. ``random:small``,
        ``random:base``, ``random:large`` and ``random:giant`` may end in ``-registers``.
    seed, licence : as in :func:`load_segmenter`.

    Raises
    ------
    InputError
        When the seed is no natural number.
    CheckpointError
        When the source is missing, damaged, of another model, or differs in any tensor.
    """
    return load((_DINOV2,), src, seed=seed, licence=licence)


def load_embedder(src: str, *, seed: int = 0, licence: str | None = None) -> Loaded:
    """Load DINOv2, DINOv3, or the image tower of any Hugging Face folder with a pooled output.

    Parameters
    ----------
    src : a source as listed in :mod:`recallseg.export.checkpoints`. Of random weights all of
        :func:`load_dinov2`, and ``random:dinov3-small``, ``random:dinov3-convnext-tiny`` and the
        like. Of any other model its folder, with ``preprocessor_config.json``.
    seed, licence : as in :func:`load_segmenter`.

    Raises
    ------
    InputError, CheckpointError
        As for :func:`load_segmenter`; and if a folder's model makes no vector of an image.
    """
    kind = src.removeprefix(RANDOM)
    if kind != src and kind in DINOV3:
        return load_random_dinov3(kind, seed)
    path = None if src == DEMO else local_path(src)
    if path is not None and path.is_dir() and not huggingface.is_of(path, _DINOV2.model_types):
        return load_folder(path, licence)
    return load_dinov2(src, seed=seed, licence=licence)


def _official_dinov2(kind: str) -> Dinov2Config | Dinov2WithRegistersConfig | None:
    plain = kind.removesuffix("-registers").removesuffix("-reg")
    if plain not in DINOV2_ALIASES:
        return None
    return dinov2_config(DINOV2_ALIASES[plain], registers=0 if plain == kind else DINOV2_REGISTERS)


def _dinov2_class(config: Any) -> type[PreTrainedModel]:
    registers = isinstance(config, Dinov2WithRegistersConfig)
    return Dinov2WithRegistersModel if registers else Dinov2Model


_DINOV2 = Loader(
    title="DINOv2",
    folder="dinov2",
    hub_name="facebook/dinov2-small",
    file_name="dinov2_vits14_pretrain.pth",
    architectures=(*DINOV2, *(f"{name}-registers" for name in DINOV2)),
    official=_official_dinov2,
    model_types=("dinov2", "dinov2_with_registers"),
    read_config=huggingface.read_dinov2_config,
    is_meta=meta_dinov2.is_meta_dinov2,
    infer_config=meta_dinov2.infer_config,
    resolve=meta_dinov2.resolve,
    model_class=_dinov2_class,
    name=dinov2_name,
    in_format_1=True,
)
