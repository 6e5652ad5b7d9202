"""Our own API: open, propose, correct, accept; what the page of this server speaks too.

A draft's name in its address is its lease: who knows it, and has the token of the same user, has
the draft. Pixels and masks of slices travel as plain bytes, described in ``X-Meta``.
"""

import base64
import binascii
import json
from typing import Annotated, Any, Literal, Optional

import numpy as np
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from recallseg import __version__
from recallseg.engines.errors import InputError
from recallseg.runtime.services.http import export, gallery
from recallseg.runtime.services.http.desk import Desk, Which
from recallseg.runtime.services.http.drafts import Draft
from recallseg.runtime.services.http.leases import Lease, Leases
from recallseg.runtime.services.http.limits import Budget, Limits, RefusedError
from recallseg.runtime.services.http.messages import ImageMeta, read_meta, volume_of
from recallseg.runtime.services.http.packed import unpack
from recallseg.runtime.services.http.prompts import Change, Place, Prompt
from recallseg.runtime.services.http.seats import Seat
from recallseg.runtime.services.http.worklist import Order, Worklist

__all__ = ["UPLOADS", "routes"]

UPLOADS = ("/api/drafts/upload",)
Pixel = Annotated[float, Field(allow_inf_nan=False, ge=-(2**31), le=2**31)]
Text = Annotated[str, Field(max_length=1000)]


class Strict(BaseModel):
    """A body; what it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class Open(Strict):
    """Which image of the worklist."""

    mark: Text


class At(Strict):
    """A slice: its axis, 0 to 2, and its index along it."""

    axis: Annotated[int, Field(ge=0, le=2)] = 0
    index: Annotated[int, Field(ge=0, le=2**31)] = 0


class Correct(At):
    """By a click (one point), a box (two corners), a scribble or a lasso: x, y of pixels."""

    structure: Text
    kind: Literal["click", "box", "scribble", "lasso"]
    points: Annotated[
        list[Annotated[list[Pixel], Field(min_length=2, max_length=2)]],
        Field(min_length=1, max_length=4096),
    ]
    inside: bool = True


class Paint(At):
    """A stroke of the brush, or of the eraser: one bit a pixel, rows padded to whole bytes."""

    structure: Text
    x: Annotated[int, Field(ge=0, le=2**31)]
    y: Annotated[int, Field(ge=0, le=2**31)]
    width: Annotated[int, Field(ge=1, le=65536)]
    height: Annotated[int, Field(ge=1, le=65536)]
    bits: Annotated[str, Field(max_length=1 << 20)]
    value: bool = True


class About(Strict):
    """What something is done to."""

    structure: Text


class Accept(Strict):
    """Whose masks are right, and what was looked for and is not there."""

    structures: Annotated[list[Text], Field(max_length=255)]
    absent: Annotated[list[Text], Field(max_length=255)] = []
    slices: Which = "corrected"
    tags: dict[str, Text] = {}


class Reject(Strict):
    """Why nothing of the proposals is any good; no names of people."""

    reason: Text = ""


def routes(
    desk: Desk,
    leases: Leases[Seat],
    limits: Limits,
    budget: Budget,
    worklist: Worklist | None,
) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/api", tags=["RecallSeg"])

    def lease_of(draft: str, request: Request) -> Lease[Seat]:
        return leases.get(draft, request.state.user)

    leased = Annotated[Lease[Seat], Depends(lease_of)]

    def listed() -> Worklist:
        if worklist is None:
            raise RefusedError(404, "this server has no folder of images: start it with --folder.")
        return worklist

    @router.get("/server")
    def server(request: Request) -> dict[str, Any]:
        """What this is, and what is in its library."""
        return {
            "version": __version__,
            "user": request.state.user,
            "structures": list(desk.structures),
            "exemplars": len(desk.library),
            "corrects": desk.corrects,
            "notice": desk.notice,
            "worklist": worklist is not None,
            "writable": desk.library.writable,
        }

    @router.get("/worklist")
    def work(
        order: Order = "newest", count: Annotated[int, Query(ge=1, le=10000)] = 500
    ) -> dict[str, Any]:
        """Return the images to be annotated; done ones come last."""
        entries = listed().entries(order)
        return {"count": len(entries), "images": [vars(entry) for entry in entries[:count]]}

    @router.get("/next")
    def next_(order: Order = "teaching") -> dict[str, Any]:
        """Return the image to be annotated next, or null."""
        fresh = [one for one in listed().entries(order) if one.state == "new" and not one.trouble]
        return {"image": vars(fresh[0]) if fresh else None}

    @router.post("/drafts", status_code=201)
    def open_(asked: Open, request: Request) -> dict[str, Any]:
        """Open an image of the worklist."""
        volume, name, item = listed().open(asked.mark)
        return opened(Draft(volume, desk, budget, name, item), request)

    @router.post("/drafts/upload", status_code=201)
    async def upload(request: Request) -> dict[str, Any]:
        """Open an image that is sent, packed as nnInteractive's clients do."""
        from anyio.to_thread import run_sync

        meta = read_meta(request, ImageMeta).image_properties
        data = await request.body()
        return await run_sync(
            lambda: opened(
                Draft(volume_of(unpack(data, limits.image_bytes), meta), desk, budget), request
            )
        )

    def opened(draft: Draft, request: Request) -> dict[str, Any]:
        try:
            lease = leases.claim(request.state.user)
        except RefusedError:
            draft.close()
            raise
        lease.held.open(draft)
        return {"draft": lease.token, **described(draft)}

    def described(draft: Draft) -> dict[str, Any]:
        return describe(draft, desk)

    @router.get("/drafts/{draft}")
    def state(lease: leased) -> dict[str, Any]:
        """Return what there is of a draft."""
        with lease.turn() as seat:
            return described(seat.draft)

    @router.post("/drafts/{draft}/heartbeat")
    def heartbeat(draft: str, request: Request) -> dict[str, float]:
        """Say that the client is there."""
        lease = leases.get(draft, request.state.user, active=False)
        return {"remaining_seconds": leases.remaining_s(lease)}

    @router.get("/drafts/{draft}/progress")
    def progress(draft: str, request: Request) -> dict[str, Any]:
        """Return how far a proposal or a spread is: [done, of]; null when none runs."""
        held = leases.get(draft, request.state.user, active=False).held
        return {"progress": held.draft.progress if held.has_draft else None}

    @router.post("/drafts/{draft}/cancel")
    def cancel(draft: str, request: Request) -> dict[str, bool]:
        """End a proposal or a spread that runs."""
        leases.get(draft, request.state.user).held.cancel()
        return {"cancelled": True}

    @router.delete("/drafts/{draft}")
    def close(draft: str, request: Request) -> dict[str, bool]:
        """Close a draft; what was not accepted is gone."""
        leases.release(draft, request.state.user)
        return {"closed": True}

    @router.post("/drafts/{draft}/propose")
    def propose(lease: leased) -> dict[str, Any]:
        """Propose masks of all structures from the library."""
        with lease.turn() as seat:
            proposed = seat.draft.propose()
            return {"proposed": proposed, **described(seat.draft)}

    @router.get("/drafts/{draft}/slices/{axis}/{index}")
    def pixels(axis: int, index: int, lease: leased) -> Response:
        """Return a slice upright, HxW or HxWx3, little-endian."""
        with lease.turn() as seat:
            picture = np.ascontiguousarray(seat.draft.picture(Place(axis, index)))
        if picture.dtype.itemsize == 8 or picture.dtype.kind not in "uif":
            picture = picture.astype(np.float32)
        if picture.dtype == np.float16:
            picture = picture.astype(np.float32)
        ordered = np.ascontiguousarray(picture, picture.dtype.newbyteorder("<"))
        meta = {"shape": list(picture.shape), "dtype": picture.dtype.name}
        return _bytes(ordered.tobytes(), meta)

    @router.get("/drafts/{draft}/masks/{axis}/{index}")
    def masks(axis: int, index: int, lease: leased) -> Response:
        """Return all masks of a slice: for each of X-Meta's structures HxW bits, rows padded."""
        place = Place(axis, index)
        with lease.turn() as seat:
            draft = seat.draft
            found = {name: draft.mask(name, place) for name in draft.masks}
            shape = list(draft.picture(place).shape[:2])
            shown = {name: mask for name, mask in found.items() if mask.any()}
            body = b"".join(np.packbits(mask, axis=1).tobytes() for mask in shown.values())
        return _bytes(body, {"shape": shape, "structures": list(shown)})

    @router.post("/drafts/{draft}/correct")
    def correct(asked: Correct, lease: leased) -> dict[str, Any]:
        """Correct a structure by a prompt on a slice."""
        with lease.turn() as seat:
            points = tuple((x, y) for x, y in asked.points)
            if asked.kind == "box" and len(points) == 2:
                (x0, y0), (x1, y1) = points
                points = (min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))
            place = Place(asked.axis, asked.index)
            change = seat.draft.prompt(
                Prompt(asked.kind, asked.structure, place, points, inside=asked.inside)
            )
            return changed(seat.draft, change)

    @router.post("/drafts/{draft}/paint")
    def paint(asked: Paint, lease: leased) -> dict[str, Any]:
        """Add pixels to a mask, or erase them."""
        row = -(-asked.width // 8)
        try:
            raw = base64.b64decode(asked.bits, validate=True)
        except binascii.Error as error:
            raise InputError(f"the bits of the stroke are no base64: {error}.") from error
        if len(raw) != row * asked.height:
            raise InputError(
                f"a stroke of {asked.width}x{asked.height} pixels takes {row * asked.height} "
                f"bytes, got {len(raw)}."
            )
        packed = np.frombuffer(raw, np.uint8).reshape(asked.height, row)
        patch = np.unpackbits(packed, axis=1, count=asked.width).astype(bool)
        with lease.turn() as seat:
            place = Place(asked.axis, asked.index)
            change = seat.draft.paint(asked.structure, place, patch, asked.x, asked.y, asked.value)
            return changed(seat.draft, change)

    @router.post("/drafts/{draft}/undo")
    def undo(lease: leased) -> dict[str, Any]:
        """Take back the last step."""
        with lease.turn() as seat:
            return changed(seat.draft, seat.draft.undo())

    @router.post("/drafts/{draft}/spread")
    def spread(asked: About, lease: leased) -> dict[str, Any]:
        """Carry a structure's corrected slices on through the volume."""
        with lease.turn() as seat:
            return changed(seat.draft, seat.draft.spread(asked.structure))

    @router.post("/drafts/{draft}/reset")
    def reset(asked: About, lease: leased) -> dict[str, Any]:
        """Forget a structure's mask, and what was done to it."""
        with lease.turn() as seat:
            seat.draft.reset(asked.structure)
            return described(seat.draft)

    def changed(draft: Draft, change: Change | None) -> dict[str, Any]:
        return {
            "structure": None if change is None else change.structure,
            "changed": None if change is None else change.box,
            "can_undo": draft.can_undo,
        }

    @router.post("/drafts/{draft}/accept")
    def accept(asked: Accept, request: Request, lease: leased) -> dict[str, Any]:
        """Make exemplars of it."""
        with lease.turn() as seat:
            keys = desk.accept(
                seat.draft,
                request.state.user,
                asked.structures,
                absent=asked.absent,
                which=asked.slices,
                tags=asked.tags,
            )
        return {"exemplars": keys, "library": len(desk.library)}

    @router.post("/drafts/{draft}/reject")
    def reject(asked: Reject, request: Request, lease: leased) -> dict[str, bool]:
        """Put an image aside: nothing of it goes to the library."""
        with lease.turn() as seat:
            desk.reject(seat.draft, request.state.user, asked.reason)
            if worklist is not None:
                worklist.put_aside(seat.draft.item)
        return {"rejected": True}

    @router.get("/drafts/{draft}/export")
    def export_(lease: leased, kind: Optional[export.Kind] = None) -> Response:
        """Return the masks as a file: png of a picture, nifti or nrrd of a volume."""
        with lease.turn() as seat:
            name, data = export.export(seat.draft, kind)
        disposition = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(data, media_type="application/octet-stream", headers=disposition)

    router.include_router(gallery.routes(desk))
    return router


def describe(draft: Draft, desk: Desk) -> dict[str, Any]:
    """Return a draft as JSON values."""
    names = [*dict.fromkeys([*desk.structures, *draft.masks])]
    return {
        "name": draft.name,
        "shape": list(draft.shape),
        "axis": draft.axis,
        "planes": {
            str(axis): {
                "plane": cut.plane,
                "slices": draft.shape[axis],
                "rows": draft.shape[cut.rows],
                "columns": draft.shape[cut.columns],
                "rows_axis": cut.rows,
                "columns_axis": cut.columns,
                "flip_rows": cut.flip_rows,
                "flip_columns": cut.flip_columns,
                "spacing": list(cut.spacing(draft.volume)) if draft.volume.in_mm else None,
            }
            for axis, cut in draft.cuts.items()
        },
        "window": draft.volume.window,
        "structures": {
            name: {
                "known": name in desk.structures,
                "pixels": int(draft.masks[name].sum()) if name in draft.masks else 0,
                "counts": dict(draft.counts.get(name, {})),
                "corrected": sorted(
                    [place.axis, place.index] for place in draft.corrected.get(name, ())
                ),
            }
            for name in names
        },
        "proposals": {
            str(index): {
                "flag": result.quality.flag,
                "reasons": {name: list(why) for name, why in result.quality.reasons.items()},
                "scores": {name: score.to_json() for name, score in result.scores.items()},
                "recalled": {
                    name: [
                        {"key": one.key, "distance": one.distance, "absent": one.absent}
                        for one in found
                    ]
                    for name, found in result.recalled.items()
                },
            }
            for index, result in draft.proposals.items()
        },
        "can_undo": draft.can_undo,
        "accepted": draft.accepted,
    }


def _bytes(body: bytes, meta: dict[str, Any]) -> Response:
    headers = {"X-Meta": json.dumps(meta)}  # ASCII: names of structures are escaped
    return Response(body, media_type="application/octet-stream", headers=headers)
