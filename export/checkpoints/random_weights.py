"""Seeded random weights under which every term of the model matters.

``transformers`` initialises many parameters to zero or almost (position embeddings, the memory's
temporal encoding, the fuser's layer scale), and an untrained object score is often negative,
whereupon SAM 2 replaces its masks by a constant: two implementations then agree although one leaves
a term out. Here nothing is zero, signals keep their size from layer to layer, and objects are
"present".
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from recallseg.engines.errors import InputError
from recallseg.export.checkpoints import huggingface
from recallseg.export.checkpoints.names import newer_names
from recallseg.export.checkpoints.strict import assemble

__all__ = ["draw", "random_state"]

SMALL = 0.1
"""Spread of biases, tokens and position embeddings: visible beside activations of size one."""

LAYER_SCALE = 0.2
"""Centre of layer scales: branches count, and forty of them do not drown the first."""

PRESENT = 5.0
"""Bias of the object score: well above the score's own spread of about one."""

BRANCH = 0.4
"""Centre of the scales of RepViT's branches: features keep their size over two dozen sums."""

GATE = 2.0
"""Centre of the biases of RepViT's gates, which are then nearly open."""

_POSITION_MATRIX = re.compile(r"(shared_image_embedding|shared_embedding)\.positional_embedding$")
_LAYER_SCALE = re.compile(r"(layer_scale\d\.lambda1|memory_fuser\.layers\.\d+\.scale)$")
_OBJECT_SCORE = "pred_obj_score_head.proj_out.bias"
_TOKEN = re.compile(r"(_token|_tokens|_embed)\.weight$")
_BRANCH = re.compile(r"(token_mixer\.conv1?|(channel_mixer|ffn)\.conv2)\.bn\.weight$")
"""Scales of what RepViT adds to its features, 24 times."""
_TRANSPOSED = re.compile(r"upscale_conv\d\.weight$")


def _generator(name: str, seed: int) -> np.random.Generator:
    # Numpy's generator, seeded per tensor: the same values whatever the order, torch version or
    # thread count.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, key])))


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw the tensor ``name`` (of ``Sam2VideoModel`` or ``Dinov2Model`` in 5.23), float32."""
    if _POSITION_MATRIX.search(name):
        name = "positional_embedding"  # The model holds this matrix twice, with equal values.
    noise = torch.from_numpy(_generator(name, seed).standard_normal(shape, dtype=np.float32))
    if name == "positional_embedding":
        return noise
    if _LAYER_SCALE.search(name):
        return LAYER_SCALE * (1 + SMALL * noise)
    if name.endswith(_OBJECT_SCORE):
        return PRESENT + SMALL * noise
    if name.endswith(".running_var"):
        return (1 + SMALL * noise).abs()
    if _BRANCH.search(name):
        return BRANCH * (1 + SMALL * noise)
    if name.endswith(".se.fc2.bias"):
        return GATE + SMALL * noise
    if name.endswith(".weight") and ("norm" in name or name.endswith(".bn.weight")):
        return 1 + SMALL * noise
    if name.endswith(".weight") and len(shape) > 1 and not _TOKEN.search(name):
        fan_in = shape[0] if _TRANSPOSED.search(name) else math.prod(shape[1:])
        return noise / math.sqrt(fan_in)
    return SMALL * noise


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Draw every tensor of a model.

    Parameters
    ----------
    shapes : tensor names and shapes.
    seed : any non-negative integer; equal seeds give equal weights on every machine and with every
        version of transformers.

    Raises
    ------
    InputError
        For another seed.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed {seed!r} cannot be used; expected an integer from 0 on.")
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    drawn = {
        name: draw(name, tuple(tensor.shape), seed) for name, tensor in newer_names(empty).items()
    }
    return assemble(
        shapes,
        drawn,
        huggingface.resolve,
        origin=f"random weights of seed {seed}",
        hint="Install a transformers version that RecallSeg's export extra asks for.",
    )
