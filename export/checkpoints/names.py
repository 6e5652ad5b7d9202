"""Names under which weights are digested: those of Meta's published files, which never change.

``transformers`` names the tensors of its models, and renames them: DINOv2's attention and SwiGLU
layers have other names up to 5.17 than in 5.23. What lasts may not depend on that. So a digest is
taken over *canonical* tensors: names and shapes as in the files that Meta published, whose tensors
can be digested as they lie there. Digests of before were taken over the names of the installed
``transformers``; libraries cite them, so both are computed as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recallseg.export.checkpoints.digest import state_digest
from recallseg.export.checkpoints.strict import Piece, Resolver

__all__ = [
    "RENAMED",
    "TWINS",
    "canonical",
    "former_digests",
    "newer_names",
    "older_names",
    "weights_digest",
]

RENAMED: Mapping[str, tuple[str, int, int]] = {
    # DINOv2's modules: now, before (transformers 5.17 and older), which part of how many.
    "attention.q_proj": ("attention.attention.query", 0, 1),
    "attention.k_proj": ("attention.attention.key", 0, 1),
    "attention.v_proj": ("attention.attention.value", 0, 1),
    "attention.o_proj": ("attention.output.dense", 0, 1),
    "mlp.gate_proj": ("mlp.weights_in", 0, 2),
    "mlp.up_proj": ("mlp.weights_in", 1, 2),
    "mlp.down_proj": ("mlp.weights_out", 0, 1),
}

TWINS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""One matrix at Meta, for the image and for prompts; transformers versions that tie them store it
once."""


def newer_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under the names of transformers 5.23, whichever is installed."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        pieces = {
            name.replace(f".{before}.", f".{now}."): tensor.chunk(parts)[part]
            for now, (before, part, parts) in RENAMED.items()
            if f".{before}." in name
        }
        found.update(pieces or {name: tensor})
    return found


def older_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the newer names as transformers 5.17 names them."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        spelt = next(
            (
                name.replace(f".{now}.", f".{before}.")
                for now, (before, _, _) in RENAMED.items()
                if f".{now}." in name
            ),
            name,
        )
        parts.setdefault(spelt, []).append(tensor)  # gate before up, as the model holds them
    return {
        name: tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        for name, tensors in parts.items()
    }


def canonical(state: Mapping[str, Tensor], resolve: Resolver) -> dict[str, Tensor]:
    """Return a model's tensors as Meta's file of it has them.

    Parameters
    ----------
    state : of the model, under the names of the installed transformers.
    resolve : says where each of them lies in one of Meta's files.

    Raises
    ------
    CheckpointError
        If the installed transformers has a tensor that is not known.
    """
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        piece: Piece = resolve(name, {})
        if piece.parts > 1:
            parts.setdefault(piece.sources[0], {})[piece.part] = tensor
        elif name == TWINS[1] and not torch.equal(tensor, state.get(TWINS[0], tensor)):
            whole[f"{piece.sources[0]} of prompts"] = tensor  # trained apart, which Meta cannot say
        else:
            pieces = tensor.chunk(len(piece.sources))
            whole.update(zip(piece.sources, pieces, strict=True))
    for name, found in parts.items():
        whole[name] = torch.cat([found[index] for index in sorted(found)])
    return whole


def weights_digest(state: Mapping[str, Tensor], resolve: Resolver) -> str:
    """Return the digest of a model's weights, the same under every version of transformers."""
    return state_digest(canonical(state, resolve))


def former_digests(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the digests that bundles of format 1 state for these weights, the newer first."""
    newer = newer_names(state)
    older = older_names(newer)
    spellings = [newer] if older.keys() == newer.keys() else [newer, older]
    return tuple(state_digest(spelling) for spelling in spellings)
