"""The images of a folder that wait to be annotated: the newest first, or what would teach most.

Clients name an image by a mark of it and never by a path, so that none leads out of the folder.
What was done with an image outlasts the server: the library's history says of which images its
exemplars are, and the audit log which were rejected. Both know an image by a digest of its file's
name, size and time of change, so that what was changed is new.
What would teach most is what brings the most of the images that are left nearest to something
annotated, see :mod:`recallseg.runtime.segmenting.choosing`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, RecallSegError
from recallseg.engines.machine_fault import SHORT_OF_MEMORY, machine_fault
from recallseg.runtime.formats.finding import Headers, Item, find_in_folder
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.choosing import rank
from recallseg.runtime.services.audit import AuditLog, Bookmark
from recallseg.runtime.services.decoding import DecodingLimits, IsolatedDecoder
from recallseg.runtime.services.http.cuts import stack
from recallseg.runtime.services.http.limits import RefusedError
from recallseg.runtime.services.patience import MOST_TIMES, Patience

__all__ = ["ITEM", "Entry", "Order", "Worklist"]

Order = Literal["newest", "teaching"]
State = Literal["new", "accepted", "rejected"]
LOOK_S = 2.0
"""Between two looks at the folder."""
ITEM = "item"
"""Names an image, by a digest of its file, in the history of libraries and in audit logs."""
MOST_RANKED = 50
"""Images that are ordered by what they would teach; the rest follow as they come."""


@dataclass(frozen=True)
class Entry:
    """One image of the list.

    Attributes
    ----------
    mark : names it, as long as the server runs.
    name : for people.
    kind : its format.
    state : what was done with it.
    teaches : share (0..1) of the way to the nearest exemplar, over all images, that annotating it
        would spare; None where that has not been found out, or others come first.
    trouble : why it cannot be opened.
    """

    mark: str
    name: str
    kind: str
    state: State
    teaches: float | None
    trouble: str


class Worklist:
    """Looks at a folder; reads images in a process of its own; orders them in a thread of its own.

    Parameters
    ----------
    folder : whose images are served, and those of the folders below. Links are not followed.
    library : whose exemplars are known already.
    audit : says which images were rejected. None: no others than :meth:`put_aside` is told of.
    """

    def __init__(
        self,
        folder: Path,
        library: Library,
        audit: AuditLog | None = None,
        limits: DecodingLimits | None = None,
    ) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder.")
        self._folder, self._library = folder, library
        self._decoder = IsolatedDecoder(limits)
        self._reading = Lock()
        self._secret = secrets.token_bytes(32)
        self._headers: Headers = {}
        self._items: dict[str, Item] = {}
        self._looked = -LOOK_S
        self._looking = Lock()
        self._trace, self._audit = library.trace(ITEM), audit
        self._rejected: set[str] = set()
        self._noted, self._noting = Bookmark(), Lock()
        self._note()
        self._embeddings: dict[tuple[str, Any], NDArray[np.float32]] = {}
        self._troubles: dict[tuple[str, Any], str] = {}
        self._patience = Patience()
        self._stop = Event()
        self._decoder.stop = self._stop.is_set
        self._thread = Thread(target=self._embed_all, name="worklist", daemon=True)

    def start(self) -> None:
        """Begin to find out what would teach most."""
        self._thread.start()

    def close(self) -> None:
        """End what runs."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._decoder.close()

    def entries(self, order: Order) -> list[Entry]:
        """Return all images; those that are done come last."""
        items = self._look()
        self._note()
        teaches: Mapping[str, float] = {}
        if order == "newest":
            marks = sorted(items, key=lambda mark: items[mark].signature[2], reverse=True)
        else:
            teaches = self._ranked(items)
            rest = [mark for mark in items if mark not in teaches]
            marks = [*teaches, *rest]
        states = {mark: self._state(item) for mark, item in items.items()}
        marks.sort(key=lambda mark: states[mark] != "new")
        return [
            Entry(
                mark,
                items[mark].name,
                items[mark].kind,
                states[mark],
                teaches.get(mark),
                items[mark].trouble or self._troubles.get(self._version(mark, items[mark]), ""),
            )
            for mark in marks
        ]

    def open(self, mark: str) -> tuple[Volume, str, str]:
        """Read an image; return it, its name, and what the history and the log know it by.

        Raises
        ------
        RefusedError
            404 for a mark that is none of the list.
        InputError
            For an image that cannot be read.
        """
        item = self._look().get(mark)
        if item is None:
            raise RefusedError(404, "there is no such image in the list (any more).")
        return self._read(item), item.name, _identity(item)

    def put_aside(self, item: str) -> None:
        """Note that an image was rejected; of one that is none of the list nothing is noted."""
        if item:
            self._rejected.add(item)

    def _look(self) -> dict[str, Item]:
        with self._looking:
            if monotonic() - self._looked >= LOOK_S:
                found = find_in_folder(self._folder, links=False, headers=self._headers)
                self._items = {self._mark(item): item for item in found.items}
                self._looked = monotonic()
            return self._items

    def _note(self) -> None:
        """Read what was done since the last look, here or by others."""
        with self._noting:
            self._accepted = self._trace.look()
            if self._audit is not None:
                entries = self._audit.entries("reject", self._noted)
                self._rejected.update(str(entry[ITEM]) for entry in entries if entry.get(ITEM))

    def _state(self, item: Item) -> State:
        """Return what was done: accepted is what an exemplar in use is of, whatever was before."""
        identity = _identity(item)
        if identity in self._accepted:
            return "accepted"
        return "rejected" if identity in self._rejected else "new"

    def _mark(self, item: Item) -> str:
        name = f"{item.relative}\0{item.suffix}".encode("utf-8", "surrogateescape")
        return hmac.new(self._secret, name, hashlib.sha256).hexdigest()[:24]

    @staticmethod
    def _version(mark: str, item: Item) -> tuple[str, Any]:
        return mark, item.signature

    def _read(self, item: Item) -> Volume:
        with self._reading:
            image = self._decoder.read(item)
        if image is None:
            raise RefusedError(503, "the server is being stopped.")
        return image if isinstance(image, Volume) else stack(image[None])

    def _embed_all(self) -> None:
        while not self._stop.is_set():
            try:
                items = self._look()
            except (RecallSegError, OSError):  # the folder is away: a share, say, that comes back
                self._stop.wait(LOOK_S)
                continue
            there = {self._version(mark, item) for mark, item in items.items()}
            for gone in self._embeddings.keys() - there:
                del self._embeddings[gone]
            for mark, item in items.items():
                version = self._version(mark, item)
                if version in self._embeddings or self._waits(mark, item):
                    continue
                try:
                    self._embeddings[version] = self._library.embed(_middle(self._read(item)))
                    self._troubles.pop(version, None)
                    self._patience.forget(mark)
                except (RecallSegError, MemoryError, OSError) as error:
                    why = str(error) or "it needs more memory than there is"
                    self._troubles[version] = why
                    if fault := machine_fault(error):
                        self._patience.put_off(mark, item.signature, why, fault)
                if self._stop.is_set():
                    return
            self._stop.wait(LOOK_S)

    def _waits(self, mark: str, item: Item) -> bool:
        """Whether an image that could not be read is not asked for again, or not yet."""
        if self._version(mark, item) not in self._troubles:
            return False
        tried = self._patience.of(mark, item.signature)
        if tried is None:
            return True
        return tried.waits or (tried.fault == SHORT_OF_MEMORY and tried.times >= MOST_TIMES)

    def _ranked(self, items: Mapping[str, Item]) -> dict[str, float]:
        """Return the distances of those that are embedded, in their order."""
        marks, vectors = [], []
        for mark, item in items.items():
            vector = self._embeddings.get(self._version(mark, item))
            if vector is not None and self._state(item) == "new":
                marks.append(mark)
                vectors.append(vector)
        if not marks:
            return {}
        held = [self._library.embeddings(name)[1] for name in self._library.structures]
        known = np.concatenate(held) if held else None
        unknown = np.full(len(marks), np.nan)
        chosen = rank(np.stack(vectors), known, unknown, MOST_RANKED, "coverage")
        return {marks[i]: gain for i, _, gain in chosen}


def _identity(item: Item) -> str:
    """Return what stands for an image's file as it is now; it leads to no name."""
    name = f"{item.relative}\0{item.suffix}\0{item.signature}"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _middle(volume: Volume) -> NDArray[Any]:
    """Return the slice in the middle, upright."""
    cut = Slicing.of(volume)
    return np.ascontiguousarray(cut.view(volume.array, cut.count(volume) // 2))
