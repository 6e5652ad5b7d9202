"""A whole archive is segmented: by processes of one machine, or by many machines on Ray."""

from __future__ import annotations

from recallseg.runtime.services.archive.progress import Archived, Progress
from recallseg.runtime.services.archive.running import segment_archive

__all__ = ["Archived", "Progress", "segment_archive"]
