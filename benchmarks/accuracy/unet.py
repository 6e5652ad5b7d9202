"""What one would do instead: train a small U-Net on the same annotated images.

torch is imported here only, when the baseline is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.model.preprocess import scale_intensities

if TYPE_CHECKING:
    import torch

    from recallseg.runtime.model.preprocess import Intensity

__all__ = ["TrainedUNet", "UNetSettings", "train_unet"]

Planes = NDArray[np.float32]


@dataclass(frozen=True)
class UNetSettings:
    """How the baseline is trained.

    Attributes
    ----------
    size : side of the network's input in pixels, the same as SAM 2's in the bundle.
    width : channels of the first level; doubled at each of three further ones.
    steps, batch : of AdamW with a cosine schedule.
    mirror : whether training may mirror images.
    seed : of the weights, the order and the augmentation.
    """

    size: int
    width: int = 16
    steps: int = 200
    batch: int = 4
    learning_rate: float = 2e-3
    mirror: bool = False
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class TrainedUNet:
    """A trained network: give it an image, get masks. ``seconds`` is the time it was trained."""

    structures: tuple[str, ...]
    seconds: float
    parameters: int
    _net: Any
    _intensity: Intensity
    _size: int

    def predict(self, image: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
        """Return masks HxW by structure."""
        import torch

        pixels = _squared(scale_intensities(image, self._intensity), self._size)
        with torch.no_grad():
            logits = self._net(torch.from_numpy(pixels[None]))[0].numpy()
        height, width = image.shape[:2]
        return {
            name: cv2.resize(logits[i], (width, height), interpolation=cv2.INTER_LINEAR) > 0
            for i, name in enumerate(self.structures)
        }


def train_unet(
    exemplars: Sequence[Annotated],
    structures: tuple[str, ...],
    intensity: Intensity,
    settings: UNetSettings,
    step: Callable[[str], None] = lambda name: None,
) -> TrainedUNet:
    """Train on annotated images with affine, intensity and noise augmentation.

    Parameters
    ----------
    exemplars : a structure in neither ``masks`` nor ``absent`` counts as absent.
    intensity : the library's rule from pixel values to 0..1.
    step : called after each training step.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(settings.seed)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rng = np.random.default_rng(settings.seed)
    images = [_squared(scale_intensities(e.image, intensity), settings.size) for e in exemplars]
    masks = [_masks(e, structures, settings.size) for e in exemplars]
    net = _network(len(structures), settings.width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    start = perf_counter()
    net.train()
    for _ in range(settings.steps):
        drawn = rng.integers(len(images), size=settings.batch)
        pairs = [_augmented(images[i], masks[i], rng, settings.mirror) for i in drawn]
        inputs = torch.from_numpy(np.stack([image for image, _ in pairs]))
        wanted = torch.from_numpy(np.stack([mask for _, mask in pairs]))
        logits = net(inputs)
        wanted = functional.interpolate(wanted, logits.shape[-2:], mode="area")
        probability = logits.sigmoid()
        common = (probability * wanted).sum((2, 3))
        total = probability.sum((2, 3)) + wanted.sum((2, 3))
        dice = 1.0 - (2.0 * common + 1.0) / (total + 1.0)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted) + dice.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step("U-Net")
    seconds = perf_counter() - start
    net.eval()
    parameters = sum(weight.numel() for weight in net.parameters())
    return TrainedUNet(structures, seconds, parameters, net, intensity, settings.size)


def _squared(scaled: NDArray[np.float32], side: int) -> Planes:
    """Return an image as 3 x side x side, squashed to the square as the runtime does it."""
    shrink = max(scaled.shape[:2]) > side
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    resized = cv2.resize(scaled, (side, side), interpolation=method)
    if resized.ndim == 2:
        resized = np.repeat(resized[..., None], 3, axis=2)
    return np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32)


def _masks(annotated: Annotated, structures: tuple[str, ...], side: int) -> Planes:
    planes = np.zeros((len(structures), side, side), np.float32)
    for i, name in enumerate(structures):
        if name in annotated.masks:
            mask = annotated.masks[name].astype(np.float32)
            planes[i] = cv2.resize(mask, (side, side), interpolation=cv2.INTER_LINEAR) >= 0.5
    return planes


def _augmented(
    image: Planes, masks: Planes, rng: np.random.Generator, mirror: bool
) -> tuple[Planes, Planes]:
    side = image.shape[-1]
    angle, scale = rng.uniform(-15, 15), rng.uniform(0.85, 1.18)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), angle, scale)
    turn[:, 2] += rng.uniform(-0.06, 0.06, 2) * side

    def moved(planes: Planes, method: int, border: int) -> Planes:
        return np.stack(
            [cv2.warpAffine(p, turn, (side, side), flags=method, borderMode=border) for p in planes]
        )

    border = cv2.BORDER_REFLECT if mirror else cv2.BORDER_CONSTANT
    image = moved(image, cv2.INTER_LINEAR, border)
    masks = moved(masks, cv2.INTER_NEAREST, border)
    if mirror:
        for axis in (1, 2):
            if rng.random() < 0.5:
                image, masks = np.flip(image, axis), np.flip(masks, axis)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.7, 1.4))
    image = image * np.float32(rng.uniform(0.85, 1.15)) + np.float32(rng.uniform(-0.08, 0.08))
    image = image + rng.normal(0, rng.uniform(0, 0.04), image.shape).astype(np.float32)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(masks)


def _network(outputs: int, width: int) -> torch.nn.Module:
    """Return a U-Net of four levels; the first works at half of the input's resolution."""
    import torch
    from torch import nn

    def block(channels: int, out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for first in (channels, out):
            layers += [
                nn.Conv2d(first, out, 3, padding=1, bias=False),
                nn.GroupNorm(out // 4, out),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [width * 2**level for level in range(4)]
            self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
            ins = [width, *widths[:-1]]
            self.down = nn.ModuleList([block(a, b) for a, b in zip(ins, widths, strict=True)])
            self.up = nn.ModuleList(
                [block(widths[i + 1] + widths[i], widths[i]) for i in reversed(range(3))]
            )
            self.head = nn.Conv2d(width, outputs, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.stem(image)
            kept: list[torch.Tensor] = []
            for level, down in enumerate(self.down):
                x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
                kept.append(x)
            for up, skip in zip(self.up, kept[-2::-1], strict=True):
                x = nn.functional.interpolate(x, skip.shape[-2:], mode="bilinear")
                x = up(torch.cat((x, skip), 1))
            result: torch.Tensor = self.head(x)
            return result

    return UNet()
