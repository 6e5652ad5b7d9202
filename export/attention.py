"""Let models of ``transformers`` compute attention by a function of ours during an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["register_attention", "use_attention"]

AttentionFunction = Callable[..., tuple[Tensor, Any]]


def register_attention(name: str, function: AttentionFunction) -> None:
    """Make ``function`` known to ``transformers``.

    Parameters
    ----------
    name : for :func:`use_attention`.
    function : ``(module, query, key, value, attention_mask, scaling, **kwargs)`` on BxHxSxD
        tensors, returns BxSxHxD and None.
    """
    ALL_ATTENTION_FUNCTIONS.register(name, function)


@contextmanager
def use_attention(name: str, *models: PreTrainedModel) -> Iterator[None]:
    """Let these models call the function registered as ``name`` while the context lasts."""
    configs = [
        module.config
        for model in models
        for module in model.modules()
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
    ]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
