"""Adding an exemplar to a library, changing one, and removing one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from recallseg.engines.errors import InputError, LibraryWriteError
from recallseg.runtime.checks import check_annotation, check_image, check_key, check_tags
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.library import maintenance
from recallseg.runtime.library.encoding import ExemplarEncoder, check_encoded
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.records import NewExemplar
from recallseg.runtime.library.sources import content_digest
from recallseg.runtime.library.store import Store

__all__ = ["add", "remove", "retag"]

SAVE_EVERY = 4096
"""Exemplars added between looks at whether the search indexes should be saved."""


def add(
    store: Store,
    encoder: Callable[[], ExemplarEncoder],
    image: Any,
    masks: Mapping[str, Any],
    absent: tuple[str, ...],
    tags: Mapping[str, str] | None,
    key: str | None,
) -> str:
    """Add an exemplar; ``encoder`` is asked for when nothing else is wrong with the input."""
    store.check_writable("add")
    pixels = check_image(open_image(image))
    checked, missing = check_annotation(masks, absent, pixels.shape)
    labels = check_tags(tags)
    with store.changing:
        content = content_digest(pixels, checked, missing)
        name = content[:32] if key is None else check_key(key)
        if store.catalog.number(name) is not None:
            same = "" if key else " (the same image with the same masks)"
            raise InputError(
                f"the library already has an exemplar '{name}'{same}. Remove it first, or "
                "give another key."
            )
        # Queries go on meanwhile, and take their turns on the model.
        encoded = check_encoded(
            encoder().encode(pixels, checked),
            tuple(checked),
            store.settings.embedding_dim,
            store.settings.layout,
        )
        with store.lock:
            number = store.catalog.next_number()
            try:
                source = None
                if store.settings.keep_sources:
                    source = store.sources.write(number, pixels, checked)
                memories = maintenance.append(
                    store.catalog, store.writer, encoded, store.state.generation
                )
                store.catalog.add(
                    NewExemplar(
                        number=number,
                        key=name,
                        content=content,
                        height=pixels.shape[0],
                        width=pixels.shape[1],
                        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        source=source,
                        tags=labels,
                        absent=missing,
                        embedding=encoded.embedding,
                        memories=memories,
                        origin=encoded.origin,
                    )
                )
            except LibraryWriteError:
                if (
                    store.catalog.next_number() == number
                ):  # not committed: give a full disk its space back
                    with suppress(LibraryWriteError):  # or the next who opens it does
                        store.sources.remove(number)
                raise
            store.see_own()
            if number % SAVE_EVERY == 0:
                with suppress(LibraryWriteError):  # it is added; closing saves, or says why not
                    store.retrieval.save_worn()
            return name


def remove(store: Store, key: str) -> None:
    """Remove an exemplar from the catalog, and its source."""
    store.check_writable("remove")
    with store.changing, store.lock:
        number = store.on_a_full_disk(lambda: store.catalog.remove(key))
        if number is None:
            raise unknown_key(key)
        store.see_own()
        try:
            store.sources.remove(number)
        except LibraryWriteError as error:
            raise LibraryWriteError(
                f"exemplar '{key}' is removed, but its image could not be deleted and is still on "
                f"the disk: {error} It is deleted when the library is next opened for writing."
            ) from error


def retag(store: Store, key: str, tags: Mapping[str, str] | None) -> None:
    """Give an exemplar other tags."""
    store.check_writable("retag")
    labels = check_tags(tags)
    with store.changing, store.lock:
        if not store.catalog.retag(key, labels):
            raise unknown_key(key)
        store.see_own()
