"""Optimizers of both trainings: Muon for hidden matrices, AdamW for everything else.

Muon orthogonalises the momentum of a matrix, so that an update moves all of its directions by about
the same amount; it was chosen for trainings as short as these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["apply_step", "build_optimizers", "parameters_of"]

# Orthogonalising a matrix this narrow would force rows apart that may well be alike.
NARROWEST_MATRIX = 16
# Lookup tables and what is written into them, and the attention between tokens and image.
_NOT_HIDDEN = ("embed", "token", "encoding")


def build_optimizers(
    models: Iterable[nn.Module], settings: Mapping[str, Any]
) -> list[torch.optim.Optimizer]:
    """Build AdamW and Muon over all parameters of some models.

    Parameters
    ----------
    settings
        A table of the recipe with ``weight_decay`` and ``muon_momentum``.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for model in models:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            hidden = parameter.ndim == 2 and min(parameter.shape) >= NARROWEST_MATRIX
            table = any(word in name for word in _NOT_HIDDEN)
            (matrices if hidden and not table else others).append(parameter)
    decay = float(settings["weight_decay"])
    return [
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=decay),
        torch.optim.Muon(
            matrices,
            lr=0.0,
            momentum=float(settings["muon_momentum"]),
            weight_decay=decay,
            # Updates of AdamW's size, so that one learning rate serves both.
            adjust_lr_fn="match_rms_adamw",
        ),
    ]


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """Return every parameter that some optimizers move."""
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def apply_step(optimizers: list[torch.optim.Optimizer], rate: float, clip: float) -> float:
    """Clip gradients, move the weights and clear the gradients; return the gradient's norm.

    A step whose gradient is not finite is left out: one broken batch must not end a training.
    """
    norm = float(nn.utils.clip_grad_norm_(parameters_of(optimizers), clip))
    for optimizer in optimizers:
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
