"""What a plan is built for: which GPUs may load it."""

from __future__ import annotations

from dataclasses import dataclass

from recallseg.engines.errors import InputError
from recallseg.engines.tensorrt.flavour import Flavour

__all__ = ["DEFAULT_RTX", "Target"]

RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
DEFAULT_RTX = ("sm86", "sm89", "sm120")
"""Ampere, Ada and Blackwell. Turing (sm75) has no fp32 matrix product in TensorRT-RTX, so a plan
for it has to be fp16, and is asked for by name."""

COMPATIBILITY = ("current", "ampere+", "same-capability", "version")
"""``current``: this GPU and this version, the fastest. ``ampere+``, ``same-capability``: TensorRT's
hardware compatibility levels. ``version``: loads in later versions of the same major one."""


@dataclass(frozen=True)
class Target:
    """Checked targets, sorted.

    Attributes
    ----------
    names : of :data:`RTX_CAPABILITIES` for TensorRT-RTX, of :data:`COMPATIBILITY` for TensorRT.
    gpu : the GPU that a plan for ``current`` was built on, e.g. ``sm87 Orin``; empty otherwise.
    """

    names: tuple[str, ...]
    gpu: str = ""

    @classmethod
    def parse(cls, asked: tuple[str, ...] | None, flavour: Flavour) -> Target:
        """Check a list of names; None means the default.

        Raises
        ------
        InputError
            For a name that this flavour does not know, or two that exclude each other.
        """
        known = RTX_CAPABILITIES if flavour.is_rtx else COMPATIBILITY
        default = DEFAULT_RTX if flavour.is_rtx else ("current",)
        names = tuple(sorted(set(asked or default), key=lambda n: (len(n), n)))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(
                f"engine '{flavour.name}' has no target {', '.join(unknown)}; choose from "
                f"{', '.join(known)}."
            )
        if {"ampere+", "same-capability"} <= set(names) or (
            "current" in names and set(names) - {"current", "version"}
        ):
            raise InputError(f"targets {', '.join(names)} exclude each other.")
        return cls(names)

    @property
    def capabilities(self) -> tuple[int, ...]:
        """Compute capabilities as numbers (86 is 8.6); empty for TensorRT."""
        return tuple(int(name[2:]) for name in self.names if name.startswith("sm"))

    @property
    def follows_gpu(self) -> bool:
        """Whether the plan belongs to the GPU that it is built on."""
        return not self.capabilities and "ampere+" not in self.names

    def __str__(self) -> str:
        return ",".join(self.names) + (f" on {self.gpu}" if self.gpu else "")
