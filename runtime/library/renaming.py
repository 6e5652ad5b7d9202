"""Another name for a structure, in every exemplar that names it."""

from __future__ import annotations

from recallseg.engines.digest import digest_json
from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_name
from recallseg.runtime.library.calibrations import notes_of
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.library.sources import content_digest
from recallseg.runtime.library.store import Store

__all__ = ["rename"]


def rename(store: Store, old: str, new: str) -> None:
    """Rename a structure; see :meth:`recallseg.Library.rename_structure`."""
    store.check_writable("rename a structure")
    check_name(new)
    catalog = store.catalog
    with store.changing:
        store.refresh()
        row = store.structure(old)
        numbers = catalog.annotated(row.id)
        if not numbers:
            raise InputError(f"no exemplar is annotated for '{old}' any more.")
        other = store.structures.get(new)
        if old == new or (other is not None and catalog.annotated(other.id)):
            raise InputError(
                f"there is a structure '{new}' already, and two cannot become one. Choose another "
                "name."
            )
        contents = {}
        for number in numbers:
            [key] = catalog.keys([number])
            exemplar = catalog.exemplar(key)
            if exemplar is not None:
                contents[number] = _content(store, number, exemplar, old, new)
        moved = notes_of(catalog, old, new)
        with store.lock:
            store.on_a_full_disk(
                lambda: catalog.rename_structure(row.id, old, new, contents, moved)
            )
            store.see_newest()


def _content(store: Store, number: int, exemplar: Exemplar, old: str, new: str) -> str:
    """Return the digest of an exemplar's content under the new name."""
    digest = store.catalog.source_digest(number)
    if digest is None:
        return digest_json(["renamed", exemplar.content, old, new])
    names = store.catalog.names_in_source(number)
    image, masks = store.sources.read(number, digest, exemplar.key, names)

    def named(name: str) -> str:
        return new if name == old else name

    return content_digest(
        image,
        {named(name): mask for name, mask in masks.items()},
        tuple(map(named, exemplar.absent)),
    )
