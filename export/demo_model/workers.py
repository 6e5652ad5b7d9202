"""Training by several processes of one thread each.

On CPU this beats one process with as many threads: a step is thousands of small operations, and
threads that wait for each other at every one of them lose most of their time as soon as anything
else runs on the machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["mean_over_workers", "rank_and_count", "run_workers"]


def rank_and_count() -> tuple[int, int]:
    """Return this worker's number and the number of workers; (0, 1) outside of `run_workers`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mean_over_workers(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over all workers, in place and in one exchange."""
    _, count = rank_and_count()
    if count == 1:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= count
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def _work(rank: int, count: int, meeting: str, function: Callable[[Any], None], given: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
    )
    try:
        function(given)
    finally:
        distributed.destroy_process_group()


def run_workers(count: int, function: Callable[[Any], None], given: Any) -> None:
    """Call ``function(given)`` in ``count`` processes that can average tensors among them."""
    if count == 1:
        function(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            _work, args=(count, meeting, function, given), nprocs=count
        )
