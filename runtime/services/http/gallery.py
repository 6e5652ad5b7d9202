"""The library for a person's eyes: each exemplar with its masks, and which are doubtful.

An annotation is doubtful where the rest of the library, asked for the same image, sees something
else: the lower their Dice, the more it is worth a look.
"""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.model.preprocess import Intensity, scale_intensities
from recallseg.runtime.reports.pictures import colour
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.limits import RefusedError

__all__ = ["doubts", "picture", "routes"]

SIDE = 256
"""Pixels of the longer side of an exemplar's picture."""
MOST = 200


class Tags(BaseModel):
    """New tags of an exemplar, instead of those that it has."""

    model_config = ConfigDict(extra="forbid")
    tags: dict[str, Annotated[str, Field(max_length=1000)]]


def routes(desk: Desk) -> APIRouter:
    """Return the routes, below ``/library`` and ``/history``."""
    router = APIRouter()

    def known(key: str) -> Exemplar:
        try:
            return desk.library.get(key)
        except InputError as error:
            raise RefusedError(404, str(error)) from error

    @router.get("/library")
    def exemplars(
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
        count: Annotated[int, Query(ge=1, le=MOST)] = 60,
        retired: bool = False,
    ) -> dict[str, Any]:
        """Return exemplars, the newest first."""
        held = [*desk.library.retired] if retired else [*desk.library]
        held.reverse()
        return {
            "count": len(held),
            "structures": list(desk.library.structures),
            "exemplars": [_described(one) for one in held[offset : offset + count]],
        }

    @router.get("/library/doubtful")
    def doubtful(count: Annotated[int, Query(ge=1, le=MOST)] = 60) -> dict[str, Any]:
        """Segment exemplars from all others, the newest first; return them, most doubtful first."""
        return {"doubtful": doubts(desk, count)}

    @router.get("/library/{key:path}/picture")
    def shown(key: str) -> Response:
        """Return a picture of an exemplar with its masks' outlines (PNG)."""
        known(key)
        image, masks = desk.library.source(key)
        data = picture(image, masks, desk.library.intensity, list(desk.library.structures))
        return Response(data, media_type="image/png")

    @router.patch("/library/{key:path}")
    def retag(key: str, asked: Tags, request: Request) -> dict[str, Any]:
        """Give an exemplar other tags."""
        known(key)
        desk.retag(key, asked.tags, request.state.user)
        return _described(desk.library.get(key))

    @router.post("/library/{key:path}/retire")
    def retire(key: str, request: Request) -> dict[str, bool]:
        """Take an exemplar out of use; it can be taken back."""
        known(key)
        desk.retire(key, request.state.user)
        return {"retired": True}

    @router.post("/library/{key:path}/reinstate")
    def reinstate(key: str, request: Request) -> dict[str, bool]:
        """Take a retired exemplar into use again."""
        known(key)
        desk.reinstate(key, request.state.user)
        return {"retired": False}

    @router.delete("/library/{key:path}")
    def remove(key: str, request: Request) -> dict[str, bool]:
        """Remove an exemplar for good."""
        known(key)
        desk.remove(key, request.state.user)
        return {"removed": True}

    @router.get("/history")
    def history(count: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """Return what changed the library, the newest first."""
        changes = desk.library.history()
        return {"count": len(changes), "changes": [c.to_json() for c in changes[::-1][:count]]}

    return router


def doubts(desk: Desk, count: int = MOST) -> list[dict[str, Any]]:
    """Return the newest exemplars with how well the others agree, the least first.

    Costs a query for each. ``dice`` is None where no other exemplar shows the structure.

    Raises
    ------
    RefusedError
        If the library did not keep its images.
    """
    library, segmenter = desk.library, desk.segmenter()
    if not library.keeps_sources:
        raise RefusedError(409, "the library did not keep its images, so none can be asked again.")
    if segmenter is None:
        return []
    found = []
    for exemplar in [*library][::-1][:count]:
        image, masks = library.source(exemplar.key)
        result = segmenter.segment(image, without=(exemplar.key,))
        for name in exemplar.structures:
            if name not in result.masks:
                continue
            agreed = mask_dice(result.masks[name], masks[name]) if result.available[name] else None
            found.append({"key": exemplar.key, "structure": name, "dice": agreed})
    return sorted(found, key=lambda one: (one["dice"] is None, one["dice"] or 0.0))


def picture(
    image: NDArray[Any],
    masks: dict[str, NDArray[np.bool_]],
    intensity: Intensity,
    structures: list[str],
) -> bytes:
    """Return a PNG of an image HxW(x3), at most 256 pixels long, with outlines of its masks."""
    import cv2

    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = [max(1, round(extent * scale)) for extent in image.shape[1::-1]]
    grey = (scale_intensities(image, intensity) * 255).round().astype(np.uint8)
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    shown = cv2.cvtColor(small, cv2.COLOR_GRAY2RGB) if small.ndim == 2 else small.copy()
    for name, mask in masks.items():
        value = colour(structures.index(name) if name in structures else len(structures))
        rgb = [int(value[i : i + 2], 16) for i in (1, 3, 5)]
        lowered = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(lowered, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outlines, -1, rgb, 1)
    done, data = cv2.imencode(".png", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
    assert done  # of uint8 HxWx3 it always is
    return bytes(data)


def _described(exemplar: Exemplar) -> dict[str, Any]:
    return {
        "key": exemplar.key,
        "structures": list(exemplar.structures),
        "absent": list(exemplar.absent),
        "tags": dict(exemplar.tags),
        "size": [exemplar.height, exemplar.width],
        "created": exemplar.created,
        "has_picture": exemplar.has_source,
    }
