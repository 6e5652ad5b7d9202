"""Tensor files, read without ever executing a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recallseg.engines.errors import CheckpointError
from recallseg.engines.imports import lacks_memory
from recallseg.engines.machine_fault import machine_fault

__all__ = ["read_tensors"]

WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Keys under which training scripts keep the weights beside optimizer state and counters."""

_HEAD = 256  # bytes of a file that tell what it is

PARALLEL_PREFIX = "module."
"""What PyTorch's data-parallel wrappers put before every name."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a ``.safetensors`` or PyTorch file on the CPU.

    Raises
    ------
    CheckpointError
        When the file is damaged, is of another kind, or could only be read by executing it.
    """
    _refuse_what_downloads_leave(path)
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path, device="cpu")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            _check_given(path, error)
            raise CheckpointError(
                f"'{path}' is no readable safetensors file: {error}. It is probably truncated; "
                "compare its size with the source's and copy it again."
            ) from error
    else:
        tensors = _unwrap(_load_pickle_safely(path), path)
    if tensors and all(name.startswith(PARALLEL_PREFIX) for name in tensors):
        tensors = {name[len(PARALLEL_PREFIX) :]: tensor for name, tensor in tensors.items()}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no tensors. Pass the file with the model's weights.")
    return tensors


def _refuse_what_downloads_leave(path: Path) -> None:
    """Raise CheckpointError for what lies where weights should: nothing, a page, a pointer."""
    try:
        with path.open("rb") as file:
            begin = file.read(_HEAD)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from error
    head = begin.lstrip()
    if not head:
        raise CheckpointError(f"'{path}' is empty. Copy or download the file again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{path}' is a pointer of Git LFS, not the weights. Fetch them with 'git lfs pull', "
            "or download the file itself."
        )
    if head.startswith(b"<") and begin[8:9] != b"{":  # or it is a safetensors file's length
        raise CheckpointError(
            f"'{path}' is a web page, not weights: what a download leaves that was refused, of a "
            "gated model, say. Accept its licence on the hub, log in, and download it again."
        )


def _check_given(path: Path, error: BaseException) -> None:
    """Refuse to call a file damaged that the machine did not give."""
    if lacks_memory(error):
        raise MemoryError(f"'{path}' needs more memory than there is: {error}") from error
    if number := machine_fault(error):
        raise CheckpointError(
            f"'{path}' cannot be read: {os.strerror(number)}. The file may be as it should: see "
            "to the disk, or the permission, and try again."
        ) from error


def _load_pickle_safely(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler of a hostile or damaged file can fail in any way; each of them means the same.
    except Exception as error:
        _check_given(path, error)
        # What PyTorch advises next is to execute the file.
        reason = str(error).strip().splitlines()[0].partition(". ")[0] if str(error) else ""
        raise CheckpointError(
            f"'{path}' cannot be read as weights ({type(error).__name__}: "
            f"{reason or 'no reason given'}). Either it is damaged or no PyTorch "
            "checkpoint, or it holds objects that would have to be executed, which is never done. "
            "Save the bare state_dict again from a machine that you trust, or convert it to "
            "safetensors."
        ) from error


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict in ``content``, which may be wrapped once."""
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"'{path}' holds a {type(content).__name__}; expected a dictionary of tensors. Pass a "
            "checkpoint that was saved from a state_dict."
        )
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"'{path}' holds entries that are no tensors ({len(other)}): {', '.join(other[:4])}. "
            f"Expected a state_dict, or one under the key {' or '.join(map(repr, WRAPPERS))}."
        )
    return {str(name): value for name, value in content.items()}
