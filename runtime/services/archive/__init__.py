"""A whole archive is segmented, by many processes."""

from __future__ import annotations

from recallseg.runtime.services.archive.running import Archived, Progress, segment_archive

__all__ = ["Archived", "Progress", "segment_archive"]
