"""Random fields and shapes that the task generator is built from.

Everything is a batched torch operation on the device of the random generator, so that the same
code feeds a training on CPU and on a GPU.

Shapes
------
``T`` tasks of ``M`` subjects each; a field is ``T x M x S x S`` (rows, then columns). Coordinates
run from -1 (left, top) to 1 (right, bottom); lengths are in the same unit, so that an image is 2
wide whatever its size in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Source", "mixing_matrix"]


def mixing_matrix(positions: Tensor, *, shared: Tensor, along: Tensor, knots: int = 6) -> Tensor:
    """Say how alike the subjects of a task are.

    A subject's random numbers are a sum of three parts: one that all subjects of the task share,
    one that changes smoothly with the subject's position along a volume, and one of its own. One
    matrix expresses independent patients, similar patients, and neighbouring slices alike.

    Parameters
    ----------
    positions
        ``T x M``, in 0..1 along the volume.
    shared, along
        ``T``: parts of the variance that all subjects share and that follow the position.
    knots
        Number of independent states along the volume.

    Returns
    -------
    Tensor
        ``T x M x (1 + knots + M)``; every row has length one, so that variances stay one.
    """
    tasks, subjects = positions.shape
    device = positions.device
    centres = torch.linspace(0.0, 1.0, knots, device=device)
    width = 1.0 / (knots - 1)
    radial = torch.exp(-0.5 * ((positions[..., None] - centres) / width) ** 2)
    radial = radial / radial.norm(dim=-1, keepdim=True)
    own = (1.0 - shared - along).clamp(min=0.0)
    return torch.cat(
        [
            shared.sqrt()[:, None, None].expand(tasks, subjects, 1),
            along.sqrt()[:, None, None] * radial,
            own.sqrt()[:, None, None] * torch.eye(subjects, device=device),
        ],
        dim=-1,
    )


class Source:
    """Random numbers, fields and shapes for ``T`` tasks of ``M`` subjects.

    Parameters
    ----------
    generator
        Its device is where everything is computed.
    mixing
        ``T x M x R`` from `mixing_matrix`.
    size
        Height and width of the fields in pixels.
    """

    def __init__(self, generator: torch.Generator, mixing: Tensor, size: int) -> None:
        self.generator = generator
        self.device = generator.device
        self.mixing = mixing
        self.tasks, self.subjects = mixing.shape[:2]
        self.size = size
        axis = (torch.arange(size, device=self.device) + 0.5) / size * 2.0 - 1.0
        self.y = axis[:, None].expand(size, size)
        self.x = axis[None, :].expand(size, size)

    # Per task: the same for all subjects.

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``T x shape`` uniform in low..high."""
        values = torch.rand(self.tasks, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * values

    def chance(self, probability: float, *shape: int) -> Tensor:
        """``T x shape`` of booleans that are true with the given probability."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def integer(self, low: int, high: int) -> int:
        """One integer in low..high (both included) for the whole call, for counts and grids."""
        draw = torch.randint(low, high + 1, (1,), generator=self.generator, device=self.device)
        return int(draw.item())

    # Per subject: as alike as the mixing matrix says.

    def normal(self, *shape: int) -> Tensor:
        """``T x M x shape`` standard normal, alike between subjects as the task demands."""
        base = torch.randn(
            self.tasks, self.mixing.shape[-1], *shape, generator=self.generator, device=self.device
        )
        mixed = torch.bmm(self.mixing, base.reshape(self.tasks, base.shape[1], -1))
        return mixed.view(self.tasks, self.subjects, *shape)

    def own_normal(self, *shape: int) -> Tensor:
        """``T x M x shape`` standard normal, independent for every subject whatever the task."""
        return torch.randn(
            self.tasks, self.subjects, *shape, generator=self.generator, device=self.device
        )

    def own_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``T x M x shape`` uniform in low..high, independent for every subject."""
        values = torch.rand(
            self.tasks, self.subjects, *shape, generator=self.generator, device=self.device
        )
        return low + (high - low) * values

    # Fields.

    def enlarge(self, coarse: Tensor) -> Tensor:
        """Bicubic enlargement of ``T x M x g x g`` knots to the full image size."""
        size = (self.size, self.size)
        return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)

    def field(self, cells: int, *, own: bool = False) -> Tensor:
        """``T x M x S x S`` smooth noise of about unit variance with ``cells`` knots per side."""
        coarse = self.own_normal(cells, cells) if own else self.normal(cells, cells)
        # Interpolation between independent knots lowers the variance; 1.25 restores it on average.
        return self.enlarge(coarse) * 1.25

    def rough_field(self, cells: int, octaves: int = 3, *, own: bool = False) -> Tensor:
        """Smooth noise with finer detail of halved amplitude added ``octaves - 1`` times."""
        total = self.field(cells, own=own)
        for octave in range(1, octaves):
            fine = min(cells * 2**octave, self.size // 2)
            total = total + 0.5**octave * self.field(fine, own=own)
        return total

    def grain(self, cells: int) -> Tensor:
        """Cheap independent texture: bilinear noise, ``T x M x S x S``."""
        coarse = self.own_normal(cells, cells)
        return F.interpolate(coarse, size=(self.size, self.size), mode="bilinear")

    # Shapes.

    def ellipse(
        self,
        centre: Tensor,
        axes: Tensor,
        angle: Tensor,
        *,
        power: float = 2.0,
    ) -> Tensor:
        """Level of a (super-)ellipse: 1 at its centre, 0 at its edge, negative outside.

        Parameters
        ----------
        centre, axes
            ``T x M x 2`` in (x, y) order, coordinate units.
        angle
            ``T x M`` radians.
        power
            2 is an ellipse, larger is squarer.

        Returns
        -------
        Tensor
            ``T x M x S x S``.
        """
        dx = self.x - centre[..., 0, None, None]
        dy = self.y - centre[..., 1, None, None]
        cos, sin = torch.cos(angle)[..., None, None], torch.sin(angle)[..., None, None]
        u = (cos * dx + sin * dy) / axes[..., 0, None, None]
        v = (cos * dy - sin * dx) / axes[..., 1, None, None]
        if power == 2.0:
            return 1.0 - (u * u + v * v).sqrt()
        return 1.0 - (u.abs() ** power + v.abs() ** power) ** (1.0 / power)

    def seeds(self, per_side: int, jitter: float) -> Tensor:
        """``T x M x N x 2`` points (x, y) on a jittered grid that reaches past the image."""
        axis = (torch.arange(per_side, device=self.device) + 0.5) / per_side * 2.4 - 1.2
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, 1, -1, 2)
        shift = self.normal(per_side * per_side, 2) * (jitter * 2.4 / per_side)
        return grid + shift

    def nearest_seeds(
        self, seeds: Tensor, *, stretch: Tensor, bend: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Distances to the nearest and second nearest seed, in a bent metric.

        Computed at half the image size: the result is smooth but for the edges between cells, and
        the cost grows with pixels times seeds.

        Parameters
        ----------
        seeds
            ``T x M x N x 2``.
        stretch
            ``T``: how much farther apart things are in y than in x.
        bend
            Amplitude of the random bending of the coordinates.

        Returns
        -------
        tuple
            ``first``, ``second`` (``T x M x S x S`` distances) and ``index`` (``T x M x S x S``,
            the nearest seed).
        """
        half = self.size // 2
        axis = (torch.arange(half, device=self.device) + 0.5) / half * 2.0 - 1.0
        points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        moved = self.own_normal(2 * 12, 12).view(self.tasks * self.subjects, 2, 12, 12)
        moved = F.interpolate(moved, size=(half, half), mode="bicubic") * bend
        points = points + moved.permute(0, 2, 3, 1)
        scale = torch.stack([torch.ones_like(stretch), stretch], dim=-1)
        scale = scale[:, None].expand(-1, self.subjects, -1).reshape(-1, 1, 2)
        points = points.flatten(1, 2) * scale
        distance = torch.cdist(points, seeds.flatten(0, 1) * scale)
        first, index = distance.min(dim=-1, keepdim=True)
        second = distance.scatter(-1, index, math.inf).amin(dim=-1)
        shape = (self.tasks, self.subjects, half, half)
        levels = torch.stack([first.view(shape), second.view(shape)], dim=0).flatten(0, 1)
        levels = F.interpolate(levels, scale_factor=2.0, mode="bilinear")
        first, second = levels.view(2, self.tasks, *levels.shape[1:]).unbind(0)
        index = index.view(shape).repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        return first, second, index


def per_seed(values: Tensor, index: Tensor) -> Tensor:
    """Look up ``T x M x N`` values at ``T x M x S x S`` seed indices."""
    return torch.gather(values, 2, index.flatten(2)).view(index.shape)
