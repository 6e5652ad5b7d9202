"""What the graphs of this variant are made of. Tokens are rows: TxC, channels last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recallseg.engines.errors import ExportError
from recallseg.export.fused import attend_fused, bias_gelu, largest_of_four

__all__ = [
    "Chosen",
    "Patches",
    "Product",
    "SelfAttention",
    "TwoLayers",
    "constant",
    "folded",
]


def constant(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a tensor that becomes a constant of the graph."""
    module.register_buffer(name, value.detach().float().contiguous().clone(), persistent=False)


class Product(nn.Module):
    """``x`` times a constant, plus a bias if there is one.

    Parameters
    ----------
    weight : outputs x inputs, as PyTorch has it.
    bias : outputs, or what can be added to the rows; None for none.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        constant(self, "weight", weight.T)
        self.biased = bias is not None
        if bias is not None:
            constant(self, "bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y + self.bias if self.biased else y


def folded(value: Tensor, out: nn.Linear) -> Tensor:
    """Bias of an output projection with that of the values behind the softmax in it."""
    with torch.no_grad():
        bias: Tensor = out.weight.double() @ value.double() + out.bias.double()
    return bias


class Chosen(nn.Module):
    """Rows of TxC by number: zeros where a number is -1; nothing is done if all stay as they are.

    Parameters
    ----------
    numbers : of rows below ``count``.
    count : T.
    """

    numbers: Tensor
    there: Tensor

    def __init__(self, numbers: NDArray[np.int64], count: int) -> None:
        super().__init__()
        self.same = np.array_equal(numbers, np.arange(count))
        self.padded = bool((numbers < 0).any())
        self.register_buffer("numbers", torch.from_numpy(np.maximum(numbers, 0)), persistent=False)
        constant(self, "there", torch.from_numpy(numbers >= 0)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            return x
        found = x.index_select(0, self.numbers)
        return found * self.there if self.padded else found


class SelfAttention(nn.Module):
    """Queries, keys and values of windows of rows; the output has no bias yet, see ``bias``.

    Parameters
    ----------
    query, key, value : weight and bias of each projection.
    out : projection of the output.
    heads, scale : of the attention.
    windows : how many the rows are; their tokens lie one behind the other.
    pooled : whether every four queries become their largest.
    back : rows of the output to keep; None for all as they are.
    """

    query_bias: Tensor

    def __init__(
        self,
        query: tuple[Tensor, Tensor],
        key: tuple[Tensor, Tensor],
        value: tuple[Tensor, Tensor],
        out: nn.Linear,
        heads: int,
        scale: float,
        *,
        windows: int = 1,
        pooled: bool = False,
        back: Chosen | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = (Product(part[0]) for part in (query, key, value))
        constant(self, "query_bias", query[1])
        self.out = Product(out.weight)
        self.bias = folded(value[1], out)
        self.heads, self.scale, self.windows, self.pooled = heads, scale, windows, pooled
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        query = (largest_of_four(query) if self.pooled else query) + self.query_bias
        found = attend_fused(
            *(
                part.reshape(self.windows, -1, part.shape[-1])
                for part in (query, self.key(x), self.value(x))
            ),
            heads=self.heads,
            scale=self.scale,
        )
        found = found.reshape(-1, found.shape[-1])
        if self.back is not None:
            found = self.back(found)
        out: Tensor = self.out(found)
        return out


class TwoLayers(nn.Module):
    """The two layers behind an attention: GELU between them, the second without its bias."""

    inner_bias: Tensor

    def __init__(self, first: nn.Linear, second: nn.Linear, scale: Tensor | None = None) -> None:
        super().__init__()
        by = torch.ones(second.out_features) if scale is None else scale.detach()
        self.first, self.second = Product(first.weight), Product(second.weight * by[:, None])
        constant(self, "inner_bias", first.bias)
        self.bias = (second.bias * by).detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(bias_gelu(self.first(x), self.inner_bias))
        return out


class Patches(nn.Module):
    """A convolution with a stride as a product of blocks: 1xCxSxS -> TxC', plus a position.

    The image is cut into blocks as large as the stride; a place looks at the blocks that its kernel
    reaches, of which those outside of the image are zeros.

    Parameters
    ----------
    convolution : square, with one stride and one padding.
    side : of the map of places.
    token : for every row that is made, the number of its place row by row; -1 for a row that sees
        nothing of the image.
    position : TxC', to be added, in the order of ``token``.
    """

    def __init__(
        self, convolution: nn.Conv2d, side: int, token: NDArray[np.int64], position: Tensor
    ) -> None:
        super().__init__()
        kernel, step = int(convolution.kernel_size[0]), int(convolution.stride[0])
        padding: Any = convolution.padding
        before = int(padding[0])
        if convolution.kernel_size[0] != convolution.kernel_size[1] or convolution.groups != 1:
            raise ExportError("the patch embedding must be one square convolution.")
        self.step, self.side = step, side
        first, last = -before // step, (kernel - 1 - before) // step
        reach = last - first + 1
        # The kernel within its blocks: outputs x inputs x (reach*step) x (reach*step).
        weight = convolution.weight.detach()
        around = torch.zeros(*weight.shape[:2], reach * step, reach * step)
        start = -before - first * step
        around[:, :, start : start + kernel, start : start + kernel] = weight
        blocks = around.unflatten(3, (reach, step)).unflatten(2, (reach, step))
        # outputs x inputs x by x y x bx x x -> outputs x (by, bx, inputs, y, x)
        joined = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1)
        offset = position.clone()
        if convolution.bias is not None:
            offset[torch.from_numpy(token >= 0)] += convolution.bias
        self.product = Product(joined, offset)
        y, x = np.divmod(token, side)
        near = np.arange(first, last + 1)
        by = y[:, None, None] + near[None, :, None]
        bx = x[:, None, None] + near[None, None, :]
        inside = (by >= 0) & (by < side) & (bx >= 0) & (bx < side) & (y >= 0)[:, None, None]
        self.blocks = Chosen(np.where(inside, by * side + bx, -1).ravel(), side**2)
        self.width = weight.shape[1] * step * step

    def forward(self, image: Tensor) -> Tensor:
        cut = image[0].unflatten(2, (self.side, self.step)).unflatten(1, (self.side, self.step))
        blocks = cut.permute(1, 3, 0, 2, 4).reshape(-1, self.width)
        out: Tensor = self.product(self.blocks(blocks).reshape(len(self.product.bias), -1))
        return out
