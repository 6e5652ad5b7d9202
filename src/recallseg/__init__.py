"""Recall annotated images and segment new ones: few-shot medical segmentation at the edge.

>>> from recallseg import Bundle, Library, Segmenter

The method is Zhao et al., "Retrieval-augmented Few-shot Medical Image Segmentation with Foundation
Models" (arXiv 2408.08813). Importing this package never imports torch, transformers or TensorRT;
each public name is imported when it is first used, so that ``recallseg --help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recallseg import errors
from recallseg.engines.imports import disable_telemetry

if TYPE_CHECKING:
    from recallseg.engines.bundle import Bundle
    from recallseg.engines.device import open_device
    from recallseg.engines.errors import RecallSegError
    from recallseg.runtime.formats.images import read_image
    from recallseg.runtime.formats.reading import read_volume
    from recallseg.runtime.formats.volume import Volume
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.exemplar import Exemplar, Match
    from recallseg.runtime.library.importing import ImportReport, import_exemplars
    from recallseg.runtime.model.model import GpuOptions, Model
    from recallseg.runtime.model.preprocess import Intensity
    from recallseg.runtime.reports.cases import Evaluation
    from recallseg.runtime.reports.evaluation import evaluate
    from recallseg.runtime.segmenting.corrections import Corrections
    from recallseg.runtime.segmenting.recipe import Provenance, Recipe
    from recallseg.runtime.segmenting.result import Result, Score
    from recallseg.runtime.segmenting.segmenter import Segmenter
    from recallseg.runtime.services.stream import Frame, Stream
    from recallseg.runtime.volumes.corrections import VolumeCorrections
    from recallseg.runtime.volumes.slices import VolumeResult, segment_volume
    from recallseg.runtime.volumes.writing import write_segmentation

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Corrections",
    "Evaluation",
    "Exemplar",
    "Frame",
    "GpuOptions",
    "ImportReport",
    "Intensity",
    "Library",
    "Match",
    "Model",
    "Provenance",
    "RecallSegError",
    "Recipe",
    "Result",
    "Score",
    "Segmenter",
    "Stream",
    "Volume",
    "VolumeCorrections",
    "VolumeResult",
    "__version__",
    "errors",
    "evaluate",
    "import_exemplars",
    "open_device",
    "read_image",
    "read_volume",
    "segment_volume",
    "write_segmentation",
]

_HOMES = {
    "Bundle": "recallseg.engines.bundle",
    "RecallSegError": "recallseg.engines.errors",
    "open_device": "recallseg.engines.device",
    "GpuOptions": "recallseg.runtime.model.model",
    "Model": "recallseg.runtime.model.model",
    "Exemplar": "recallseg.runtime.library.exemplar",
    "ImportReport": "recallseg.runtime.library.importing",
    "Library": "recallseg.runtime.library",
    "Match": "recallseg.runtime.library.exemplar",
    "Corrections": "recallseg.runtime.segmenting.corrections",
    "Provenance": "recallseg.runtime.segmenting.recipe",
    "Recipe": "recallseg.runtime.segmenting.recipe",
    "Result": "recallseg.runtime.segmenting.result",
    "Score": "recallseg.runtime.segmenting.result",
    "Intensity": "recallseg.runtime.model.preprocess",
    "Frame": "recallseg.runtime.services.stream",
    "Segmenter": "recallseg.runtime.segmenting.segmenter",
    "Stream": "recallseg.runtime.services.stream",
    "Volume": "recallseg.runtime.formats.volume",
    "VolumeCorrections": "recallseg.runtime.volumes.corrections",
    "VolumeResult": "recallseg.runtime.volumes.slices",
    "Evaluation": "recallseg.runtime.reports.cases",
    "evaluate": "recallseg.runtime.reports.evaluation",
    "import_exemplars": "recallseg.runtime.library.importing",
    "read_image": "recallseg.runtime.formats.images",
    "read_volume": "recallseg.runtime.formats.reading",
    "segment_volume": "recallseg.runtime.volumes.slices",
    "write_segmentation": "recallseg.runtime.volumes.writing",
}

# Before anything here, or in the program after this line, can import ONNX Runtime.
disable_telemetry()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recallseg' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
