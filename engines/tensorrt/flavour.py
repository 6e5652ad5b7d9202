"""The two TensorRTs, and every way in which they differ.

=====================  ==============================  =======================================
..                     ``tensorrt``                    ``tensorrt-rtx``
=====================  ==============================  =======================================
Runs on                Jetson, workstation, server     RTX GPUs: 7.5, 8.6, 8.9, 12.x
Builds on              a machine with the GPU          any machine
Plan is for            this GPU; or a family, if       every compute capability listed when it
                       hardware compatibility was      was built
                       asked for
Networks               strongly typed by a flag up     strongly typed
                       to 10.x, always from 11 on
Kernels                in the plan                     compiled when first used, and kept in a
                                                       runtime cache that we persist
Fused by               pattern (10.3: JetPack 6);      pattern or ``Attention``
                       ``Attention`` from 10.14 on
=====================  ==============================  =======================================

Precision lives in the graph in both: nothing is cast by a builder flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.imports import import_needed

__all__ = ["FLAVOURS", "Flavour", "flavour_named"]

OLDEST = (10, 3)
"""TensorRT of JetPack 6.2; older ones have no strongly typed bfloat16."""


@dataclass(frozen=True)
class Flavour:
    """One of the two, by the engine's public name.

    Attributes
    ----------
    name : the engine's name.
    modules : Python modules to import in turn; the last one is the API. NVIDIA's wheels of
        TensorRT-RTX keep the shared libraries in a module that has to be imported first.
    install : how to get it.
    """

    name: str
    modules: tuple[str, ...]
    install: str

    @property
    def is_rtx(self) -> bool:
        """Whether kernels are compiled on the target and targets are listed at build time."""
        return self.name == "tensorrt-rtx"

    def load(self) -> Any:
        """Import and return the API.

        Raises
        ------
        EngineUnavailableError
            If it is not installed, cannot be loaded, or is too old.
        """
        wanted_by = f"engine '{self.name}'"
        api = [import_needed(module, wanted_by, self.install) for module in self.modules][-1]
        if not self.is_rtx and version_of(api) < OLDEST:
            raise EngineUnavailableError(
                f"engine '{self.name}' needs TensorRT {OLDEST[0]}.{OLDEST[1]} or newer, this is "
                f"{api.__version__}. {self.install}."
            )
        return api

    def network_flags(self, api: Any) -> int:
        """Return the flags of a strongly typed network.

        From 11 on (and in TensorRT-RTX) there are no others and the flag may be gone; before, a
        network without it would let the builder choose the precision.
        """
        if self.is_rtx or version_of(api)[0] >= 11:
            return 0
        return 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def version_of(api: Any) -> tuple[int, int]:
    """Return major and minor version of the API."""
    major, minor = str(api.__version__).split(".")[:2]
    return int(major), int(minor)


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            "tensorrt",
            ("tensorrt",),
            "on a Jetson it comes with JetPack (apt install python3-libnvinfer); elsewhere "
            "pip install 'recallseg[tensorrt]'",
        ),
        Flavour(
            "tensorrt-rtx",
            ("tensorrt_rtx_libs", "tensorrt_rtx_bindings"),
            "pip install 'recallseg[tensorrt-rtx]'",
        ),
    )
}
"""By engine name."""


def flavour_named(name: str) -> Flavour:
    """Return a flavour by engine name; InputError if plans are not built for that engine."""
    if name not in FLAVOURS:
        raise InputError(
            f"plans are built for the engines {', '.join(FLAVOURS)}, not for '{name}'."
        )
    return FLAVOURS[name]
