"""What nnInteractive's clients send, checked: bodies, X-Meta, images."""

import json
from typing import Annotated, Any, Optional

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.services.http.cuts import stack
from recallseg.runtime.services.http.desk import Which

__all__ = [
    "Accept",
    "AutoZoom",
    "BoundingBox",
    "ImageMeta",
    "Initial",
    "Marked",
    "Point",
    "Predict",
    "Properties",
    "Structure",
    "Target",
    "read_meta",
    "volume_of",
]

Number = Annotated[float, Field(allow_inf_nan=False, ge=-(2**31), le=2**31)]
Range = Annotated[list[Number], Field(min_length=2, max_length=2)]
Ranges = Annotated[list[Range], Field(min_length=3, max_length=3)]


class Strict(BaseModel):
    """A body or X-Meta; what else clients send in it is for nnInteractive's networks only."""

    model_config = ConfigDict(extra="ignore")


class Target(Strict):
    """``/set_target_buffer``."""

    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(max_length=4)]
    dtype: str


class AutoZoom(Strict):
    """``/set_do_autozoom``."""

    do_autozoom: bool


class Point(Strict):
    """``/add_point_interaction``."""

    coordinates: Annotated[list[Number], Field(min_length=3, max_length=3)]
    include_interaction: bool
    run_prediction: bool = True


class BoundingBox(Strict):
    """``/add_bbox_interaction``: half-open ranges, of which one has one voxel."""

    bbox_coords: Ranges
    include_interaction: bool
    run_prediction: bool = True


class Marked(Strict):
    """X-Meta of a scribble or lasso; without a box the mask is of the whole image."""

    include_interaction: bool
    run_prediction: bool = True
    interaction_bbox: Optional[Ranges] = None


class Initial(Strict):
    """X-Meta of ``/add_initial_seg_interaction``."""

    run_prediction: bool = False


class Predict(Strict):
    """``/predict``; ``force_full_refine`` spreads what was corrected through the volume."""

    force_full_refine: bool = False


class Properties(Strict):
    """Of an image: mm along its axes; ``axis`` is ours: along which it is cut."""

    spacing: Optional[Annotated[list[Number], Field(min_length=3, max_length=3)]] = None
    axis: Optional[Annotated[int, Field(ge=0, le=2)]] = None


class ImageMeta(Strict):
    """X-Meta of ``/set_image``."""

    image_properties: Properties = Properties()


class Structure(Strict):
    """``/recallseg/target``."""

    structure: str


class Accept(Strict):
    """``/recallseg/accept``."""

    structure: Optional[str] = None
    tags: dict[str, str] = {}
    slices: Which = "corrected"


def read_meta(request: Request, kind: type[Any]) -> Any:
    """Return X-Meta; raises InputError or pydantic's ValidationError."""
    text = request.headers.get("x-meta", "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        raise InputError(f"the header X-Meta is no JSON: {error}.") from error
    return kind.model_validate(found)


def volume_of(array: NDArray[Any], meta: Properties) -> Volume:
    """Return a client's image [C, X, Y, Z] as a volume; raises InputError for what is none."""
    if array.ndim != 4 or array.shape[0] not in (1, 3) or not array.size:
        raise InputError(
            f"an image must be [C, X, Y, Z] with C of 1 (grey) or 3 (RGB), got shape "
            f"{list(array.shape)}."
        )
    if array.dtype == bool:
        array = array.view(np.uint8)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("the image has NaN or infinite voxels. Replace them.")
    moved = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if array.shape[0] == 3 else array[0]
    spacing = meta.spacing
    if spacing is not None and not all(value > 0 for value in spacing):
        raise InputError(f"the image's spacing must be above 0, got {spacing}.")
    return stack(moved, spacing)
