"""Pixels to network inputs, logits to masks, stored memories to network inputs: one door.

There is one interface, :class:`Pixels`, with two implementations whose results are equal within
rounding (``tests/unit/engines/pixels``): the native kernels, built where there is a compiler
(docs/contribute/native-kernels.md), and OpenCV with numpy everywhere.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.pixels.interface import Pixels
from recallseg.engines.pixels.native import NativePixels
from recallseg.engines.pixels.opencv import OpenCvPixels

__all__ = ["CHOICE", "Pixels", "native_kernels", "open_pixels"]

CHOICE = "RECALLSEG_PIXELS"
"""Environment variable: ``native`` or ``opencv`` to force one, else the native one where built."""

_EXTENSION = f"{__name__}._native"


def open_pixels() -> Pixels:
    """Return an implementation of its own, for one thread at a time: it holds buffers.

    Raises
    ------
    InputError
        If :data:`CHOICE` names another.
    EngineUnavailableError
        If it names the native kernels and they were not built, or if they cannot be loaded.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", NativePixels.name, OpenCvPixels.name):
        raise InputError(
            f"{CHOICE} is '{choice}'; expected '{NativePixels.name}', '{OpenCvPixels.name}' or "
            "nothing."
        )
    kernels = None if choice == OpenCvPixels.name else native_kernels()
    if kernels is not None:
        return NativePixels(kernels)
    if choice == NativePixels.name:
        raise EngineUnavailableError(
            f"{CHOICE} asks for the native pixel kernels, which were not built. Install recallseg "
            "with '-C wheel.cmake=true' (docs/contribute/native-kernels.md), or unset it."
        )
    return OpenCvPixels()


def native_kernels() -> Any | None:
    """Return the extension module, or None where it was not built.

    Raises
    ------
    EngineUnavailableError
        If it is there and cannot be loaded.
    """
    try:
        return import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
        return None
    except ImportError as error:
        raise EngineUnavailableError(
            f"the native pixel kernels cannot be loaded: {error}. Build them anew on this machine "
            f"(docs/contribute/native-kernels.md), or set {CHOICE}={OpenCvPixels.name}."
        ) from error
