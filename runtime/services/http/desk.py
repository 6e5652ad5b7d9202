"""What all clients of a server share: the library, the model, the audit log; and who may change it.

Nothing is written to the library but by :meth:`Desk.accept`, and by what a person does in the
gallery. Each is in the audit log before it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256
from threading import RLock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import RecallSegError
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.volume import SPACING_TAG
from recallseg.runtime.library import Library
from recallseg.runtime.library.changing import Addition
from recallseg.runtime.library.identifying import random_key
from recallseg.runtime.library.importing import patient_group
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.corrections import Corrections
from recallseg.runtime.segmenting.current import Current
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.drafts import Draft
from recallseg.runtime.services.http.limits import RefusedError
from recallseg.runtime.services.http.prompts import CANNOT, Correcting, Place
from recallseg.runtime.services.http.worklist import ITEM
from recallseg.runtime.volumes.spreading import Spreading

__all__ = ["Desk"]

Which = Literal["corrected", "all"]


class Desk:
    """A library that is open for writing, and what proposes from it.

    Parameters
    ----------
    library : open for writing, if anything shall be accepted.
    audit : where every change is recorded.
    segmenter : makes one of the library; takes what :class:`Segmenter` does.
    """

    def __init__(
        self,
        library: Library,
        audit: AuditLog,
        segmenter: Callable[..., Segmenter] = Segmenter,
    ) -> None:
        self._library, self.audit = library, audit
        self._current = Current(library, lambda: segmenter(library))
        self._changing = RLock()

    @property
    def library(self) -> Library:
        """The library; raises RefusedError (503) once it is no longer the one that is in use."""
        if self._library.replaced:
            raise RefusedError(
                503,
                f"another library, or none, is found where {self._library.path} was opened: "
                "nothing is asked of the former and nothing goes into it. Restart the server.",
            )
        return self._library

    @property
    def structures(self) -> tuple[str, ...]:
        """Those that the library has exemplars of."""
        return self.library.structures

    @property
    def corrects(self) -> bool:
        """Whether the bundle can correct by prompts."""
        return "correct" in self.library.bundle.specs

    @property
    def notice(self) -> str:
        """What must be said of the weights."""
        return self.library.bundle.notice

    def segmenter(self) -> Segmenter | None:
        """Return what segments all structures that there are now; None while there are none."""
        return self._current.get() if self.library.structures else None

    def propose(self, image: NDArray[Any], acquisition: Acquisition | None = None) -> Result | None:
        """Segment a slice HxW(x3) from the library; None while that is empty."""
        segmenter, own = self.segmenter(), np.ascontiguousarray(image)
        return None if segmenter is None else segmenter.segment(own, acquisition=acquisition)

    def correct(self, image: NDArray[Any], acquisition: Acquisition | None = None) -> Correcting:
        """Begin to correct a slice HxW(x3)."""
        if not self.corrects:
            raise RefusedError(409, CANNOT)
        segmenter, own = self.segmenter(), np.ascontiguousarray(image)
        if segmenter is None:
            return Corrections(self.library, own, acquisition=acquisition)
        return segmenter.correct(own, acquisition=acquisition)

    def spread(
        self,
        structure: str,
        picture: Callable[[int], NDArray[Any]],
        count: int,
        right: Mapping[int, NDArray[np.bool_]],
    ) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield masks of the other slices of a volume by their index, see :class:`Spreading`.

        Parameters
        ----------
        picture : returns a slice HxW(x3) by its index, of ``count``.
        right : masks by index that stay as they are; one without a pixel says that it is absent.
        """
        spreading = Spreading(self.library, [structure], picture, segmenter=self.segmenter())
        for index, mask in right.items():
            spreading.know(index, {structure: mask})
        for index, found in spreading.run(count):
            yield index, np.zeros((), bool) if found is None else found.masks[0]

    # Changes

    def accept(
        self,
        draft: Draft,
        who: str,
        structures: Collection[str],
        *,
        absent: Collection[str] = (),
        which: Which = "corrected",
        tags: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Make exemplars of a draft's slices, all or none; return their keys.

        Parameters
        ----------
        who : accepts it.
        structures : whose masks are right: a slice without a pixel says that it is absent there.
        absent : that a person looked for and did not find.
        which : ``corrected``: the slices that a person worked on, or, if on none, those that show
            one of the structures; ``all``: every slice.
        tags : of the exemplars, beside what is known of the image.

        Raises
        ------
        RefusedError
            If nothing is left to be accepted.
        AuditError
            If it cannot be recorded; the library is as it was.
        """
        names = [check_name(name) for name in dict.fromkeys([*structures, *absent])]
        if not names:
            raise RefusedError(400, "nothing was accepted: name at least one structure.")
        given, group = self._tags(draft, tags), self._group(draft)
        items = []
        for place in self._places(draft, names, which):
            masks = {
                name: mask
                for name in names
                if name not in absent and (mask := draft.mask(name, place)).any()
            }
            items.append(
                Addition(
                    image=np.ascontiguousarray(draft.picture(place)),
                    masks={name: np.ascontiguousarray(mask) for name, mask in masks.items()},
                    absent=tuple(name for name in names if name not in masks),
                    tags=given(place),
                    key=random_key(),
                    group=group,
                )
            )
        if not any(item["masks"] for item in items):
            raise RefusedError(
                409,
                f"there is no pixel of {', '.join(names)} in what would be accepted. Draw it, or "
                "accept it together with a structure that is there.",
            )
        keys = [str(item["key"]) for item in items]
        of = {ITEM: draft.item} if draft.item else {}
        entry = {
            "who": who,
            "exemplars": keys,
            "structures": names,
            "shape": list(draft.shape),
            "corrections": {name: dict(draft.counts.get(name, {})) for name in names},
            "proposal": draft.proposal_record(names),
            **of,
        }
        with self._changing:
            retired = {one.key for one in self.library.retired}
            former = [k for k in draft.accepted if k in self.library and k not in retired]
            if former:
                entry["instead_of"] = former
            self._record("accept", entry)
            self._do("accept", entry, lambda: self.library.add_many(items, details=of))
            draft.accepted = [*former, *keys]  # all of which the next accept stands in for
            if former:  # which the next revert can bring back
                self._do(
                    "retire",
                    {"who": who, "exemplars": former},
                    lambda: self.library.retire(former),
                )
            draft.accepted = keys
        return keys

    def reject(self, draft: Draft, who: str, reason: str) -> None:
        """Record that a person found a draft's proposals no good; the library stays as it is."""
        self._record(
            "reject",
            {
                "who": who,
                "reason": reason,
                "shape": list(draft.shape),
                "proposal": draft.proposal_record(list(draft.masks)),
                **({ITEM: draft.item} if draft.item else {}),
            },
        )

    def retag(self, key: str, tags: Mapping[str, str], who: str) -> None:
        """Give an exemplar other tags."""
        self._change("retag", key, who, lambda: self.library.retag(key, tags))

    def retire(self, key: str, who: str) -> None:
        """Take an exemplar out of use; it stays in the library."""
        self._change("retire", key, who, lambda: self.library.retire(key))

    def reinstate(self, key: str, who: str) -> None:
        """Take a retired exemplar into use again."""
        self._change("reinstate", key, who, lambda: self.library.reinstate(key))

    def remove(self, key: str, who: str) -> None:
        """Remove an exemplar for good."""
        self._change("remove", key, who, lambda: self.library.remove(key))

    def _change(self, event: str, key: str, who: str, change: Callable[[], object]) -> None:
        with self._changing:
            self.library.get(key)
            entry = {"who": who, "exemplars": [key]}
            self._record(event, entry)
            self._do(event, entry, change)

    def _record(self, event: str, fields: Mapping[str, Any]) -> None:
        self.audit.note(event, {**fields, "library_digest": self.library.digest})

    def _do(self, event: str, entry: Mapping[str, Any], change: Callable[[], object]) -> None:
        """Make a change that was recorded; that it failed is recorded too."""
        try:
            change()
        except (RecallSegError, MemoryError) as error:
            self.audit.note(
                f"{event}-failed",
                {
                    "who": entry["who"],
                    "exemplars": entry["exemplars"],
                    "error": type(error).__name__,
                },
            )
            raise

    @staticmethod
    def _places(draft: Draft, names: Collection[str], which: Which) -> list[Place]:
        if which == "all":
            return [Place(draft.axis, index) for index in range(draft.shape[draft.axis])]
        worked = {place for name in names for place in draft.corrected.get(name, ())}
        if worked:
            return sorted(worked, key=lambda place: (place.axis, place.index))
        across = tuple(axis for axis in range(3) if axis != draft.axis)
        shown = np.zeros(draft.shape[draft.axis], bool)
        for name in names:
            if name in draft.masks:
                shown |= draft.masks[name].any(across)
        return [Place(draft.axis, int(index)) for index in np.flatnonzero(shown)]

    @staticmethod
    def _group(draft: Draft) -> str | None:
        """Return what its slices have in common; of a picture that is no more than a patient."""
        group = patient_group(draft.volume)
        if group is not None or draft.is_picture:
            return group
        return f"volume {sha256(np.ascontiguousarray(draft.volume.array).data).hexdigest()}"

    @staticmethod
    def _tags(draft: Draft, tags: Mapping[str, str] | None) -> Callable[[Place], Mapping[str, str]]:
        volume = draft.volume

        def given(place: Place) -> Mapping[str, str]:
            scale = {}
            if volume.in_mm:
                rows, columns = draft.cuts[place.axis].spacing(volume)
                scale = {SPACING_TAG: f"{rows:.6g}x{columns:.6g}"}
            return {**volume.tags, **scale, **(tags or {})}

        return given
