"""The digest of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

__all__ = ["state_digest"]


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hexadecimal) over sorted names, dtypes, shapes and bytes.

    It does not depend on the file format that the weights came from: one of Meta's files and the
    same weights as a Hugging Face folder have the same digest.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous().numpy()
        # Little-endian on every machine, so that a digest means the same everywhere.
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        shape = "x".join(str(size) for size in array.shape)
        digest.update(f"{name}\0{array.dtype.name}\0{shape}\0".encode())
        digest.update(array.reshape(-1).view("u1").data)
    return digest.hexdigest()
