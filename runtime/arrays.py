"""What callers hand in as an array of the host: numpy's own, what offers DLPack, PIL images.

None of their packages is imported: PyTorch, JAX and CuPy offer DLPack, and a PIL image is known by
its class. Nothing is guessed: where the numbers of an array would not be the picture that its owner
sees (palettes, CMYK, opacity, an orientation that is still to be applied), they are converted as
:func:`recallseg.read_image` does, or refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device.memory import on_gpu
from recallseg.engines.errors import InputError

__all__ = ["as_array"]

_PLAIN = ("L", "RGB", "I", "F")
_CONVERTED = {"1": "L", "P": "RGBA", "PA": "RGBA", "LA": "LA", "RGBA": "RGBA"}
_KEYED = {"L": "LA", "RGB": "RGBA"}
"""Modes whose ``transparency`` names one grey or colour that is see-through."""
_ORIENTATION = 0x0112


def as_array(value: Any, what: str) -> NDArray[Any]:
    """Return a caller's array, image or tensor of the host as numpy's, without a copy if it can.

    Parameters
    ----------
    value : a numpy array of any shape and dtype; what offers ``__dlpack__`` on the CPU, e.g. a
        PyTorch tensor; or a PIL image of mode 1, L, LA, I, I;16, F, P, PA, RGB or RGBA. A palette
        becomes its colours, or greys if it has no other; an opacity channel is dropped if all of it
        is opaque.
    what : names it in messages, e.g. ``an image``.

    Raises
    ------
    InputError
        If it is none of these, lies on a GPU, has masked elements, or is a PIL image of another
        mode, of several pages, partly transparent, still to be turned (EXIF), or damaged.

    Examples
    --------
    >>> as_array(memoryview(b"no image"), "an image")
    Traceback (most recent call last):
    recallseg.errors.InputError: an image must be a numpy array, a PIL image or offer DLPack, got...
    """
    if isinstance(value, np.ndarray):
        if np.ma.is_masked(value):
            raise InputError(
                f"{what} has elements that are masked, and what lies below them would be taken for "
                "pixels. Fill them, for example with image.filled(0)."
            )
        return np.asarray(value)
    if _is_pil(type(value)):
        return _from_pil(value, what)
    if on_gpu(value):
        raise InputError(
            f"{what} ({type(value).__name__}) lies on a GPU, and is needed on the host. Copy it "
            "there, for example with image.cpu()."
        )
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{what} ({type(value).__name__}) cannot be read: {error}. Convert it to a numpy "
                "array."
            ) from error
    if isinstance(value, (list, tuple)):
        raise InputError(
            f"{what} must be one, got a {type(value).__name__} of {len(value)}. Of several images, "
            "call Segmenter.segment_many or Library.add_many; of numbers, pass numpy.array(...)."
        )
    raise InputError(
        f"{what} must be a numpy array, a PIL image or offer DLPack, got {type(value).__name__}. "
        "Convert it with numpy.asarray()."
    )


def _is_pil(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__name__}" == "PIL.Image.Image" for base in kind.__mro__)


def _from_pil(image: Any, what: str) -> NDArray[Any]:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise InputError(
            f"{what} (PIL) has {pages} pages; expected one. Choose it with image.seek(i), and pass "
            "image.copy()."
        )
    try:
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{what} (PIL) cannot be decoded: {error}. Export it again.") from error
    if turned not in (0, 1):
        raise InputError(
            f"{what} (PIL) is still to be turned (EXIF orientation {turned}), so masks would not "
            "lie as it is shown. Pass PIL.ImageOps.exif_transpose(image), or the file's path."
        )
    mode = image.mode
    wanted = _KEYED.get(mode) if "transparency" in image.info else None
    wanted = wanted or _CONVERTED.get(mode)
    if wanted is None and mode not in _PLAIN and not mode.startswith("I;16"):
        raise InputError(
            f"{what} (PIL) has mode {mode}; expected one of 1, L, LA, I, I;16, F, P, PA, RGB, "
            "RGBA. Convert it with image.convert('RGB')."
        )
    array = np.asarray(image if wanted in (None, mode) else image.convert(wanted))
    if wanted in ("LA", "RGBA"):
        if not (array[..., -1] == 255).all():
            raise InputError(
                f"{what} (PIL) is partly transparent: what lies below is unknown. Pass it without "
                "opacity, for example image.convert('RGB')."
            )
        array = array[..., 0] if wanted == "LA" else array[..., :3]
        if mode in ("P", "PA") and not np.ptp(array, axis=2).any():
            array = array[..., 0]
    return array
