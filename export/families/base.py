"""What tells networks apart, in one place for each family.

A *family* is a network's architecture together with everything in which it differs from the others
as far as this project is concerned. Exporters ask it; engines and runtime know none, only what a
bundle's manifest says (sizes, tokens of a memory and their grid, normalisation).
``docs/contribute/networks.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import InputError

__all__ = ["IMAGENET", "ImageSizes", "SegmenterFamily"]

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What DINOv2 and SAM 2 were trained with (their image processors' defaults)."""


@dataclass(frozen=True)
class ImageSizes:
    """Sides in pixels of the square images that a network takes.

    Attributes
    ----------
    smallest, step : multiples of ``step`` from ``smallest`` on.
    usual : what messages suggest.
    reason : why ``step``, for messages.
    """

    smallest: int
    step: int
    usual: tuple[int, ...]
    reason: str

    def check(self, size: int, title: str) -> None:
        """Raise InputError unless ``size`` is one of them."""
        number = isinstance(size, int) and not isinstance(size, bool)
        if not number or size < self.smallest or size % self.step:
            raise InputError(
                f"image size {size!r} does not fit {title}. Choose one of "
                f"{', '.join(map(str, self.usual))}, or any other multiple of {self.step} from "
                f"{self.smallest} on ({self.reason})."
            )


@dataclass(frozen=True)
class SegmenterFamily:
    """A network with a memory: an image encoder, a memory encoder and attention, a mask decoder.

    All are built of ``transformers``' parts and share SAM 2's prompt encoder and mask decoder, so
    that :mod:`recallseg.export.graphs` is written once. The callables take the model.

    Attributes
    ----------
    name, title : for programs and for people.
    model_class, session_class : of ``transformers``; the session holds its video model's state.
    sizes : of images.
    normalisation : of the encoder's image.
    rounds_memories : whether the video model rounds memories to bfloat16.
    has_hiera : whether the encoder is Hiera, for which variants have forms of their own.
    vision_encoder : module from an image to an object with ``fpn_hidden_states``, the maps of
        strides 4, 8 and 16.
    to_tokens : module from the memory encoder's map nx64xhxw to memory tokens nxTx64.
    memory_shape : T, and rows and columns over which rotary encoding spreads the last of them;
        (0, (0, 0)) for one token for each place of the feature map.
    memory_position : 1xTx64, added to tokens that are keys.
    memory_attention : module with the call of ``Sam2VideoMemoryAttention``.
    key_rotation : cosines and sines Tx(D/2) that turn the keys of one memory.
    inner_layers : the two layers of one layer of memory attention behind its attention, with the
        activation between them.
    step_options : what the video model's step for one frame asks for beside what SAM 2's does.
    """

    name: str
    title: str
    model_class: type[Any]
    session_class: type[Any]
    sizes: ImageSizes
    normalisation: Normalisation
    rounds_memories: bool
    has_hiera: bool
    vision_encoder: Callable[[Any], nn.Module]
    to_tokens: Callable[[Any], nn.Module]
    memory_shape: Callable[[Any], tuple[int, tuple[int, int]]]
    memory_position: Callable[[Any], Tensor]
    memory_attention: Callable[[Any], nn.Module]
    key_rotation: Callable[[Any], tuple[Tensor, Tensor]]
    inner_layers: Callable[[Any], tuple[nn.Linear, nn.Module, nn.Linear]]
    step_options: Mapping[str, bool] = field(default_factory=dict)
