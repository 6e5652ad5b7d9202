"""How the training of what corrects begins: points and priors are heard from the first step on.

The segmenter never had either, so that what it learnt passes over them. Nothing of the graph
changes; weights are put in place so that a prior goes through to the mask, a point says "inside" or
"outside" of the places round it, and a box's corners say "inside" of places between them. Training
makes of that what the image says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recallseg.export.correcting import Correct
from recallseg.export.demo_model.losses import hard_dice, mask_loss

__all__ = ["begin"]

LABEL_SIZE = 6.0
"""Length of a label's code at the start; a place's is 8."""
LABEL_GAIN = 1.5
"""Makes a kind of point as large as what else the first attention among tokens gives."""
SOFT = 3.0
"""Logits that a prior's magnitude begins to matter less from."""
PRIOR_RATE = 0.03
"""Learning rate of the prior's path while it is trained alone."""
INWARD = 1 / 16
"""How far from a box's corner, along both axes, its inside is said to be; shares of the image."""

Draw = Callable[[], Mapping[str, Tensor]]


def begin(correct: Correct, no_memory: Tensor, draw: Draw, sharpness: float, steps: int) -> None:
    """Let points and priors be heard, in place.

    Parameters
    ----------
    no_memory : 1xCx1x1, what features are given where nothing is recalled.
    draw : returns samples as ``CorrectorTrainer.draw`` does.
    sharpness : how sharply places are matched.
    steps : of the short training of the prior's path, everything else held.
    """
    _open_prior(correct)
    _learn_prior(correct, no_memory, draw, steps)
    with torch.no_grad():
        _match_places(correct, draw(), sharpness)


@torch.no_grad()
def _open_prior(correct: Correct) -> None:
    """Make of 2x2 logits whether they are inside, softly, and of 4x4 of them four such signs."""
    embed: Any = correct.prompt_encoder.mask_embed
    for layer in (embed.conv1, embed.conv2):
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    # Two channels of the mean and its opposite beside two that are constant: the norm over the
    # four is a soft sign.
    embed.conv1.weight[0] += 0.25
    embed.conv1.weight[1] -= 0.25
    embed.conv1.bias[2] += SOFT
    embed.conv1.bias[3] -= SOFT
    for place in range(4):
        row, column = divmod(place, 2)
        for channel, sign in ((2 * place, 1.0), (2 * place + 1, -1.0)):
            embed.conv2.weight[channel, 0, row, column] += sign
            embed.conv2.weight[channel, 1, row, column] -= sign


def _learn_prior(correct: Correct, no_memory: Tensor, draw: Draw, steps: int) -> None:
    """Train the prior's path alone, at a high rate, to give back the mask that it is."""
    path = list(correct.prompt_encoder.mask_embed.parameters())
    optimizer = torch.optim.AdamW(path, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        batch = draw()
        n = len(batch["masks"])
        recalled = torch.arange(n)[:, None, None, None] % 2 == 0
        conditioned = torch.where(recalled, batch["conditioned"], batch["features"] + no_memory)
        target = _small(batch)
        prior = (target * 2 - 1) * (1 + 9 * torch.rand(n, 1, 1, 1))
        there = torch.ones(n, dtype=torch.bool)
        logits, _, _ = _decode(correct, {**batch, "conditioned": conditioned}, None, (prior, there))
        loss = mask_loss(logits, target).mean()
        for parameter, slope in zip(path, torch.autograd.grad(loss, path), strict=True):
            parameter.grad = slope
        for group in optimizer.param_groups:
            group["lr"] = PRIOR_RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _match_places(correct: Correct, batch: Mapping[str, Tensor], sharpness: float) -> None:
    """Give heads of each attention between tokens and image to looking for equal places.

    Their queries and keys become the same projection of a place's code, onto the directions in
    which the codes of all places differ most. Where the image reads tokens, such a head carries
    over whether a point is inside or outside, as what the prior's path makes of such a prior; two
    more do that for places inwards of a box's corners, a place's code being shifted by a rotation.
    The first attention among tokens has no residual: one head of it keeps what a point says.
    """
    encoder: Any = correct.prompt_encoder
    transformer: Any = correct.mask_decoder.transformer
    codes = correct.image_position.flatten(2)[0].T  # places x C
    middle = codes.mean(dim=0)
    directions = torch.linalg.svd(codes - middle, full_matrices=False).Vh
    channels = codes.shape[1]
    kinds = torch.linalg.qr(torch.randn(channels, channels)).Q[: len(encoder.point_embed.weight)]
    encoder.point_embed.weight.copy_(LABEL_SIZE * kinds)

    among = transformer.layers[0].self_attn
    (rows,) = _least_needed(correct, among, batch, 1)
    for part in (among.q_proj, among.k_proj, among.v_proj):
        part.weight[rows] = F.pad(kinds, (0, 0, 0, len(rows) - len(kinds)))
        part.bias[rows] = 0
    among.o_proj.weight[:, rows] = F.pad(LABEL_GAIN * kinds.T, (0, len(rows) - len(kinds)))

    def match(attention: Any, rows: Tensor, shift: Tensor | None = None) -> None:
        look = directions[: len(rows)] * sharpness
        for part in (attention.q_proj, attention.k_proj):
            part.weight[rows] = look
            part.bias[rows] = -(look @ middle)
        if shift is not None:
            attention.k_proj.weight[rows] = look @ shift

    attentions = [transformer.final_attn_token_to_image]
    attentions += [layer.cross_attn_token_to_image for layer in transformer.layers]
    for attention in attentions:
        match(attention, _least_needed(correct, attention, batch, 1)[0])

    side = batch["skip0"].shape[-1]
    full = torch.full((1, 1, side, side), 8.0)
    toward = (encoder.mask_embed(full) - encoder.mask_embed(-full))[0, :, side // 8, side // 8] / 2
    # What each head carries over of outside, inside, and the corners; and where to.
    says = [((-1.0, 1.0, 0.0, 0.0), 0.0), ((0.0, 0.0, 1.0, 0.0), INWARD)]
    says += [((0.0, 0.0, 0.0, 1.0), -INWARD)]
    for number, layer in enumerate(transformer.layers):
        attention = layer.cross_attn_image_to_token
        carried = says if number == 0 else says[:1]
        heads = _least_needed(correct, attention, batch, len(carried))
        for rows, (_, inward) in zip(heads, carried, strict=True):
            match(attention, rows, _shift(encoder, inward) if inward else None)
        for rows, (values, _) in zip(heads, carried, strict=True):
            read = _readout(correct, attention, batch, torch.tensor(values))
            attention.v_proj.weight[rows] = F.pad(read[None, :-1], (0, 0, 0, len(rows) - 1))
            attention.v_proj.bias[rows] = F.pad(read[-1:], (0, len(rows) - 1))
            attention.o_proj.weight[:, rows] = F.pad(toward[:, None], (0, len(rows) - 1))


def _shift(encoder: Any, by: float) -> Tensor:
    """Return the matrix that makes of a place's code that of the place ``by`` further on both axes.

    Codes are sines, then cosines, of the place (-1 to 1) times frequencies.
    """
    angle = 2 * math.pi * 2 * by * encoder.shared_embedding.positional_embedding.sum(dim=0)
    sine, cosine = angle.sin().diag(), angle.cos().diag()
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])


def _least_needed(
    correct: Correct, attention: Any, batch: Mapping[str, Tensor], count: int
) -> list[Tensor]:
    """Return the rows of the heads without which proposals lose least."""
    width = attention.q_proj.out_features // attention.num_attention_heads
    weight = attention.o_proj.weight
    heads = torch.arange(attention.q_proj.out_features).split(width)

    def dice_without(rows: Tensor) -> float:
        kept = weight[:, rows].clone()
        weight[:, rows] = 0
        logits, _, _ = _decode(correct, batch)
        weight[:, rows] = kept
        return float(hard_dice(logits[:, 1:], _small(batch)).amax(dim=1).mean())

    return sorted(heads, key=dice_without, reverse=True)[:count]


def _readout(
    correct: Correct, attention: Any, batch: Mapping[str, Tensor], values: Tensor
) -> Tensor:
    """Return weights (C, and a constant) that read what a point's label says from its token.

    ``values`` has what each label says; all other tokens say 0.
    """
    seen: list[Tensor] = []
    hook = attention.v_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rows, wanted = [], []
    n = len(batch["masks"])
    for count in (1, 2, 4, 7):
        points = torch.rand(n, count, 2) * correct.size
        labels = torch.randint(0, len(values), (n, count))
        _decode(correct, batch, (points, labels))
        tokens = seen[-1][:, 0]
        value = torch.zeros(tokens.shape[:2])
        value[:, -count - 1 : -1] = values[labels]  # the last is the padding
        rows.append(tokens.flatten(0, 1))
        wanted.append(value.flatten())
    hook.remove()
    x = torch.cat(rows)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ torch.cat(wanted))


def _small(batch: Mapping[str, Tensor]) -> Tensor:
    return F.avg_pool2d(batch["masks"][:, None], 4)


def _decode(
    correct: Correct,
    batch: Mapping[str, Tensor],
    points: tuple[Tensor, Tensor] | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``Correct.candidates`` does, of points and labels, a prior and whether it is."""
    n, side = len(batch["masks"]), batch["skip0"].shape[-1]
    return correct.candidates(
        batch["conditioned"],
        batch["skip0"],
        batch["skip1"],
        *(points or (torch.zeros(n, 1, 2), torch.full((n, 1), -1))),
        *(prior or (torch.zeros(n, 1, side, side), torch.zeros(n, dtype=torch.bool))),
    )
