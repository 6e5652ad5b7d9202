"""DLPack from the consumer's side, for arrays on a GPU.

numpy reads DLPack for the CPU only, so the capsule's struct is read here: ``DLManagedTensor`` of
dlpack.h, version 0 (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from recallseg.engines.device.memory import DeviceTensor, contiguous_strides
from recallseg.engines.errors import InputError

__all__ = ["read_dlpack"]

_CUDA, _CUDA_HOST, _CUDA_MANAGED = 2, 3, 13  # DLDeviceType
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLDataTypeCode


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (
    ("tensor", _DLTensor),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_python: Any = ctypes.pythonapi
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_python.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
_USED = b"used_dltensor"


class _Owner:
    """Keeps the producer's tensor, and tells it when it is no longer needed."""


def read_dlpack(source: Any, ordinal: int) -> DeviceTensor:
    """Return a view of an array that offers ``__dlpack__``.

    Raises
    ------
    InputError
        If it does not lie on GPU ``ordinal``, is not contiguous, or has a dtype numpy lacks.
    """
    kind, number = source.__dlpack_device__()
    if int(kind) not in (_CUDA, _CUDA_HOST, _CUDA_MANAGED) or int(number) != ordinal:
        raise InputError(
            f"the array lies on DLPack device ({int(kind)}, {int(number)}), not on GPU {ordinal} "
            f"({_CUDA}, {ordinal})."
        )
    # Stream 1 is the default stream: the producer makes its work visible there.
    capsule = source.__dlpack__(stream=1)
    address = _python.PyCapsule_GetPointer(capsule, b"dltensor")
    managed = ctypes.cast(address, ctypes.POINTER(_DLManagedTensor))
    _python.PyCapsule_SetName(capsule, _USED)
    owner = _Owner()
    if managed.contents.deleter:
        weakref.finalize(owner, managed.contents.deleter, managed)
    tensor = managed.contents.tensor
    if tensor.code not in _KINDS or tensor.lanes != 1:
        raise InputError(f"the array's DLPack dtype (code {tensor.code}) is not supported.")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{max(1, tensor.bits // 8)}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
        wanted = contiguous_strides(shape, dtype.itemsize)
        if any(s != w for s, w, size in zip(strides, wanted, shape, strict=True) if size > 1):
            raise InputError(
                f"a frame on the GPU must be contiguous; this one has strides {strides}, expected "
                f"{wanted}."
            )
    return DeviceTensor(int(tensor.data or 0) + int(tensor.byte_offset), shape, dtype, owner)
