"""Annotated images are added several in one commit, and each is accounted for by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library.changing import Addition
from recallseg.runtime.library.identifying import random_key
from recallseg.runtime.library.sources import content_digest

if TYPE_CHECKING:
    from recallseg.runtime.library import Library

__all__ = ["Batches"]

LEAST_BATCH, MOST_BATCH = 4, 64
BATCH_S = 5.0
"""What one commit should take: an interruption costs no more, and a bar moves so often."""
BATCH_BYTES = 256 * 2**20
"""Of images and masks that wait for it, decoded."""


class Batches:
    """Adds what it is given, as many in one commit as take a few seconds.

    Parameters
    ----------
    key, origin, strict, progress : see
        :func:`recallseg.runtime.library.importing.import_annotated`.
    told : what else each is added with.

    Attributes
    ----------
    added, skipped, failed, notes : see :class:`recallseg.runtime.library.importing.ImportReport`.
    """

    def __init__(
        self,
        library: Library,
        key: str | None,
        origin: str,
        told: Mapping[str, Any],
        strict: bool,
        progress: Callable[[str], None],
    ) -> None:
        self._library, self._key, self._origin = library, key, origin
        self._told, self._strict, self._progress = told, strict, progress
        self._known = {exemplar.content for exemplar in library}
        self._retired = {exemplar.content: exemplar.key for exemplar in library.retired}
        self._keys = set[str]()  # of those that wait
        self._waiting: dict[str, tuple[str, Addition]] = {}  # name and item by content
        self._bytes, self._most = 0, LEAST_BATCH
        self.added: dict[str, str] = {}
        self.skipped: list[str] = []
        self.failed: dict[str, str] = {}
        self.notes: dict[str, tuple[str, ...]] = {}

    def take(self, name: str, read: Callable[[], Annotated]) -> None:
        """Read an image, and add it, or soon."""
        try:
            annotated = read()
            content = content_digest(annotated.image, annotated.masks, annotated.absent)
        except InputError as error:
            self.flush()  # what is before it comes before it
            self._fail(name, error)
            return
        if content in self._waiting:
            self.flush()
        if content in self._known or content in self._retired:
            self.flush()
            self.skipped.append(name)
            if content not in self._known:
                self.notes[name] = (
                    f"it is exemplar '{self._retired[content]}', which is retired and stays so. "
                    "Reinstate that to use it again.",
                )
            self._progress(name)
            return
        item = Addition(
            image=annotated.image,
            masks=annotated.masks,
            absent=annotated.absent,
            key=self._next_key(name),
            name=f"{name} of {self._origin}" if self._origin else name,
            **self._told,  # type: ignore[typeddict-item]
        )
        self._waiting[content] = name, item
        self._keys.add(str(item["key"]))
        self._bytes += sum(array.nbytes for array in (annotated.image, *annotated.masks.values()))
        if len(self._waiting) >= self._most or self._bytes > BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add all that wait."""
        waiting, self._waiting = self._waiting, {}
        self._bytes, self._keys = 0, set()
        begin = monotonic()
        together = len(waiting) > 1 and self._add(waiting)
        if together:
            spent = monotonic() - begin
            most = len(waiting) * min(2.0, BATCH_S / max(spent, 1e-9))
            self._most = max(LEAST_BATCH, min(MOST_BATCH, round(most)))
        for content, (name, item) in waiting.items():
            if not together:
                try:
                    self._library.add(**item)
                except InputError as error:
                    self._fail(name, error)
                    continue
            self.added[name] = str(item["key"])
            self._known.add(content)
            self._progress(name)

    def _add(self, waiting: Mapping[str, tuple[str, Addition]]) -> bool:
        """Add all in one commit; False if one cannot be used, and none was added."""
        try:
            self._library.add_many([item for _, item in waiting.values()])
        except InputError:
            return False
        return True

    def _fail(self, name: str, error: InputError) -> None:
        if self._strict:
            raise error
        self.failed[name] = str(error)
        self._progress(name)

    def _next_key(self, name: str) -> str:
        if self._key is None:
            return random_key()
        number = len(self._library) + len(self._waiting) + 1
        while True:
            key = self._key.replace("{number}", str(number)).replace("{name}", name)
            free = key not in self._library and key not in self._keys
            if free or "{number}" not in self._key:
                return key
            number += 1
