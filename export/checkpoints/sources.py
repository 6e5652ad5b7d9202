"""From a source (SRC on the command line) to a loaded model, the same way for both families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import Dinov2Model, Dinov2WithRegistersModel, PreTrainedModel, Sam2VideoModel

from recallseg.engines.errors import CheckpointError, InputError
from recallseg.export.checkpoints import huggingface
from recallseg.export.checkpoints.files import read_tensors
from recallseg.export.checkpoints.names import former_digests, weights_digest
from recallseg.export.checkpoints.random_weights import random_state
from recallseg.export.checkpoints.strict import Piece, assemble, instantiate, tensor_shapes

__all__ = ["Family", "Loaded", "load"]

Source = Literal["pretrained", "demo", "random"]

RANDOM = "random:"
DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).resolve().parents[1] / "demo_model" / "weights"

OWN_LICENCE = "Apache-2.0"
META_LICENCE = "Apache-2.0 (assumed: that of Meta's official weights)"
"""Weight files carry no licence, and fine-tuned weights can have another one than Meta's."""


@dataclass(frozen=True)
class Loaded:
    """A model and what a bundle's manifest says about its weights.

    Attributes
    ----------
    model : in evaluation mode, float32, on the CPU.
    architecture : e.g. ``sam2.1-hiera-tiny``, ``dinov2-small-registers``.
    source : where the weights came from.
    digest : SHA-256 of names, dtypes, shapes and values (:mod:`.names`); the same whatever file
        format they were read from and whatever version of transformers holds them.
    former_digests : those that bundles of format 1 state for the same weights.
    licence : of the weights.
    description : one line for people.
    """

    model: Sam2VideoModel | Dinov2Model | Dinov2WithRegistersModel
    architecture: str
    source: Source
    digest: str
    former_digests: tuple[str, ...]
    licence: str
    description: str


@dataclass(frozen=True)
class Family:
    """What differs between loading SAM 2 and loading DINOv2.

    Attributes
    ----------
    title : for messages.
    folder : subfolder of the demo weights.
    hub_name, file_name : an official folder and file, for messages.
    architectures : what may follow ``random:``, for messages.
    official : configuration for what follows ``random:``, or None when there is none of that name.
    read_config : configuration of a Hugging Face folder.
    is_meta, infer_config, resolve : recognise one of Meta's files, its configuration, its layout.
    model_class : of a configuration.
    name : architecture name of a configuration.
    """

    title: str
    folder: str
    hub_name: str
    file_name: str
    architectures: tuple[str, ...]
    official: Callable[[str], Any]
    read_config: Callable[[Path], Any]
    is_meta: Callable[[Mapping[str, Tensor]], bool]
    infer_config: Callable[[Mapping[str, Tensor], str], Any]
    resolve: Callable[[str, Mapping[str, Tensor]], Piece]
    model_class: Callable[[Any], type[PreTrainedModel]]
    name: Callable[[Any], str]


def load(family: Family, src: str, *, seed: int, licence: str | None) -> Loaded:
    """Load ``src``; parameters and errors as in :func:`recallseg.export.checkpoints.load_sam2`."""
    if src.startswith(RANDOM):
        return _random(family, src, seed, licence)
    if src == DEMO:
        return _folder(family, _demo_folder(family), src, "demo", licence or OWN_LICENCE)
    path = Path(src).expanduser()
    if path.is_dir():
        declared = licence or huggingface.read_licence(path) or META_LICENCE
        return _folder(family, path, src, "pretrained", declared)
    if path.is_file():
        return _meta_file(family, path, src, licence or META_LICENCE)
    raise CheckpointError(
        f"'{src}' is no local folder or file. Nothing is downloaded: if it is a name on the "
        "Hugging Face hub, download it on a machine with access (hf download "
        f"{family.hub_name} --local-dir FOLDER) and pass FOLDER. Or pass one of Meta's files "
        f"({family.file_name}), {RANDOM}ARCHITECTURE ({', '.join(family.architectures)}) or {DEMO}."
    )


def _random(family: Family, src: str, seed: int, licence: str | None) -> Loaded:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed {seed!r} cannot be used; expected an integer from 0 on.")
    kind = src[len(RANDOM) :]
    config = family.read_config(_demo_folder(family)) if kind == DEMO else family.official(kind)
    if config is None:
        raise CheckpointError(
            f"'{src}' names no {family.title} architecture. Choose "
            f"{', '.join(RANDOM + name for name in (*family.architectures, DEMO))}."
        )
    state = random_state(tensor_shapes(family.model_class(config), config), seed)
    how = f"random weights (seed {seed}): no useful masks come from them"
    return _finish(family, config, state, "random", licence or OWN_LICENCE, how)


def _folder(family: Family, path: Path, src: str, source: Source, licence: str) -> Loaded:
    config = family.read_config(path)
    tensors = huggingface.read_weights(path)
    state = assemble(
        tensor_shapes(family.model_class(config), config),
        tensors,
        huggingface.resolve,
        origin=f"'{src}'",
        hint="Pass a folder whose config.json and weights belong together and are complete.",
    )
    how = "the demo weights" if source == "demo" else f"Hugging Face folder '{path.resolve().name}'"
    return _finish(family, config, state, source, licence, how)


def _meta_file(family: Family, path: Path, src: str, licence: str) -> Loaded:
    tensors = read_tensors(path)
    if not family.is_meta(tensors):
        raise CheckpointError(
            f"'{src}' is no {family.title} file in Meta's layout; its first tensors are "
            f"{', '.join(repr(name) for name in list(tensors)[:3])}. Pass a file such as "
            f"{family.file_name}, or, for a file from a Hugging Face folder, that folder."
        )
    config = family.infer_config(tensors, f"'{src}'")
    state = assemble(
        tensor_shapes(family.model_class(config), config),
        tensors,
        family.resolve,
        origin=f"'{src}'",
        hint="Pass the file as it was published, or a state_dict saved as a whole.",
    )
    return _finish(family, config, state, "pretrained", licence, f"checkpoint file '{path.name}'")


def _finish(
    family: Family, config: Any, state: Mapping[str, Tensor], source: Source, licence: str, how: str
) -> Loaded:
    model: Any = instantiate(family.model_class(config), config, state)
    weights = model.state_dict()
    architecture = family.name(config)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    return Loaded(
        model=model,
        architecture=architecture,
        source=source,
        digest=weights_digest(weights, family.resolve),
        former_digests=former_digests(weights),
        licence=licence,
        description=f"{architecture}, {parameters / 1e6:.1f} million parameters, {how}",
    )


def _demo_folder(family: Family) -> Path:
    folder = DEMO_WEIGHTS / family.folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the demo model's {family.title} weights are not in this installation. Use "
            f"{RANDOM}{family.architectures[0]}, or pass a checkpoint ({family.file_name})."
        )
    return folder
