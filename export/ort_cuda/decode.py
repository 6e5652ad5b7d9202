"""``decode``: the mask decoder with few launches.

The output tokens are the model's own, so that the first self-attention is a constant. What reads
the same rows is one product; positions are added behind it, projected. Upscaled places stay with
the place that they come from until the one mask that is chosen is put row by row; the five small
networks behind the tokens are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recallseg.engines.errors import ExportError
from recallseg.export.fused import attend_fused, bias_gelu, skip_norm
from recallseg.export.graphs import Decode
from recallseg.export.ort_cuda.parts import Product, constant, folded

__all__ = ["CudaDecode"]


class _Joined(nn.Module):
    """Several products of the same rows in one, equally wide, with a row of constants each.

    Parameters
    ----------
    parts : (weight, what is added to the rows: TxC or C, or None).
    tokens : T.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor | None]], tokens: int) -> None:
        super().__init__()
        (self.width,) = {len(weight) for weight, _ in parts}
        offset = torch.cat(
            [
                torch.zeros(tokens, len(w)) if more is None else more.expand(tokens, -1)
                for w, more in parts
            ],
            dim=1,
        )
        self.product = Product(torch.cat([weight for weight, _ in parts]), offset)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.product(x).split(self.width, dim=-1))


class _Attention(nn.Module):
    """What is left of ``Sam2VideoAttention`` behind its projections; ``bias`` is still to add."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.out = Product(attention.o_proj.weight)
        self.bias = folded(attention.v_proj.bias, attention.o_proj)
        self.heads, self.scale = int(attention.num_attention_heads), float(attention.scaling)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = attend_fused(query, key, value, heads=self.heads, scale=self.scale)
        out: Tensor = self.out(found)
        return out


class _Then(nn.Module):
    """Residual, bias and normalisation in one pass."""

    bias: Tensor

    def __init__(self, norm: nn.LayerNorm, bias: Tensor) -> None:
        super().__init__()
        self.norm = norm
        constant(self, "bias", bias)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return skip_norm(x, skip, self.norm, self.bias)[0]


class _Layer(nn.Module):
    """One layer of the two-way transformer.

    Parameters
    ----------
    layer : ``Sam2VideoTwoWayAttentionBlock``.
    tokens, position : of the output tokens and of the image, TxC.
    following : the next layer's self-attention, whose projections this one computes; None if there
        is none.
    """

    start: Tensor

    def __init__(self, layer: Any, tokens: Tensor, position: Tensor, following: Any | None) -> None:
        super().__init__()
        reading, writing = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        self.of_image = _Joined(
            [
                (reading.k_proj.weight, position @ reading.k_proj.weight.T),
                (reading.v_proj.weight, None),
                (writing.q_proj.weight, position @ writing.q_proj.weight.T + writing.q_proj.bias),
            ],
            len(position),
        )
        self.of_tokens = _Joined(
            [
                (writing.k_proj.weight, tokens @ writing.k_proj.weight.T),
                (writing.v_proj.weight, None),
            ],
            len(tokens),
        )
        self.onward: _Joined | None = None
        if following is not None:
            query, key = following.q_proj, following.k_proj
            self.onward = _Joined(
                [
                    (query.weight, tokens @ query.weight.T + query.bias),
                    (key.weight, tokens @ key.weight.T),
                    (following.v_proj.weight, None),
                ],
                len(tokens),
            )
        self.query = Product(
            reading.q_proj.weight, tokens @ reading.q_proj.weight.T + reading.q_proj.bias
        )
        self.reading, self.writing = _Attention(reading), _Attention(writing)
        self.after_reading = _Then(layer.layer_norm2, self.reading.bias)
        self.first = Product(layer.mlp.proj_in.weight, layer.mlp.proj_in.bias)
        self.second = Product(layer.mlp.proj_out.weight)
        self.activation = layer.mlp.activation
        if len(layer.mlp.layers):
            raise ExportError("the mask decoder's layers have two layers behind their attention.")
        self.after_layers = _Then(layer.layer_norm3, layer.mlp.proj_out.bias)
        self.after_writing = _Then(layer.layer_norm4, self.writing.bias)
        self.skipped = bool(layer.skip_first_layer_pe)
        if self.skipped:  # its self-attention looks at nothing but the model's own tokens
            attended, _ = layer.self_attn(
                query=tokens[None, None], key=tokens[None, None], value=tokens[None, None]
            )
            constant(self, "start", layer.layer_norm1(attended)[0])
        else:
            self.own = _Attention(layer.self_attn)
            self.after_own = _Then(layer.layer_norm1, self.own.bias)

    def forward(
        self, queries: Tensor | None, projected: list[Tensor], image: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        if queries is None:
            queries = self.start.expand(image.shape[0], -1, -1)
        else:
            queries = self.after_own(self.own(*projected), queries)
        image_key, image_value, image_query = self.of_image(image)
        read = self.reading(self.query(queries), image_key, image_value)
        queries = self.after_reading(read, queries)
        inner = self.second(self.activation(self.first(queries)))
        queries = self.after_layers(inner, queries)
        key, value = self.of_tokens(queries)
        projected = [] if self.onward is None else self.onward(queries)
        image = self.after_writing(self.writing(image_query, key, value), image)
        return queries, projected, image


class _Networks(nn.Module):
    """Small networks of three layers, each for one token, as one: nxGxC -> Gxnx(widest output)."""

    def __init__(self, networks: Sequence[Any]) -> None:
        super().__init__()
        layers = [[net.proj_in, *net.layers, net.proj_out] for net in networks]
        shapes = {(len(each), each[0].weight.shape, each[1].weight.shape) for each in layers}
        if len(shapes) != 1:
            raise ExportError(f"the mask decoder's small networks differ in shape: {shapes}.")
        self.depth = len(layers[0])
        for index in range(self.depth):
            parts = [each[index] for each in layers]
            widest = max(part.out_features for part in parts)
            weight = torch.zeros(len(parts), parts[0].in_features, widest)
            bias = torch.zeros(len(parts), 1, widest)
            for g, part in enumerate(parts):
                weight[g, :, : part.out_features] = part.weight.T
                bias[g, 0, : part.out_features] = part.bias
            constant(self, f"weight{index}", weight)
            constant(self, f"bias{index}", bias)
        self.activation = networks[0].activation

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.transpose(0, 1)
        for index in range(self.depth):
            x = x @ getattr(self, f"weight{index}") + getattr(self, f"bias{index}")
            x = self.activation(x) if index + 1 < self.depth else x
        return x


class _Upscale(nn.Module):
    """A transposed convolution by 2 without its bias: nxTxC -> nx4TxC', four places for each."""

    def __init__(self, convolution: nn.ConvTranspose2d) -> None:
        super().__init__()
        if convolution.kernel_size != (2, 2) or convolution.stride != (2, 2):
            raise ExportError("the mask decoder's upscaling is by 2.")
        self.channels = convolution.out_channels
        # inputs x outputs x 2 x 2 -> (2, 2, outputs) x inputs
        self.product = Product(convolution.weight.permute(2, 3, 1, 0).flatten(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x)
        return out.reshape(x.shape[0], -1, self.channels)


def _nested(image: Tensor, side: int, depth: int) -> Tensor:
    """1xCx(S*2^depth)x(same) -> 1xTxC, each place followed through its four at every level."""
    cut = image.reshape(image.shape[0], image.shape[1], side, *[2] * depth, side, *[2] * depth)
    axes = [0, 2, 3 + depth]
    for level in range(depth):
        axes += [3 + level, 4 + depth + level]
    return cut.permute(*axes, 1).reshape(image.shape[0], -1, image.shape[1])


class CudaDecode(nn.Module):
    """:class:`recallseg.export.graphs.Decode`, as this package's docstring says."""

    dense: Tensor
    inner_bias: Tensor
    chosen: Tensor

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        head = decode.head
        decoder, prompts = head.mask_decoder, head.prompt_encoder
        transformer: Any = decoder.transformer
        with torch.no_grad():
            sparse = prompts.not_a_point_embed.weight.expand(2, -1)
            tokens = torch.cat(
                [
                    decoder.obj_score_token.weight,
                    decoder.iou_token.weight,
                    decoder.mask_tokens.weight,
                    sparse,
                ]
            )
            position = head.image_position.flatten(2)[0].T
            self.side = int(head.image_position.shape[-1])
            constant(self, "dense", prompts.no_mask_embed.weight[0])
            layers = list(transformer.layers)
            followers = [layer.self_attn for layer in layers[1:]] + [None]
            self.layers = nn.ModuleList(
                _Layer(layer, tokens, position, follower)
                for layer, follower in zip(layers, followers, strict=True)
            )
            if not layers[0].skip_first_layer_pe:
                raise ExportError("the first layer of the mask decoder adds no positions.")
            final = transformer.final_attn_token_to_image
            self.of_image = _Joined(
                [
                    (final.k_proj.weight, position @ final.k_proj.weight.T),
                    (final.v_proj.weight, None),
                ],
                len(position),
            )
            self.query = Product(
                final.q_proj.weight, tokens @ final.q_proj.weight.T + final.q_proj.bias
            )
            self.final = _Attention(final)
            self.after_final = _Then(transformer.layer_norm_final_attn, self.final.bias)
            self.up1, self.up2 = _Upscale(decoder.upscale_conv1), _Upscale(decoder.upscale_conv2)
            norm = nn.LayerNorm(decoder.upscale_conv1.out_channels, decoder.upscale_layer_norm.eps)
            norm.weight.copy_(decoder.upscale_layer_norm.weight)
            norm.bias.copy_(decoder.upscale_layer_norm.bias)
            biases: list[Any] = [decoder.upscale_conv1.bias, decoder.upscale_conv2.bias]
            self.between = _Then(norm, biases[0])
            constant(self, "inner_bias", biases[1])
        masks = list(decoder.output_hypernetworks_mlps)[1:]  # the first is of single-mask output
        self.masks = len(masks)
        self.networks = _Networks(
            [decoder.pred_obj_score_head, decoder.iou_prediction_head, *masks]
        )
        self.channels = int(decoder.upscale_conv2.out_channels)
        if not decoder.iou_prediction_head.sigmoid_output:
            raise ExportError("IoU estimates are sigmoids in every SAM 2.1.")
        # Of the tokens: the object score's, the IoU's, and those of the masks but the first.
        wanted = [0, 1, *range(3, 3 + self.masks)]
        self.register_buffer("chosen", torch.tensor(wanted), persistent=False)

    def forward(
        self, conditioned: Tensor, skip0: Tensor, skip1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = conditioned.shape[0]
        image = conditioned.flatten(2).transpose(1, 2) + self.dense
        queries: Tensor | None = None
        projected: list[Tensor] = []
        for layer in self.layers:
            queries, projected, image = layer(queries, projected, image)
        assert queries is not None  # there is a first layer
        read = self.final(self.query(queries), *self.of_image(image))
        queries = self.after_final(read, queries)

        found = self.networks(queries.index_select(1, self.chosen))
        object_score = found[0, :, 0]
        iou = found[1, :, 1 : 1 + self.masks].sigmoid()
        best = iou.argmax(dim=-1)
        row = torch.arange(n, device=best.device)
        # Not as a slice of the masks' rows, which ONNX Runtime would turn into an unequal split.
        weights = found[best + 2, row][:, : self.channels]

        x = self.up1(image)
        x = self.between(x, _nested(skip1, self.side, 1).expand(n, -1, -1))
        x = nn.functional.gelu(x)
        x = bias_gelu(self.up2(x) + _nested(skip0, self.side, 2), self.inner_bias)
        logits = (x @ weights[..., None]).reshape(n, self.side, self.side, 2, 2, 2, 2)
        logits = logits.permute(0, 1, 3, 5, 2, 4, 6).reshape(n, 4 * self.side, 4 * self.side)
        return logits, iou[row, best], object_score
