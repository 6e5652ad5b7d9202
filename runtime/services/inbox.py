"""What has arrived in a folder and is complete.

A DICOM receiver writes one file for each slice and says nothing when the last one is there. So an
item is complete when nothing of it has been added or has changed for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from recallseg.runtime.formats.dicom_headers import Header
from recallseg.runtime.formats.finding import Headers, Item, PassedOver, Signature, find_in_folder

__all__ = ["Inbox"]


class Inbox:
    """Looks into one folder, and those below it, again and again.

    Regular files only, by :func:`recallseg.runtime.formats.finding.find_in_folder`: links, pipes
    and devices, which anybody may leave there, are passed over.

    Parameters
    ----------
    source : the folder.
    settle_s : seconds without a change after which an item is complete.
    read, kind : see :func:`find_in_folder`.
    """

    def __init__(
        self,
        source: Path,
        settle_s: float,
        read: Callable[[Path], Header] | None = None,
        kind: str | None = None,
    ) -> None:
        self._source = source
        self._settle_s = settle_s
        self._read = read
        self._kind = kind
        self._seen: dict[tuple[Path, str], tuple[Signature, float]] = {}
        self._headers: Headers = {}
        self.passed: tuple[PassedOver, ...] = ()
        """What the last look passed over, with reasons."""
        self.not_given: tuple[PassedOver, ...] = ()
        """Those of them that the machine did not let be looked at."""

    def look(self, is_done: Callable[[Item], bool]) -> tuple[list[Item], bool]:
        """Return complete items that are not done, and whether others are still being written."""
        found = find_in_folder(
            self._source,
            links=False,
            by_folder=False,
            kind=self._kind,
            headers=self._headers,
            read=self._read,
        )
        self.passed, self.not_given = found.passed, found.not_given
        complete: list[Item] = []
        unsettled = False
        seen: dict[tuple[Path, str], tuple[Signature, float]] = {}
        now = monotonic()
        for item in found.items:
            if is_done(item):
                continue
            key = (item.relative, item.suffix)
            before = self._seen.get(key)
            same = before is not None and before[0] == item.signature
            since = before[1] if before is not None and same else now
            seen[key] = (item.signature, since)
            if now - since >= self._settle_s:
                complete.append(item)
            else:
                unsettled = True
        self._seen = seen
        return complete, unsettled
