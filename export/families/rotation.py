"""Tables of rotary encoding, as ``transformers``' memory attentions compute them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rotation"]


def rotation(attention: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines Px(D/2) of a memory attention at its ``positions``."""
    with torch.no_grad():
        cos, sin = attention.rotary_emb(torch.zeros(1), positions)
    # The model repeats each angle for both channels of a pair; operators want it once.
    cos, sin = (table.flatten(0, -2)[:, 0::2].contiguous() for table in (cos, sin))
    return cos, sin
