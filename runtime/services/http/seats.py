"""A client's place at a server: what a lease gives."""

from __future__ import annotations

from numpy.typing import DTypeLike

from recallseg.runtime.services.http.drafts import Draft
from recallseg.runtime.services.http.limits import RefusedError

__all__ = ["Seat"]


class Seat:
    """One client's draft, if it has opened an image, and what it said of it.

    Attributes
    ----------
    target : the structure that nnInteractive's calls are about; None for the server's choice.
    dtype : of the masks that it is sent.
    spreads : whether a prompt is carried on to neighbouring slices at once.
    """

    def __init__(self) -> None:
        self._draft: Draft | None = None
        self.target: str | None = None
        self.dtype: DTypeLike = "uint8"
        self.spreads = True

    @property
    def draft(self) -> Draft:
        """The opened image; raises RefusedError (409) if there is none."""
        if self._draft is None:
            raise RefusedError(409, "no image is open in this session. Set one first.")
        return self._draft

    @property
    def has_draft(self) -> bool:
        """Whether an image is open."""
        return self._draft is not None

    def open(self, draft: Draft) -> None:
        """Put an image in the place of the one before."""
        former, self._draft = self._draft, draft
        if former is not None:
            former.close()

    def leave(self) -> None:
        """Close the image that is open; harmless if there is none."""
        former, self._draft = self._draft, None
        if former is not None:
            former.close()

    def cancel(self) -> None:
        """End what runs in another thread."""
        if self._draft is not None:
            self._draft.cancel()

    def close(self) -> None:
        """Give all back."""
        self.leave()
