"""The library's door to what was learnt from its exemplars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recallseg.runtime.checks import check_tags
from recallseg.runtime.library import calibrations
from recallseg.runtime.library.calibrations import Learnt, StoredCalibration
from recallseg.runtime.library.store import Store

__all__ = ["CalibrationDoor"]


class CalibrationDoor:
    """The part of :class:`recallseg.Library` that keeps calibrations."""

    _store: Store

    def check_writable(self, what: str) -> None:
        """Raise LibraryWriteError if it is open for reading; ``what`` cannot be done then."""
        self._store.check_writable(what)

    def store_calibrations(
        self, recipe: str, data: Mapping[str, Mapping[str, Any]], newest: str
    ) -> None:
        """Store what was learnt from the exemplars; what is stored for others is kept.

        Parameters
        ----------
        recipe : digest of the recipe that it holds for.
        data : JSON values by structure.
        newest : key of the newest exemplar that it was made with.

        Raises
        ------
        InputError
            If it is not JSON, or there is no such key.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        calibrations.store_calibrations(self._store, recipe, data, newest)

    @property
    def calibrations(self) -> tuple[StoredCalibration, ...]:
        """All that is stored; raises LibraryCorruptError if one is damaged."""
        return calibrations.calibrations(self._store)

    @property
    def has_former_calibration(self) -> bool:
        """Whether an older program calibrated it, without saying with which settings."""
        return self._store.catalog.note(calibrations.FORMER) is not None

    @property
    def commits(self) -> tuple[int, int]:
        """What differs after any commit, by this object or by others; very fast."""
        return self._store.catalog.database.commits

    def calibration_marks(self, recipes: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Return what changes whenever a calibration of one of these recipes does; fast."""
        return calibrations.marks(self._store, recipes)

    def learnt(
        self, recipes: Sequence[str], structures: Sequence[str], tags: Mapping[str, str]
    ) -> dict[str, Learnt]:
        """Return calibration and embeddings by structure; only exemplars with all ``tags`` count.

        Parameters
        ----------
        recipes : digests of one recipe under the bundle's identities, today's first: the first that
            was calibrated counts.
        structures : what is asked for.
        tags : as exemplars have them, see :meth:`conceal`.

        Raises
        ------
        InputError
            For an unknown structure.
        """
        return calibrations.learnt(self._store, recipes, structures, check_tags(tags))
