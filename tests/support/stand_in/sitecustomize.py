"""Puts the stand-ins for a GPU and ONNX Runtime's providers for it into processes.

Into those of ``bench gpu`` that Python starts with this folder in ``PYTHONPATH``: a dry run.

``STAND_IN_DIES=PIECE`` lets the process of that piece of ``bench gpu`` end by a signal,
``STAND_IN_HANGS=PIECE`` lets it not end.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def install() -> None:
    sys.path.insert(0, str(HERE.parents[1]))
    import pytest
    from support.fake_onnxruntime import install as stand_in
    from support.fake_tensorrt import HostGpu

    from recallseg.benchmarks import latency
    from recallseg.benchmarks.gpu import graphs, kernels, pieces
    from recallseg.runtime.model import device

    patch = pytest.MonkeyPatch()
    cache = os.environ.get("RECALLSEG_CACHE") or tempfile.mkdtemp(prefix="recallseg-stand-in-")
    stand_in(patch, Path(cache))
    for module in (graphs, kernels, pieces, device):
        patch.setattr(module, "open_device", lambda *_: HostGpu.open())
    patch.setattr(latency, "probe", lambda *args, **kwargs: None)
    made = pieces.pieces_of

    def spoilt(plan: Any) -> Any:
        for piece in made(plan):
            if piece.name == os.environ.get("STAND_IN_DIES"):
                object.__setattr__(
                    piece, "measure", lambda step: os.kill(os.getpid(), signal.SIGSEGV)
                )
            if piece.name == os.environ.get("STAND_IN_HANGS"):
                object.__setattr__(piece, "measure", lambda step: time.sleep(600))
                object.__setattr__(piece, "minutes", 0.1)
            yield piece

    patch.setattr(pieces, "pieces_of", spoilt)


if any("benchmarks.gpu" in word or "bench" in word for word in sys.argv + sys.orig_argv):
    install()
