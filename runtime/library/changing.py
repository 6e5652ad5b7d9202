"""Adding exemplars to a library, changing one, and removing one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import starmap
from typing import Any, Optional, TypedDict

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, LibraryError, LibraryWriteError
from recallseg.runtime.checks import (
    check_annotation,
    check_image,
    check_key,
    check_mask,
    check_origin,
    check_tags,
)
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.library import maintenance
from recallseg.runtime.library.ahead import encode_ahead
from recallseg.runtime.library.catalog import ADDING
from recallseg.runtime.library.encoding import Encoded, ExemplarEncoder, check_encoded
from recallseg.runtime.library.identifiers import FORGET, is_hashed
from recallseg.runtime.library.identifiers_file import Identity
from recallseg.runtime.library.identifying import random_key
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.records import NewExemplar
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.sources import check_readable, content_digest
from recallseg.runtime.library.store import Store

__all__ = [
    "Addition",
    "Made",
    "Make",
    "add",
    "add_many",
    "remove",
    "replace_mask",
    "retag",
    "retire",
    "write_all",
]

SAVE_EVERY = 4096
"""Exemplars added between looks at whether the search indexes should be saved."""

Progress = Callable[[int, int], None]
_SAME = " (the same image with the same masks)"
Made = tuple[NewExemplar, tuple[NDArray[Any], Mapping[str, NDArray[np.bool_]]]]
"""An exemplar whose memories are written, and its image and masks, which are not."""
Make = Callable[[int, Iterator[Place]], Made]
"""Makes an exemplar of a number, and writes its memories to the next places."""
WRITERS = 4
"""Images that are packed and written at a time: they wait for the disk most of it."""


class Addition(TypedDict, total=False):
    """One exemplar to add, by the names that :meth:`recallseg.Library.add` gives its parts."""

    image: Any
    masks: Mapping[str, Any]
    absent: tuple[str, ...]
    tags: Optional[Mapping[str, str]]
    key: Optional[str]
    name: Optional[str]
    group: Optional[str]


@dataclass(frozen=True)
class _Checked:
    """What can be added: pixels, masks and names as they will be stored."""

    pixels: NDArray[Any]
    masks: dict[str, NDArray[np.bool_]]
    absent: tuple[str, ...]
    tags: dict[str, str]
    content: str
    key: str
    identity: Identity | None
    """What is to be told of it; None: that is known, and stays."""
    group: str | None = None


def add(store: Store, encoder: Callable[[], ExemplarEncoder], item: Addition) -> str:
    """Add an exemplar; ``encoder`` is asked for when nothing else is wrong with the input."""
    store.check_writable("add")
    key = _key(item)
    checked = _check(store, item, key)
    with store.changing:
        _refuse_known(store, checked, item)
        _add_all(store, encoder, [_concealed(store, checked)], 1, len(checked.masks), _no_progress)
    return key


def add_many(
    store: Store,
    encoder: Callable[[], ExemplarEncoder],
    items: Iterable[Addition],
    details: Mapping[str, str] | None,
    progress: Progress | None,
) -> list[str]:
    """Add exemplars in one commit: all, or none."""
    store.check_writable("add")
    items, details = [*items], check_tags(details)
    contents: dict[str, tuple[int, str]] = {}
    first: dict[str, int] = {}
    memories = 0
    with store.changing:
        known = store.catalog.contents()
        # What was checked is let go: files, and masks of other dtypes, need room for one only.
        for position, item in enumerate(items):
            with _at(position):
                key = _key(item)
                checked = _check(store, item, key)
                _refuse_known(store, checked, item, known)
                if key in contents:
                    raise InputError(
                        f"it has the key '{key}' of items[{contents[key][0]}]. Give it another."
                    )
                before = first.setdefault(checked.content, position)
                if before != position and item.get("key") is None:
                    raise InputError(f"it is items[{before}] again{_SAME}. Give it a key.")
            contents[key] = position, checked.content
            memories += len(checked.masks)

        def again() -> Iterator[_Checked]:
            for key, (position, content) in contents.items():
                with _at(position):
                    checked = _check(store, items[position], key)
                    if checked.content != content:
                        raise InputError("it was changed while it was added. Add it again.")
                    concealed = _concealed(store, checked)
                yield concealed

        if items:
            tell = progress or _no_progress
            _add_all(store, encoder, again(), len(items), memories, tell, details=details)
    return [*contents]


def _key(item: Addition) -> str:
    """Return the key of an exemplar to add: the given one, or one that says nothing."""
    if not isinstance(item, Mapping):
        raise InputError(
            f"an exemplar to add must map the names of add() to what it takes, e.g. "
            f"dict(image=..., masks=...), got {type(item).__name__}."
        )
    key = item.get("key")
    return random_key() if key is None else check_key(key)


def _check(store: Store, item: Addition, key: str) -> _Checked:
    names = Addition.__annotations__
    unknown = [name for name in item if name not in names]
    missing = [name for name in ("image", "masks") if name not in item]
    if unknown or missing:
        what = f"has '{unknown[0]}'" if unknown else f"has no '{missing[0]}'"
        raise InputError(f"an exemplar to add {what}; its parts are {', '.join(names)}.")
    pixels = check_image(open_image(item["image"]))
    masks, absent = check_annotation(item["masks"], item.get("absent", ()), pixels.shape)
    if store.settings.keep_sources:
        check_readable(pixels, masks)
    content = content_digest(pixels, masks, absent)
    group = check_origin(item.get("group")) or None
    identity = Identity(key, check_origin(item.get("name")), group=group or "")
    tags = check_tags(item.get("tags"))
    return _Checked(pixels, masks, absent, tags, content, key, identity, group)


def _concealed(store: Store, checked: _Checked) -> _Checked:
    """Hash what identifies; what it was goes to the table of identifiers."""
    tags = store.identifiers.conceal(checked.tags, adding=True)
    hidden = {name: value for name, value in checked.tags.items() if tags[name] != value}
    told = replace(checked.identity or Identity(checked.key), tags=hidden)
    group = checked.group
    if group is not None and not is_hashed(group):
        group = store.identifiers.keyed_hash("group", group, adding=True)
    return replace(checked, tags=tags, identity=told, group=group)


def _refuse_known(
    store: Store, checked: _Checked, item: Addition, contents: Mapping[str, str] | None = None
) -> None:
    """Refuse a key that is taken; without one, an image that is there already under any.

    ``contents`` are those of the library, where they have been read.
    """
    known, same = checked.key, ""
    if item.get("key") is None:
        found = store.catalog.with_content(checked.content) if contents is None else ""
        known, same = found or (contents or {}).get(checked.content, ""), _SAME
    number = store.catalog.number(known) if known else None
    if number is not None:
        state = (
            ", which is retired. Reinstate it, remove it"
            if store.catalog.is_retired(number)
            else ". Remove it"
        )
        raise InputError(
            f"the library already has an exemplar '{known}'{same}{state} first, or give "
            f"{'a' if same else 'another'} key."
        )


def _add_all(
    store: Store,
    encoder: Callable[[], ExemplarEncoder],
    exemplars: Iterable[_Checked],
    count: int,
    memories: int,
    progress: Progress,
    instead: tuple[str, str] | None = None,
    details: Mapping[str, str] | None = None,
) -> None:
    """Encode and write exemplars, with so many memories in all; one commit makes them visible.

    ``instead`` is the key of an exemplar that goes, and the structure that it has another mask of;
    ``details`` is for the history.
    """
    identities: list[Identity] = []

    def maker(one: _Checked, made: Encoded) -> Make:
        def make(number: int, places: Iterator[Place]) -> Made:
            structures, settings = tuple(one.masks), store.settings
            encoded = check_encoded(made, structures, settings.embedding_dim, settings.layout)
            new = NewExemplar(
                number=number,
                key=one.key,
                content=one.content,
                height=one.pixels.shape[0],
                width=one.pixels.shape[1],
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                source=None,
                tags=one.tags,
                absent=one.absent,
                embedding=encoded.embedding,
                memories=maintenance.write_memories(store.writer, places, encoded),
                origin=encoded.origin,
                group=one.group,
            )
            if one.identity is not None:
                identities.append(one.identity)
            return new, (one.pixels, one.masks)

        return make

    def commit(written: list[NewExemplar]) -> None:
        with store.identifiers.telling(identities), store.lock:
            if instead is None:
                store.catalog.add(*written, details=details)
            else:
                key, structure = instead
                of = {"structure": structure}
                store.catalog.add(*written, instead=key, what="replace_mask", details=of)

    # Queries go on meanwhile: they take turns with it on a model, or its lanes run beside them.
    with closing(
        encode_ahead(encoder(), exemplars, count, lambda one: (one.pixels, one.masks))
    ) as encoded:
        write_all(store, starmap(maker, encoded), count, memories, commit, progress)


def write_all(
    store: Store,
    exemplars: Iterable[Make],
    count: int,
    memories: int,
    commit: Callable[[list[NewExemplar]], None],
    progress: Progress,
) -> None:
    """Let exemplars be written, with so many memories in all; one commit makes them visible.

    Call with ``store.changing``. Each of ``exemplars`` makes one under its number, its memories at
    the next places; images are written beside that, by other threads. ``commit`` gets all of them.
    """
    catalog, sources, writer = store.catalog, store.sources, store.writer
    with store.lock:
        first = catalog.next_number()
        places = iter(catalog.allocate(memories, writer.capacity, store.state.generation))
        if count > 1:  # the images of more than one are found again by whoever cleans up
            catalog.set_note(ADDING, f"{first} {first + count - 1}")
    written: list[NewExemplar] = []
    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            digests: list[Future[bytes]] = []
            for number, make in enumerate(exemplars, first):
                new, source = make(number, places)
                written.append(new)
                if store.settings.keep_sources:
                    digests.append(pool.submit(sources.write, number, *source))
                    if len(digests) > WRITERS:
                        digests[-WRITERS - 1].result()  # no more wait for the disk in memory
                if len(written) < count:
                    progress(len(written), count)
            for shard in {place.shard for new in written for place, _ in new.memories.values()}:
                writer.sync(shard)
            if digests:
                both = zip(written, digests, strict=True)
                written = [replace(new, source=digest.result()) for new, digest in both]
                sources.sync(new.number for new in written)
        commit(written)
    except BaseException:
        # Not committed: give a full disk its space back.
        with store.lock, suppress(LibraryError):  # or the next who opens it does
            if catalog.next_number() == first:
                for number in range(first, first + len(written) + 1):
                    sources.remove(number)
                if count > 1:
                    catalog.set_note(ADDING, None)
        raise
    with store.lock:
        store.see_newest()
        if (first - 1) // SAVE_EVERY < written[-1].number // SAVE_EVERY:
            with suppress(LibraryWriteError):  # it is added; closing saves, or says why not
                store.retrieval.save_worn()
    progress(count, count)


@contextmanager
def _at(position: int) -> Iterator[None]:
    """Say of an InputError at which position of a list it arose."""
    try:
        yield
    except InputError as error:
        raise InputError(f"items[{position}]: {error}") from error


def _no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def remove(store: Store, key: str) -> None:
    """Remove an exemplar from the catalog, and its source."""
    store.check_writable("remove")
    with store.changing, store.lock:
        known = FORGET if store.identifiers.knows(key) else None
        number = store.on_a_full_disk(lambda: store.catalog.remove(key, known))
        if number is None:
            raise unknown_key(key)
        store.see_newest()
        if known:
            with suppress(LibraryWriteError):  # or the next who opens it for writing does
                store.identifiers.forget()
        _delete_source(store, number, f"exemplar '{key}' is removed, but its image")


def replace_mask(
    store: Store, encoder: Callable[[], ExemplarEncoder], key: str, structure: str, mask: Any
) -> None:
    """Give an exemplar another mask of a structure, in one commit."""
    store.check_writable("replace a mask")
    with store.changing:
        number, exemplar = store.number(key), store.catalog.exemplar(key)
        digest = store.catalog.source_digest(number)
        if exemplar is None:
            raise unknown_key(key)
        if exemplar.retired:
            raise InputError(f"exemplar '{key}' is retired. Reinstate it to change it.")
        if structure not in exemplar.structures:
            raise InputError(
                f"exemplar '{key}' has no mask of '{structure}' to replace; it has "
                f"{', '.join(exemplar.structures) or 'none'}. Remove it, and add it anew."
            )
        if digest is None:
            raise InputError(
                f"the library {store.path} did not keep the image of exemplar '{key}', so it "
                "cannot be encoded anew. Remove it, and add it with the other mask."
            )
        image, masks = store.sources.read(
            number, digest, key, store.catalog.names_in_source(number)
        )
        masks[structure] = check_mask(mask, image.shape, structure)
        content = content_digest(image, masks, exemplar.absent)
        tags = dict(exemplar.tags)
        group = store.catalog.group(number)
        new = _Checked(image, masks, exemplar.absent, tags, content, key, None, group)
        _add_all(store, encoder, [new], 1, len(masks), _no_progress, (key, structure))
        with store.lock:
            done = f"the mask of exemplar '{key}' is replaced, but the former copy of its image"
            _delete_source(store, number, done)


def _delete_source(store: Store, number: int, done: str) -> None:
    try:
        store.sources.remove(number)
    except LibraryWriteError as error:
        raise LibraryWriteError(
            f"{done} could not be deleted and is still on the disk: {error} It is "
            "deleted when the library is next opened for writing."
        ) from error


def retag(store: Store, key: str, tags: Mapping[str, str] | None) -> None:
    """Give an exemplar other tags."""
    store.check_writable("retag")
    labels = check_tags(tags)
    with store.changing, store.lock:
        former = store.catalog.exemplar(key)
        if former is None:
            raise unknown_key(key)
        known = store.identifiers.of(key, former.tags)
        hashed = store.identifiers.conceal(labels, adding=True)
        hidden = {
            **{n: value for n, value in known.tags.items() if hashed.get(n) == former.tags[n]},
            **{n: value for n, value in labels.items() if hashed[n] != value},
        }
        with store.identifiers.telling([replace(known, tags=hidden)]):
            if not store.catalog.retag(key, hashed):
                raise unknown_key(key)
        store.see_newest()


def retire(store: Store, keys: str | Iterable[str] = (), back: str | Iterable[str] = ()) -> None:
    """Take exemplars out of use, and others into it again, in one commit."""
    store.check_writable("reinstate" if back else "retire")
    with store.changing, store.lock:
        out, into = (_numbers(store, k, retired) for k, retired in ((keys, True), (back, False)))
        if out or into:
            store.on_a_full_disk(lambda: store.catalog.retire(out, into))
            store.see_newest()


def _numbers(store: Store, keys: str | Iterable[str], retired: bool) -> list[int]:
    """Return the numbers of exemplars that are not yet retired, or not any more."""
    named = [keys] if isinstance(keys, str) else [*dict.fromkeys(keys)]
    numbers = [store.number(key) for key in named]
    for key, number in zip(named, numbers, strict=True):
        if store.catalog.is_retired(number) is retired:
            state = "is retired already" if retired else "is not retired"
            raise InputError(f"exemplar '{key}' {state}; nothing was changed.")
    return numbers
