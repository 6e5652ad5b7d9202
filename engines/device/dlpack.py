"""DLPack from the consumer's side, for arrays on a GPU.

numpy reads DLPack for the CPU only, so the capsule's struct is read here:
``DLManagedTensorVersioned`` of dlpack.h 1.x, or ``DLManagedTensor`` from producers that know no
version (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from recallseg.engines.device.memory import DeviceTensor, contiguous_strides
from recallseg.engines.errors import InputError

__all__ = ["lies_on_gpu", "read_dlpack"]

_CUDA, _CUDA_HOST, _CUDA_MANAGED = 2, 3, 13  # DLDeviceType
_DTYPES = {
    **{(0, bits): f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"f{bits // 8}" for bits in (16, 32, 64)},
    (6, 8): "b1",
}
"""numpy's names by DLDataTypeCode and bits."""
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_VERSION = (1, 0)


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


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_python: Any = ctypes.pythonapi
_python.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_python.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
# A capsule keeps the pointer to its name, not a copy.
_NAMES = {
    b"dltensor_versioned": (b"used_dltensor_versioned", _Versioned),
    b"dltensor": (b"used_dltensor", _Managed),
}


class _Owner:
    """Keeps the producer's tensor, and tells it when it is no longer needed."""


def lies_on_gpu(source: Any) -> bool:
    """Whether an array that offers ``__dlpack__`` lies where a GPU sees it."""
    kind, _ = source.__dlpack_device__()
    return int(kind) in (_CUDA, _CUDA_HOST, _CUDA_MANAGED)


def read_dlpack(source: Any, ordinal: int, stream: int) -> DeviceTensor:
    """Return a view of an array that offers ``__dlpack__``.

    Parameters
    ----------
    source : the producer's array. What it queued on it is done before anything queued on
        ``stream`` from now on.
    ordinal : the GPU that it must lie on.
    stream : handle of the stream that will read or write it.

    Raises
    ------
    InputError
        If it does not lie on GPU ``ordinal``, is not contiguous, has a dtype numpy lacks, or the
        producer does not give it away.
    """
    kind, number = source.__dlpack_device__()
    if not lies_on_gpu(source) or int(number) != ordinal:
        raise InputError(
            f"the array lies on DLPack device ({int(kind)}, {int(number)}), not on GPU {ordinal} "
            f"({_CUDA}, {ordinal})."
        )
    managed, read_only, owner = _take(_capsule(source, stream))
    tensor = managed.tensor
    dtype_name = _DTYPES.get((tensor.code, tensor.bits))
    if dtype_name is None or tensor.lanes != 1:
        raise InputError(
            f"the array's DLPack dtype (code {tensor.code}, {tensor.bits} bits, {tensor.lanes} "
            "lanes) is not supported."
        )
    dtype = np.dtype(dtype_name)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
        wanted = contiguous_strides(shape, dtype.itemsize)
        if any(s != w for s, w, size in zip(strides, wanted, shape, strict=True) if size > 1):
            raise InputError(
                f"an array on the GPU must be contiguous; this one has strides {strides}, expected "
                f"{wanted}."
            )
    address = int(tensor.data or 0) + int(tensor.byte_offset)
    return DeviceTensor(address, shape, dtype, owner, read_only=read_only)


def _capsule(source: Any, stream: int) -> Any:
    try:
        try:
            return source.__dlpack__(stream=stream, max_version=_VERSION)
        except TypeError:  # a producer from before DLPack had versions
            return source.__dlpack__(stream=stream)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{type(source).__name__} gives no DLPack: {error}.") from error


def _take(capsule: Any) -> tuple[Any, bool, _Owner]:
    """Return the struct in a capsule, which is used up by it, and what keeps its memory alive."""
    name = next((n for n in _NAMES if _python.PyCapsule_IsValid(capsule, n)), None)
    if name is None:
        raise InputError("__dlpack__ returned no capsule of DLPack, or one that was used before.")
    used, kind = _NAMES[name]
    address = _python.PyCapsule_GetPointer(capsule, name)
    managed = kind.from_address(address)
    _python.PyCapsule_SetName(capsule, used)
    owner = _Owner()
    if managed.deleter:
        weakref.finalize(owner, _Deleter(managed.deleter), address)
    if kind is _Managed:
        return managed, False, owner
    if managed.major != _VERSION[0]:
        raise InputError(
            f"the array comes as DLPack {managed.major}.{managed.minor}; version {_VERSION[0]} and "
            "the one before it are understood."
        )
    return managed, bool(managed.flags & _READ_ONLY), owner
