"""nnInteractive's protocol, version 2, so that its clients (napari, 3D Slicer, MITK) work with us.

Sources: ``nninteractive-client`` 2.6 and the server of MIC-DKFZ/nnInteractive. What only a library
makes possible is beside it, under ``/recallseg``: ``target`` names the structure that the calls are
about, ``accept`` makes it an exemplar. ``/predict`` before any prompt proposes the target from the
library.

A click, scribble, box or lasso works on one slice; while *auto-zoom* is on (as clients set it) what
it changed is carried on to the neighbouring slices. A negative box or lasso takes its pixels away.
"""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Optional

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_name
from recallseg.runtime.services.http.cuts import outline_of, scribble_points, union_of
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.drafts import Draft
from recallseg.runtime.services.http.leases import Lease, Leases
from recallseg.runtime.services.http.limits import Budget, Limits, RefusedError
from recallseg.runtime.services.http.messages import (
    Accept,
    AutoZoom,
    BoundingBox,
    ImageMeta,
    Initial,
    Marked,
    Point,
    Predict,
    Structure,
    Target,
    read_meta,
    volume_of,
)
from recallseg.runtime.services.http.packed import pack, unpack
from recallseg.runtime.services.http.prompts import Change, Place, Prompt
from recallseg.runtime.services.http.seats import Seat

__all__ = ["UPLOADS", "protocol"]

UPLOADS = (
    "/set_image",
    "/add_scribble_interaction",
    "/add_lasso_interaction",
    "/add_initial_seg_interaction",
)
VERSION = "2.0"
_DTYPES = ("bool", "uint8", "uint16", "int16", "int32", "float32")
_OCTETS = "application/octet-stream"


def protocol(
    desk: Desk, leases: Leases[Seat], limits: Limits, budget: Budget, target: str | None = None
) -> APIRouter:
    """Return the routes.

    Parameters
    ----------
    target : structure that clients work on that name none; None for the library's first.
    """
    router = APIRouter(tags=["nnInteractive"])
    lease_header = Annotated[Optional[str], Header(alias="X-Lease-Token")]

    def lease_of(request: Request, x_lease_token: lease_header = None) -> Lease[Seat]:
        return leases.get(x_lease_token, request.state.user)

    leased = Annotated[Lease[Seat], Depends(lease_of)]

    async def body_of(request: Request) -> bytes:
        return await request.body()

    body = Annotated[bytes, Depends(body_of)]

    def target_of(seat: Seat) -> str:
        name = seat.target or target or next(iter(desk.structures), None)
        if name is None:
            raise RefusedError(
                409,
                "the library is empty and no structure was named: start the server with --target "
                "NAME, or name one with POST /recallseg/target.",
            )
        return name

    def answered(seat: Seat, name: str, act: Callable[[Draft], Sequence[Change]]) -> Response:
        """Do something, and answer with what it changed of the target's mask."""
        changes = [change for change in act(seat.draft) if change.structure == name]
        return _prediction(seat, name, changes)

    def prompted(seat: Seat, prompts: Sequence[Prompt], run: bool) -> Response:
        draft = seat.draft
        if not run:
            for prompt in prompts:
                draft.prompt(prompt, run=False)
            return _nothing()
        with draft.one_step():
            changes = [change for one in prompts if (change := draft.prompt(one)) is not None]
            if seat.spreads and not draft.is_picture:
                changes += carried(draft, prompts[0].structure)
        return _prediction(seat, prompts[0].structure, changes)

    def carried(draft: Draft, name: str) -> list[Change]:
        """Carry what was corrected on."""
        along = any(place.axis == draft.axis for place in draft.corrected.get(name, ()))
        return [draft.spread(name)] if along else []

    @router.get("/capabilities")
    def capabilities() -> dict[str, Any]:
        """What this server can do, in nnInteractive's terms."""
        can = desk.corrects
        return {
            "supported_interactions": {
                "points": can,
                "bbox2d": can,
                "bbox3d": False,
                "scribble": can,
                "lasso": can,
                "initial_label": True,
            },
            "channel_mapping": {},  # there are no channels of prompts in our networks
            "num_interaction_channels": 0,
            "supports_initial_label": True,
            "supports_zero_shot_label_refinement": can,
            "preferred_scribble_thickness": [2, 2, 2],
            "interaction_decay": None,
            "patch_size": [1, *[desk.library.bundle.geometry.image_size] * 2],
            "do_autozoom": True,
            "inference_session_version": VERSION,
            "license": desk.notice or "see the bundle's manifest",
            "supports_undo": True,
            "recallseg": {"structures": list(desk.structures), "target": target},
        }

    @router.post("/claim")
    def claim(request: Request) -> dict[str, Any]:
        """Open a session."""
        lease = leases.claim(request.state.user)
        return {
            "lease_token": lease.token,
            "idle_timeout_seconds": limits.idle_s,
            "liveness_timeout_seconds": limits.liveness_s,
            "max_sessions": limits.sessions,
        }

    @router.post("/release")
    def release(request: Request, x_lease_token: lease_header = None) -> dict[str, bool]:
        """Close a session; harmless if repeated."""
        leases.release(x_lease_token, request.state.user)
        return {"released": True}

    @router.post("/heartbeat")
    def heartbeat(request: Request, x_lease_token: lease_header = None) -> dict[str, float]:
        """Say that the client is there; that a person does something is another matter."""
        lease = leases.get(x_lease_token, request.state.user, active=False)
        return {"remaining_seconds": leases.remaining_s(lease)}

    @router.get("/lease_status")
    def lease_status(request: Request, x_lease_token: lease_header = None) -> dict[str, float]:
        """Ask how long a session lasts, without prolonging it."""
        lease = leases.peek(x_lease_token, request.state.user)
        return {
            "remaining_seconds": leases.remaining_s(lease),
            "idle_timeout_seconds": limits.idle_s,
        }

    @router.post("/set_image")
    def set_image(request: Request, data: body, lease: leased) -> dict[str, Any]:
        """Open an image: packed, [C, X, Y, Z] with C of 1 or 3."""
        meta = read_meta(request, ImageMeta).image_properties
        with lease.turn() as seat:
            array = unpack(data, limits.image_bytes)
            draft = Draft(volume_of(array, meta), desk, budget)
            seat.open(draft)
            if meta.axis is not None:
                draft.cut_along(meta.axis)
        return {"original_image_shape": list(array.shape)}

    @router.post("/set_target_buffer")
    def set_target_buffer(asked: Target, lease: leased) -> dict[str, Any]:
        """Say shape and dtype of the client's mask; it begins empty."""
        if asked.dtype not in _DTYPES:
            raise InputError(
                f"the mask's dtype is '{asked.dtype:.40}'; expected one of {', '.join(_DTYPES)}."
            )
        with lease.turn() as seat:
            draft = seat.draft
            if tuple(asked.shape) != draft.shape:
                raise InputError(
                    f"the mask's shape is {asked.shape}, the image's {list(draft.shape)}."
                )
            seat.dtype = asked.dtype
            if seat.target or target or desk.structures:
                draft.reset(target_of(seat))
        return {}

    @router.post("/set_do_autozoom")
    def set_do_autozoom(asked: AutoZoom, lease: leased) -> dict[str, Any]:
        """Say whether a prompt is carried on to neighbouring slices at once."""
        with lease.turn() as seat:
            seat.spreads = asked.do_autozoom
        return {}

    @router.post("/reset_interactions")
    def reset_interactions(lease: leased) -> dict[str, Any]:
        """Forget the target's mask and prompts."""
        with lease.turn() as seat:
            if seat.has_draft and (seat.target or target or desk.structures):
                seat.draft.reset(target_of(seat))
        return {}

    @router.post("/undo")
    def undo(lease: leased) -> Response:
        """Take back the last prompt."""
        with lease.turn() as seat:
            change = seat.draft.undo()
            if change is None:
                return _nothing()
            return _prediction(seat, change.structure, [change])

    @router.post("/predict")
    def predict(lease: leased, asked: Optional[Predict] = None) -> Response:
        """Run the prompts that wait; where there never was one, propose from the library."""
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            if draft.waits:
                with draft.one_step():
                    changes = draft.run_waiting()
                    if seat.spreads and not draft.is_picture:
                        changes += carried(draft, name)
                return _prediction(seat, name, changes)
            if not draft.corrected.get(name):
                return answered(seat, name, lambda draft: [_proposed(draft, desk, name)])
            if asked is not None and asked.force_full_refine and not draft.is_picture:
                return answered(seat, name, lambda draft: [draft.spread(name)])
            return _nothing()

    @router.post("/add_point_interaction")
    def add_point(asked: Point, lease: leased) -> Response:
        """Click."""
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            voxel = [_nearest(value) for value in asked.coordinates]
            place = draft.place_of(voxel)
            point = draft.point_of(voxel, place)
            prompt = Prompt("click", name, place, (point,), inside=asked.include_interaction)
            return prompted(seat, [prompt], asked.run_prediction)

    @router.post("/add_bbox_interaction")
    def add_bbox(asked: BoundingBox, lease: leased) -> Response:
        """Draw a box in one slice."""
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            low, high = _corners(asked.bbox_coords)
            place = _plane(draft, low, high)
            draft.place_of(high)  # which must lie inside as well
            ends = [draft.point_of(corner, place) for corner in (low, high)]
            prompt = Prompt("box", name, place, _ordered(ends), inside=asked.include_interaction)
            return prompted(seat, [prompt], asked.run_prediction)

    @router.post("/add_scribble_interaction")
    def add_scribble(request: Request, data: body, lease: leased) -> Response:
        """Draw a line, as the voxels that it covers; over several slices, or in another plane."""
        meta = read_meta(request, Marked)
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            prompts = [
                Prompt(
                    "scribble", name, place, scribble_points(mask), inside=meta.include_interaction
                )
                for place, mask in _marked(draft, unpack(data, limits.image_bytes), meta)
            ]
            return prompted(seat, prompts, meta.run_prediction)

    @router.post("/add_lasso_interaction")
    def add_lasso(request: Request, data: body, lease: leased) -> Response:
        """Draw around something."""
        meta = read_meta(request, Marked)
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            prompts = [
                Prompt("lasso", name, place, outline_of(mask), meta.include_interaction)
                for place, mask in _marked(draft, unpack(data, limits.image_bytes), meta)
            ]
            return prompted(seat, prompts, meta.run_prediction)

    @router.post("/add_initial_seg_interaction")
    def add_initial_seg(request: Request, data: body, lease: leased) -> Response:
        """Begin with a mask; prompts correct it from there."""
        meta = read_meta(request, Initial)
        with lease.turn() as seat:
            draft, name = seat.draft, target_of(seat)
            draft.reset(name)
            draft.replace(name, unpack(data, limits.image_bytes) > 0)
            if not meta.run_prediction:
                return _nothing()
            return answered(seat, name, lambda draft: [draft.refine(name)])

    @router.post("/recallseg/target")
    def set_structure(asked: Structure, lease: leased) -> dict[str, Any]:
        """Name the structure that this session's calls are about; it may be a new one."""
        with lease.turn() as seat:
            seat.target = check_name(asked.structure)
        return {"target": asked.structure, "known": asked.structure in desk.structures}

    @router.post("/recallseg/accept")
    def accept(request: Request, asked: Accept, lease: leased) -> dict[str, Any]:
        """Make an exemplar of the image and the target's mask."""
        with lease.turn() as seat:
            name = asked.structure or target_of(seat)
            keys = desk.accept(
                seat.draft, request.state.user, [name], which=asked.slices, tags=asked.tags
            )
        return {"exemplars": keys, "structure": name, "library": len(desk.library)}

    return router


def _nearest(value: float) -> int:
    return int(np.floor(value + 0.5))


def _corners(ranges: Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """Return the first and the last voxel of half-open ranges."""
    low = [_nearest(min(each)) for each in ranges]
    high = [_nearest(max(each)) - 1 for each in ranges]
    if any(last < first for first, last in zip(low, high, strict=True)):
        raise InputError(f"the box {[list(each) for each in ranges]} has no voxel.")
    return low, high


def _plane(draft: Draft, low: Sequence[int], high: Sequence[int]) -> Place:
    """Return the slice that a flat box lies in: one of the usual axis, if it could be several."""
    thin = [axis for axis in draft.cuts if low[axis] == high[axis]]
    if not thin:
        raise InputError(
            "a box must lie in one slice, so one of its ranges must have one voxel; got "
            f"{[[a, b + 1] for a, b in zip(low, high, strict=True)]}. Draw it in a plane."
        )
    return draft.place_of(low, draft.axis if draft.axis in thin else thin[0])


def _ordered(ends: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    xs, ys = zip(*ends, strict=True)
    return (min(xs), min(ys)), (max(xs), max(ys))


def _marked(
    draft: Draft, mask: NDArray[Any], meta: Marked
) -> list[tuple[Place, NDArray[np.bool_]]]:
    """Return the slices that a mask (of the image, or of a box in it) marks, and where."""
    if mask.ndim == 4 and mask.shape[0] == 1:
        mask = mask[0]
    low = [0, 0, 0]
    if meta.interaction_bbox is not None:
        low, high = _corners(meta.interaction_bbox)
        draft.place_of(low)
        draft.place_of(high)
        wanted: tuple[int, ...] = tuple(b - a + 1 for a, b in zip(low, high, strict=True))
    else:
        wanted = draft.shape
    if mask.shape != wanted:
        raise InputError(
            f"the mask's shape is {list(mask.shape)}; what it belongs to is {list(wanted)}."
        )
    voxels = np.argwhere(mask > 0) + low
    if not len(voxels):
        raise InputError("the mask marks no voxel.")
    flat = [axis for axis in draft.cuts if (voxels[:, axis] == voxels[0, axis]).all()]
    axis = draft.axis if draft.axis in flat or not flat else flat[0]
    found = []
    for index in np.unique(voxels[:, axis]):
        place = Place(axis, int(index))
        on = np.zeros(draft.picture(place).shape[:2], bool)
        for voxel in voxels[voxels[:, axis] == index]:
            x, y = draft.point_of([int(value) for value in voxel], place)
            on[int(y), int(x)] = True
        found.append((place, on))
    return found


def _proposed(draft: Draft, desk: Desk, name: str) -> Change:
    if name not in desk.structures:
        raise RefusedError(
            409,
            f"the library has no exemplar of '{name}' to propose from. Mark it with a prompt, and "
            "accept it.",
        )
    draft.propose()
    return Change(name, draft.extent(name))


def _nothing() -> Response:
    meta = json.dumps({"ran_prediction": False, "bbox": None})
    return Response(b"", media_type=_OCTETS, headers={"X-Meta": meta})


def _prediction(seat: Seat, name: str, changes: Sequence[Change]) -> Response:
    """Answer with the part of the mask that holds all that changed."""
    spans = union_of(change.box for change in changes)
    if spans is None:
        meta = json.dumps({"ran_prediction": True, "bbox": None})
        return Response(b"", media_type=_OCTETS, headers={"X-Meta": meta})
    part = seat.draft.masks[name][tuple(slice(*span) for span in spans)].astype(seat.dtype)
    meta = json.dumps(
        {
            "ran_prediction": True,
            "bbox": [list(span) for span in spans],
            "dtype": str(part.dtype),
            "shape": list(part.shape),
        }
    )
    return Response(pack(part), media_type=_OCTETS, headers={"X-Meta": meta})
