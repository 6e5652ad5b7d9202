"""A segmenter whose every result is an entry of an audit log before anybody has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import on_gpu
from recallseg.engines.errors import AuditError
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog

__all__ = ["AuditedSegmenter", "on_host"]


class AuditedSegmenter(Segmenter):
    """See :class:`recallseg.Segmenter`; streams that are made with it are audited as well.

    Parameters
    ----------
    audit : open log.
    """

    def __init__(self, *settings: Any, audit: AuditLog, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.audit = audit

    def segment(self, image: Any, **settings: Any) -> Result:
        """Segment an image and record it, see :meth:`recallseg.Segmenter.segment`.

        What lies on a GPU is copied from it for the digests.

        Raises
        ------
        AuditError
            If the entry cannot be written; ``out`` is 0 then, because what is not in the log must
            not be used.
        """
        image = open_image(image)
        result = super().segment(image, **settings)
        here = on_host(self, result)
        try:
            pixels = self.model.fetch(image) if on_gpu(image) else image
            self.audit.record(pixels, here.label_map, here.to_audit())
        except AuditError:
            self.model.blank([result.label_map, *result.masks.values()])
            raise
        return result


def on_host(segmenter: Segmenter, result: Result) -> Result:
    """Return a result whose arrays can be read here: copies of those that lie on a GPU."""

    def fetched(array: Any) -> NDArray[Any]:
        return segmenter.model.fetch(array) if on_gpu(array) else array

    masks: dict[str, NDArray[np.bool_]] = {n: fetched(mask) for n, mask in result.masks.items()}
    return replace(result, masks=FrozenMap(masks), label_map=fetched(result.label_map))
