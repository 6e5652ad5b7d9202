"""From a source (SRC on the command line) to a loaded model, the same way for all families."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import CheckpointError
from recallseg.engines.reading import is_there
from recallseg.export.checkpoints import huggingface
from recallseg.export.checkpoints.files import read_tensors
from recallseg.export.checkpoints.fine_tuned import FineTuned
from recallseg.export.checkpoints.names import former_digests, weights_digest
from recallseg.export.checkpoints.random_weights import random_state
from recallseg.export.checkpoints.recognition import said_of
from recallseg.export.checkpoints.strict import Piece, assemble, instantiate, tensor_shapes
from recallseg.export.families.base import IMAGENET

__all__ = ["Loaded", "Loader", "load", "local_path"]

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
    normalisation : of the network's images.
    """

    model: PreTrainedModel
    architecture: str
    source: Source
    digest: str
    former_digests: tuple[str, ...]
    licence: str
    description: str
    normalisation: Normalisation = IMAGENET


@dataclass(frozen=True)
class Loader:
    """What differs between loading one family and another.

    Attributes
    ----------
    title : for messages.
    folder : subfolder of the demo weights; empty where a family has none.
    hub_name, file_name : an official folder and file, for messages.
    architectures : what may follow ``random:``, for messages.
    official : configuration for what follows ``random:``, or None when there is none of that name.
    model_types : what ``config.json`` of a Hugging Face folder may call it.
    read_config : configuration of a Hugging Face folder.
    is_meta, infer_config, resolve : recognise one of Meta's files, its configuration, its layout.
    model_class : of a configuration.
    name : architecture name of a configuration.
    licence : of weights that do not say theirs.
    fine_tuned : what is known of fine-tuned weights by the name of their file, or None.
    ignored : ends of the names of tensors that a file may hold and that no model needs.
    in_format_1 : whether bundles of format 1 could hold such weights.
    """

    title: str
    folder: str
    hub_name: str
    file_name: str
    architectures: tuple[str, ...]
    official: Callable[[str], Any]
    model_types: tuple[str, ...]
    read_config: Callable[[Path], Any]
    is_meta: Callable[[Mapping[str, Tensor]], bool]
    infer_config: Callable[[Mapping[str, Tensor], str], Any]
    resolve: Callable[[str, Mapping[str, Tensor]], Piece]
    model_class: Callable[[Any], type[PreTrainedModel]]
    name: Callable[[Any], str]
    licence: str = META_LICENCE
    fine_tuned: Callable[[str], FineTuned | None] = lambda file: None
    ignored: tuple[str, ...] = ()
    in_format_1: bool = False


def load(loaders: Sequence[Loader], src: str, *, seed: int, licence: str | None) -> Loaded:
    """Load ``src`` by the loader that it is for.

    Parameters and errors as in :func:`recallseg.export.checkpoints.load_segmenter`; the first of
    ``loaders`` speaks for all of them in messages, and has the demo weights.
    """
    first = loaders[0]
    if src.startswith(RANDOM):
        return _random(loaders, src, seed, licence)
    if src == DEMO:
        return _folder(first, _demo_folder(first), src, "demo", licence or OWN_LICENCE)
    path = local_path(src)
    if path is not None and path.is_dir():
        kinds = tuple(kind for loader in loaders for kind in loader.model_types)
        kind = huggingface.read_model_type(path, kinds)
        chosen = next(loader for loader in loaders if kind in loader.model_types)
        declared = licence or huggingface.read_licence(path) or chosen.licence
        return _folder(chosen, path, src, "pretrained", declared)
    if path is not None:
        return _file(loaders, path, src, licence)
    names = ", ".join(name for loader in loaders for name in loader.architectures)
    raise CheckpointError(
        f"'{src}' is no local folder or file. Nothing is downloaded: if it is a name on the "
        "Hugging Face hub, download it on a machine with access (hf download "
        f"{first.hub_name} --local-dir FOLDER) and pass FOLDER. Or pass a published file "
        f"({_files(loaders)}), {RANDOM}ARCHITECTURE ({names}) or {DEMO}."
    )


def local_path(src: str) -> Path | None:
    """Return the folder or file that a source names; None if there is no such thing."""
    path = Path(os.path.expanduser(src))  # Path's raises for a user that is none
    return path if is_there(path) else None


def _files(loaders: Sequence[Loader]) -> str:
    return ", ".join(loader.file_name for loader in loaders if loader.file_name)


def _random(loaders: Sequence[Loader], src: str, seed: int, licence: str | None) -> Loaded:
    kind = src[len(RANDOM) :]
    if kind == DEMO:
        chosen, config = loaders[0], loaders[0].read_config(_demo_folder(loaders[0]))
    else:
        known = ((loader, loader.official(kind)) for loader in loaders)
        chosen, config = next(
            ((loader, found) for loader, found in known if found is not None), (loaders[0], None)
        )
    if config is None:
        names = [name for loader in loaders for name in loader.architectures]
        raise CheckpointError(
            f"'{src}' names no {_titles(loaders)} architecture. Choose "
            f"{', '.join(RANDOM + name for name in (*names, DEMO))}."
        )
    state = random_state(tensor_shapes(chosen.model_class(config), config), seed)
    how = f"random weights (seed {seed}): no useful masks come from them"
    return _finish(chosen, config, state, "random", licence or OWN_LICENCE, how)


def _titles(loaders: Sequence[Loader]) -> str:
    return " or ".join(loader.title for loader in loaders)


def _folder(family: Loader, path: Path, src: str, source: Source, licence: str) -> Loaded:
    config = family.read_config(path)
    tensors = _without(huggingface.read_weights(path), family.ignored)
    state = assemble(
        tensor_shapes(family.model_class(config), config),
        tensors,
        huggingface.resolve,
        origin=f"'{src}'",
        hint="Pass a folder whose config.json and weights belong together and are complete.",
    )
    how = "the demo weights" if source == "demo" else f"Hugging Face folder '{path.resolve().name}'"
    return _finish(family, config, state, source, licence, how)


def _file(loaders: Sequence[Loader], path: Path, src: str, licence: str | None) -> Loaded:
    tensors = read_tensors(path)
    chosen = next((loader for loader in loaders if loader.is_meta(tensors)), None)
    if chosen is None:
        raise CheckpointError(
            f"'{src}' is no {_titles(loaders)} file in its publisher's layout; {said_of(tensors)}. "
            f"Pass a file such as {_files(loaders)}, or, for a file from a Hugging Face folder, "
            "that folder."
        )
    tensors = _without(tensors, chosen.ignored)
    config = chosen.infer_config(tensors, f"'{src}'")
    state = assemble(
        tensor_shapes(chosen.model_class(config), config),
        tensors,
        chosen.resolve,
        origin=f"'{src}'",
        hint="Pass the file as it was published, or a state_dict saved as a whole.",
    )
    known = chosen.fine_tuned(path.name)
    how = f"checkpoint file '{path.name}'"
    if known is not None:
        how += f", called as {known.name}'s are"
    stated = licence or (known.licence if known else chosen.licence)
    loaded = _finish(chosen, config, state, "pretrained", stated, how)
    if known is None:
        return loaded
    return replace(loaded, architecture=f"{loaded.architecture}-{known.name}")


def _without(tensors: Mapping[str, Tensor], ends: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not (ends and name.endswith(ends))}


def _finish(
    family: Loader, config: Any, state: Mapping[str, Tensor], source: Source, licence: str, how: str
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
        former_digests=former_digests(weights) if family.in_format_1 else (),
        licence=licence,
        description=f"{architecture}, {parameters / 1e6:.1f} million parameters, {how}",
    )


def _demo_folder(family: Loader) -> Path:
    folder = DEMO_WEIGHTS / family.folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the demo model's {family.title} weights are in RecallSeg's repository, and not in "
            "this installation; the bundle made from them is: 'demo'. To export, use "
            f"{RANDOM}{family.architectures[0]}, or pass a checkpoint ({family.file_name})."
        )
    return folder
