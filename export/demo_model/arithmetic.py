"""Which arithmetic a machine is fast in."""

from __future__ import annotations

import torch

__all__ = ["fast_arithmetic"]


def fast_arithmetic(device: torch.device | str) -> torch.autocast:
    """Return a context that computes in bfloat16 where the device has units for it, else in fp32.

    Without such units PyTorch emulates bfloat16 on a CPU, which was measured to be four times
    slower than single precision (AMD Zen 3, SAM 2 part of the demo pair at 256 px).
    """
    kind = torch.device(device).type
    units = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's
    found = torch.cpu.get_capabilities() if kind == "cpu" else {}
    enabled = kind != "cpu" or any(found.get(unit, False) for unit in units)
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled)
