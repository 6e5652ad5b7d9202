"""Who an exemplar is of, kept apart from everything that travels.

Keys, tags and groups of exemplars stand in records, pages, logs and audit entries of *other*
patients, and in every copy of a library. So a key says nothing, and what identifies is replaced by
a keyed hash: equal values stay equal within one library, and nobody without its secret can try
patients' numbers until one fits. What they stand for is in one file of the library, of 0600
whatever the folder's permissions, with the secret: copies are made without it.

Rows are written before the catalog's commit, so a name is never lost; what a commit that failed
left is at the end, and is cleared when the library is next opened for writing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recallseg.engines.errors import InputError, LibraryError
from recallseg.runtime.library.identifiers_file import (
    IDENTIFIERS,
    IdentifiersFile,
    Identity,
    Row,
)
from recallseg.runtime.library.identifying import identifies

if TYPE_CHECKING:
    from recallseg.runtime.library.catalog import Catalog

__all__ = [
    "FORGET",
    "NOTE",
    "Identifiers",
    "is_hashed",
]

NOTE = "identifiers"
"""The catalog's note: which secret hashed what is hashed in it."""
FORGET = "forget"
"""The catalog's note: the key of an exemplar that is removed, and whose row is to go now."""
_CONTEXT = b"recallseg-identifier-1\0"
_HASHED = re.compile("keyed:[0-9a-f]{64}")
_PREFIX, _AFTER = "keyed:", "keyed;"  # all that begins with the prefix sorts between the two


def is_hashed(value: str) -> bool:
    """Whether a tag's value is a keyed hash already."""
    return _HASHED.fullmatch(value) is not None


class Identifiers:
    """The table of one library. It is read when it is first needed; one process writes it.

    Parameters
    ----------
    folder : the library's.
    catalog : the library's.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self._file = IdentifiersFile(folder)
        self._folder = folder
        self._catalog = catalog
        self._lock = threading.RLock()

    # What is known

    def of(self, key: str, tags: Mapping[str, str]) -> Identity:
        """Return what a key stands for, as far as it is known.

        Parameters
        ----------
        tags : as they are in the catalog: a value of the table that does not hash to what is there
            is of a change that was cut off, and is not told.

        Raises
        ------
        LibraryError
            If the table is not this user's alone, or damaged.
        """
        with self._lock:
            self._file.load()
            identities = [row.identity for row in reversed(self._file.rows.get(key, ()))]
            for told in identities:
                if all(self._stands(*tag, tags) for tag in told.tags.items()):
                    return told
        return replace(identities[0], tags={}) if identities else Identity(key)

    def _stands(self, name: str, value: str, tags: Mapping[str, str]) -> bool:
        return tags.get(name) == self._hash(f"tag {name}", value)

    def formerly(self, key: str) -> str | None:
        """Return the key of the exemplar that had this one before it was made anonymous."""
        with self._lock:
            self._file.load()
            told = (row.identity for rows in self._file.rows.values() for row in rows)
            return next((each.key for each in told if each.former == key), None)

    def knows(self, key: str) -> bool:
        """Whether anything is known of a key."""
        with self._lock:
            return bool(self._file.of_keys([key]))

    # Hashing

    def conceal(
        self, tags: Mapping[str, str], *, adding: bool = False, beside_clear: bool = False
    ) -> dict[str, str]:
        """Return tags with a keyed hash in place of each value that identifies.

        Parameters
        ----------
        tags : checked ones; values that are hashed already stay.
        adding : they are to be stored, so the secret is made where there is none.
        beside_clear : also where the library has such values in the clear, which equal ones would
            no longer be equal to.

        Raises
        ------
        InputError
            If the secret is not here, or the library has such values in the clear.
        """
        hashed = dict(tags)
        for name, value in tags.items():
            if identifies(name, value) and not is_hashed(value):
                if not beside_clear:
                    self._refuse_clear(name, value)
                hashed[name] = self.keyed_hash(f"tag {name}", value, adding=adding)
        return hashed

    def keyed_hash(self, kind: str, value: str, *, adding: bool = False) -> str:
        """Return ``keyed:`` and the HMAC-SHA256 of a value under the library's secret, as hex.

        Parameters
        ----------
        kind : of the value, e.g. ``group``; equal values of two kinds have different hashes.
        adding : it is to be stored: the secret is made where there is none, and the catalog is
            marked as one with hashed values.

        Raises
        ------
        InputError
            If the secret is not here.
        LibraryError
            If the table is not this user's alone, damaged, or cannot be written.
        """
        with self._lock:
            self._need_secret(adding)
            return self._hash(kind, value)

    def _hash(self, kind: str, value: str) -> str:
        message = _CONTEXT + kind.encode() + b"\0" + value.encode()
        return _PREFIX + hmac.new(self._file.secret, message, hashlib.sha256).hexdigest()

    def _refuse_clear(self, name: str, value: str) -> None:
        """Raise InputError if the library has such a value in the clear."""
        probes = [("value < ?", _PREFIX), ("value >= ?", _AFTER)]
        if not identifies(name, ""):
            probes = [("value = ?", value)]
        for condition, bound in probes:
            if self._catalog.database.execute(
                f"SELECT 1 FROM tags WHERE name = ? AND {condition} LIMIT 1",  # noqa: S608
                (name, bound),
            ):
                raise InputError(
                    f"the library {self._folder} has the tag '{name}' in the clear, from an "
                    "earlier RecallSeg; such values are hashed now. Run 'recallseg library "
                    "anonymise' on it once."
                )

    def _need_secret(self, adding: bool) -> None:
        self._file.load()
        noted = self._catalog.note(NOTE)
        if noted is None:
            if adding:
                self.adopt()
            elif not self._file.secret:
                raise InputError(
                    f"no exemplar of the library {self._folder} has a tag that identifies somebody."
                )
        elif noted != self._secret_id:
            whose = "is another library's" if self._file.secret else "is not here"
            raise InputError(
                f"values that identify are hashed in the library {self._folder}, and its table of "
                f"them ({IDENTIFIERS}) {whose}: copies are made without it. Ask for a value by its "
                "hash ('recallseg library list'). To add new ones, restore the table from a "
                "backup, or begin one of your own with 'recallseg library anonymise'."
            )

    @property
    def own(self) -> bool:
        """Whether what is hashed in the catalog is so with this table's secret."""
        with self._lock:
            self._file.load()
            return bool(self._file.secret) and self._catalog.note(NOTE) == self._secret_id

    @property
    def _secret_id(self) -> str:
        """What tells secrets apart, and says nothing of them."""
        return hashlib.sha256(_CONTEXT + self._file.secret).hexdigest()[:16]

    def adopt(self) -> None:
        """Note in the catalog that values in it are hashed with this table's secret."""
        with self._lock, self._catalog.database.transaction():
            self._file.load()
            self._file.make()
            self._catalog.database.upgrade()
            self._catalog.set_note(NOTE, self._secret_id)

    # Change

    @contextmanager
    def telling(
        self, identities: Sequence[Identity], *, instead: Iterable[str] = ()
    ) -> Iterator[None]:
        """Store what keys stand for, durably; the block then commits the exemplars.

        If that was not done, what was told is forgotten; else what had been told of the same keys
        is, and of those that they take the place of. The catalog says which: an error may come when
        all is committed.

        Raises
        ------
        LibraryWriteError
            If the table cannot be written.
        """
        keys = [*(identity.key for identity in identities), *instead]
        told = [identity for identity in identities if identity]
        stored = self._stored(identities)
        with self._lock:
            before = self._file.of_keys(keys)
            now = self._file.append(told)
        try:
            yield
        except BaseException:
            with self._lock, suppress(LibraryError):  # or the next who opens it does
                self._file.forget(now if self._stored(identities) == stored else before)
            raise
        with self._lock:
            self._file.forget(before)

    def _stored(self, identities: Sequence[Identity]) -> list[object]:
        """Return what the catalog has of keys, which a commit of what they stand for changes."""
        catalog, found = self._catalog, list[object]()
        for identity in identities:
            number, exemplar = catalog.number(identity.key), catalog.exemplar(identity.key)
            if number is not None and exemplar is not None:
                found.append((number, exemplar.tags, catalog.group(number)))
        return found

    def forget(self) -> None:
        """Forget what the key of an exemplar stood for that is removed: the catalog notes which."""
        key = self._catalog.note(FORGET)
        if key is not None:
            with self._lock:
                self._file.forget(self._file.of_keys([key]))
            self._catalog.set_note(FORGET, None)

    def clear_remains(self) -> None:
        """Forget what a writer that died told of exemplars that are not there."""
        self.forget()
        if not self._file.exists:
            return
        with self._lock:
            last = self._file.last_key()
            if last is not None and self._catalog.number(last) is not None:
                return
            self._file.load()
            unknown: list[Row] = []
            for key, rows in reversed(self._file.rows.items()):
                if self._catalog.number(key) is not None:
                    break
                unknown += rows
            self._file.forget(unknown)
            self._file.cut_off()
