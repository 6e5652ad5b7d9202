"""One found item in, its segmentation and record out: what segment, watch and archive share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from recallseg.engines.digest import digest_json
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.reports.outlined import outlined_picture
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.outputs import time_base, write_result
from recallseg.runtime.volumes.outputs import VolumeSettings, segment_to_files
from recallseg.runtime.volumes.slices import VolumeResult

__all__ = ["ask_again", "request_of", "segment_item", "volumes_of"]

ASKED_AGAIN = 5
"""Times that an item is segmented while another process changes the library under it."""

Answer = TypeVar("Answer")


def ask_again(segmenter: Segmenter, ask: Callable[[], Answer]) -> Answer:
    """Return what ``ask`` returns; if it fails while the library changes, it is asked again.

    Another process may remove an exemplar between its being found and being read: then the item is
    no worse than before.

    Raises
    ------
    InputError
        What ``ask`` raised, of a library that stayed as it was, or after that many times.
    """
    for _ in range(ASKED_AGAIN - 1):
        before = segmenter.library.digest
        try:
            return ask()
        except InputError:
            if segmenter.library.digest == before:
                raise
    return ask()


def request_of(item: Item, settings: VolumeSettings) -> str:
    """Return a digest of what is asked for: which files as they are, treated how.

    It stands in a record as ``request``, see
    :func:`recallseg.runtime.services.outputs.is_done`.
    """
    return digest_json([item.kind, repr(item.signature), repr(settings)])


def volumes_of(
    item: Item, base: Path, time: int | str | None, count: Callable[[], int | None]
) -> list[tuple[int | None, Path]] | None:
    """Return what of an item is segmented: its volumes' time points, each with its outputs' path.

    Parameters
    ----------
    base : path of the item's outputs, less their suffixes.
    time : number of one volume, from 1; ``all``; None for the only one.
    count : returns how many volumes there are, or None if it was stopped, which is returned then;
        asked for ``all`` only.
    """
    if item.kind == "image":
        return [(None, base)]
    if time != "all":
        assert not isinstance(time, str)
        return [(time, base)]
    found = count()
    if found is None:
        return None
    return [(n, base if found == 1 else time_base(base, n)) for n in range(1, found + 1)]


def segment_item(
    segmenter: Segmenter,
    item: Item,
    image: NDArray[Any] | Volume,
    base: Path,
    settings: VolumeSettings,
    *,
    log: AuditLog | None = None,
    progress: Callable[[str], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[Result | VolumeResult, dict[str, Any]]:
    """Segment what was read of an item, record it in the log, write it; return it and its record.

    Parameters
    ----------
    image : HxW or HxWx3, or a volume.
    base : path of the outputs, less their suffixes.
    settings : how volumes are treated; of pictures, whether to leave a preview.
    progress : for volumes.
    extra : what else the record shall have.

    Raises
    ------
    InputError, OutputError, EngineRunError, AuditError, OSError
        As :meth:`Segmenter.segment`, :func:`segment_to_files` and :func:`write_result` say.
    """
    if isinstance(image, Volume):
        return segment_to_files(
            segmenter,
            image,
            base,
            settings,
            kind=item.kind,
            source=item.name,
            log=log,
            progress=progress,
            extra=extra,
        )
    result = segmenter.segment(image)
    if log is not None:
        log.record(image, result.label_map, result.to_audit())
    intensity = segmenter.library.intensity
    preview = outlined_picture(image, result, intensity) if settings.preview else None
    return result, write_result(base, result, item.name, extra, preview)
