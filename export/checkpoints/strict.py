"""Strict loading: every tensor of the model comes from the file, and the file holds nothing else.

``transformers``' own ``from_pretrained`` fills what is missing with random values and skips what it
does not know, with a warning. Here the model is the authority: for each of its tensors it is known
where in the file it lies (a :class:`Piece`), and every difference is an error that names the
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recallseg.engines.errors import CheckpointError
from recallseg.engines.imports import lacks_memory

__all__ = ["Piece", "Resolver", "assemble", "axes_of", "instantiate", "tensor_shapes"]

NAMED = 4
"""Tensors that a message names before it counts the rest."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Piece:
    """Where one tensor of the model lies in a file.

    Attributes
    ----------
    sources : names in the file; several are stacked along axis 0.
    part, parts : the model's tensor is this part (0-based) of ``parts`` equal ones along axis 0 of
        the single source.
    """

    sources: tuple[str, ...]
    part: int = 0
    parts: int = 1

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that each source must have for a tensor of ``shape`` in the model."""
        if self.parts == 1 and len(self.sources) == 1:
            return shape
        return (shape[0] * self.parts // len(self.sources), *shape[1:])

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the model's tensor; shapes must have been checked."""
        if len(self.sources) > 1:
            return torch.cat([tensors[name] for name in self.sources])
        tensor = tensors[self.sources[0]]
        return tensor if self.parts == 1 else tensor.chunk(self.parts)[self.part]


def axes_of(tensors: Mapping[str, Tensor], name: str, count: int, origin: str) -> tuple[int, ...]:
    """Return the shape of a tensor that tells the architecture; CheckpointError for other axes."""
    shape = tuple(tensors[name].shape)
    if len(shape) != count:
        raise CheckpointError(
            f"{origin} does not fit the model: '{name}', which tells the architecture, has shape "
            f"{shape}; expected {count} axes. Pass the file as it was published."
        )
    return shape


Resolver = Callable[[str, Mapping[str, Tensor]], Piece]
"""Says where a tensor of the model lies, given its name and what the file holds."""


def _build(model_class: Callable[[Any], Model], config: Any) -> Model:
    try:
        return model_class(config)
    # A configuration that validates can still break the model's constructor in any way.
    except Exception as error:
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"the configuration describes no working model: {type(error).__name__}: {error}. "
            "Use the config.json that belongs to these weights."
        ) from error


def tensor_shapes(
    model_class: Callable[[Any], nn.Module], config: Any
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a model of ``config`` stores; none is allocated."""
    with torch.device("meta"):
        model = _build(model_class, config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _list(title: str, items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{title} ({len(items)}): {'; '.join(items[:NAMED])}{more}."


def _convert(name: str, tensor: Tensor, origin: str) -> Tensor:
    """Return ``tensor`` in float32 after checking its values."""
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{origin}: tensor '{name}' has dtype {tensor.dtype}; expected float32, float16 or "
            "bfloat16. Quantized checkpoints cannot be used; take the original one."
        )
    converted = tensor.detach().to(torch.float32)
    if not bool(torch.isfinite(converted).all()):
        bad = int((~torch.isfinite(converted)).sum())
        raise CheckpointError(
            f"{origin}: tensor '{name}' has {bad} of {converted.numel()} values that are NaN or "
            "infinite. The file is damaged, or its training diverged; get it again."
        )
    return converted


def assemble(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    resolve: Resolver,
    *,
    origin: str,
    hint: str,
) -> dict[str, Tensor]:
    """Collect the model's tensors from a file, in float32.

    Parameters
    ----------
    shapes : the model's tensor names and shapes, from :func:`tensor_shapes`.
    tensors : what the file holds.
    resolve : says where each of the model's tensors lies in the file.
    origin : the file or folder, for messages.
    hint : what to do about a difference, one sentence.

    Raises
    ------
    CheckpointError
        When a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    pieces = {name: resolve(name, tensors) for name in shapes}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for name, piece in pieces.items():
        wanted = piece.source_shape(shapes[name])
        for source in piece.sources:
            if source in used:
                continue
            used.add(source)
            if source not in tensors:
                missing.append(f"'{source}'")
            elif tuple(tensors[source].shape) != wanted:
                misshapen.append(f"'{source}' {tuple(tensors[source].shape)}, expected {wanted}")
    unexpected = [f"'{name}'" for name in tensors if name not in used]
    found = [
        _list(title, items)
        for title, items in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors of the wrong shape", misshapen),
        )
        if items
    ]
    if found:
        raise CheckpointError(f"{origin} does not fit the model. {' '.join(found)} {hint}")
    converted = {name: _convert(name, tensor, origin) for name, tensor in tensors.items()}
    return {name: piece.take(converted) for name, piece in pieces.items()}


def instantiate(
    model_class: Callable[[Any], Model], config: Any, state: Mapping[str, Tensor]
) -> Model:
    """Build the model with exactly ``state``, in evaluation mode and float32."""
    # Construction draws initial values that are overwritten at once: leave the caller's random
    # numbers as they were.
    with torch.random.fork_rng(devices=[]):
        model = _build(model_class, config)
    model.load_state_dict(dict(state), strict=True)
    return model.float().eval()
