"""``recallseg library revert``: exemplars in use as they were."""

from __future__ import annotations

from typing import Annotated

import typer

from recallseg.commands.common import JsonOption, LibraryArgument, emit_json, note, state_of

__all__ = ["revert"]


def revert(
    library: LibraryArgument,
    revision: Annotated[
        int, typer.Argument(min=0, help="Of a change, as 'library history' numbers them.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Use the exemplars that were in use after an earlier change: later ones are retired.

    Retired ones come back; removed ones do not. Masks, tags and names stay as they are now.
    """
    from recallseg.runtime.library import Library
    from recallseg.runtime.library.reverting import revert as revert_library

    with Library.open(library, mode="write") as opened:
        done = revert_library(opened, revision)
        state = state_of(opened)
    if as_json:
        emit_json(
            {
                "retired": list(done.retired),
                "reinstated": list(done.reinstated),
                "lost": done.lost,
                "kept": [change.to_json() for change in done.kept],
                "library": state,
            }
        )
        return
    note(f"retired {len(done.retired)}, took back into use {len(done.reinstated)}")
    if done.lost:
        note(
            f"{done.lost} exemplars that were there then were removed since: they do not come back"
        )
    if done.kept:
        these = ", ".join(f"{change.revision} {change.what}" for change in done.kept)
        note(f"stay as they are: what was changed by {these}")
