"""What changing a library takes: adding, removing, compacting, encoding anew, verifying."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError, LibraryError, LibraryWriteError
from recallseg.runtime.checks import check_annotation, check_image, check_key, check_tags
from recallseg.runtime.library import maintenance
from recallseg.runtime.library.binding import bundle_settings, open_bundle
from recallseg.runtime.library.encoding import ExemplarEncoder, check_encoded
from recallseg.runtime.library.exemplar import LibraryReport
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.reading import MEMORIES, LibraryReading
from recallseg.runtime.library.records import NewExemplar, Settings
from recallseg.runtime.library.shards import ShardWriter
from recallseg.runtime.library.sources import content_digest
from recallseg.runtime.library.storage import writing

__all__ = ["LibraryChanging"]

SAVE_EVERY = 4096
"""Exemplars added between looks at whether the search indexes should be saved."""

Progress = Callable[[int, int], None]


class LibraryChanging(LibraryReading):
    """The changing half of :class:`recallseg.runtime.library.Library`."""

    def add(
        self,
        image: NDArray[Any],
        masks: Mapping[str, NDArray[Any]],
        *,
        absent: tuple[str, ...] = (),
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> str:
        """Add an annotated image and return its key. It is stored in full or not at all.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, integer or floating.
        masks : structure -> mask HxW, boolean or of 0 and 1, not empty.
        absent : structures that the image is known not to show.
        tags : e.g. ``{"modality": "MR"}``, for filtered search.
        key : name of the exemplar; by default the first 32 hex digits of the content's SHA-256, so
            that adding the same image and masks again is noticed.

        Raises
        ------
        InputError
            For unusable images, masks, names or tags, or a key that is there already.
        LibraryWriteError
            If the library is open for reading only, or the disk is full; nothing stored is lost.
        EngineRunError
            If the encoder fails or gives wrong tensors.
        """
        self._check_writable("add")
        pixels = check_image(image)
        checked, missing = check_annotation(masks, absent, pixels.shape)
        labels = check_tags(tags)
        with self._lock:
            content = content_digest(pixels, checked, missing)
            name = content[:32] if key is None else check_key(key)
            if name in self:
                same = "" if key else " (the same image with the same masks)"
                raise InputError(
                    f"the library already has an exemplar '{name}'{same}. Remove it first, or "
                    "give another key."
                )
            layout = self._settings.layout
            encoded = check_encoded(
                self._own_encoder().encode(pixels, checked),
                tuple(checked),
                self._settings.embedding_dim,
                layout,
            )
            number = self._catalog.next_number()
            try:
                source = None
                if self._settings.keep_sources:
                    source = self._sources.write(number, pixels, checked)
                memories = maintenance.append(
                    self._catalog, self._writer, encoded, self._state.generation
                )
                self._catalog.add(
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
                    )
                )
            except LibraryWriteError:
                if (
                    self._catalog.next_number() == number
                ):  # not committed: give a full disk its space back
                    self._sources.remove(number)
                raise
            self._see_own()
            if number % SAVE_EVERY == 0:
                self._retrieval.save_worn()
            return name

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return the embedding (D, unit length) that an image would be stored with.

        Raises
        ------
        InputError
            For an unusable image.
        EngineRunError
            If the encoder fails.
        """
        with self._lock:
            return self._own_encoder().embed(check_image(image))

    def remove(self, key: str) -> None:
        """Remove an exemplar; the space of its memories is freed by :meth:`compact`.

        Raises
        ------
        InputError
            If there is no such key.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        self._check_writable("remove")
        with self._lock:
            number = self._catalog.remove(key)
            if number is None:
                raise unknown_key(key)
            with writing(self._sources.file(number)):
                self._sources.remove(number)
            self._see_own()

    def compact(self) -> int:
        """Write the memories in use to new shards, delete the old ones, return the bytes freed."""
        self._check_writable("compact")
        with self._lock:
            freed = maintenance.compact(
                self._catalog,
                self._reader,
                self._writer,
                self.path / MEMORIES,
                self._state.generation,
            )
            self._see_own()
            return freed

    def rebuild(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        encoder: ExemplarEncoder | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Encode every exemplar anew from its source, for another bundle or the same.

        Until the one commit at the end the library is what it was. When interrupted, the next call
        for the same bundle goes on where this one was. Other processes must open it again.

        Parameters
        ----------
        bundle : what it shall belong to; None for its own.
        encoder : used instead of the bundle's own.
        progress : told how many exemplars are done, of how many.

        Raises
        ------
        LibraryError
            If sources were not kept.
        LibraryCorruptError
            If a source is damaged; remove that exemplar to go on.
        LibraryWriteError, EngineRunError
        """
        self._check_writable("rebuild")
        if not self._settings.keep_sources:
            raise LibraryError(
                f"the library {self.path} did not keep its images, so they cannot be encoded "
                "anew. Make a new library and add them."
            )
        target = self.bundle if bundle is None else open_bundle(bundle)
        with self._lock:
            settings = Settings(
                **bundle_settings(target, self.memory_format),
                intensity=self._settings.intensity,
                keep_sources=True,
                shard_bytes=self._settings.shard_bytes,
            )
            if encoder is None and bundle is not None:
                encoder = self._make_encoder(target, self.intensity)
            encoder = encoder or self._own_encoder()
            writer = ShardWriter(self.path / MEMORIES, settings.layout, settings.shard_bytes)
            maintenance.encode_all(
                self._catalog, self._sources, writer, settings, encoder, progress or _no_progress
            )
            self._bundle, self._encoder = target, encoder
            self._load()
            maintenance.reclaim(self._catalog, self._sources, self.path / MEMORIES)
            self._retrieval.rebuild()

    def rebuild_index(self) -> None:
        """Build the search indexes anew."""
        self._check_writable("rebuild the index")
        with self._lock:
            self._retrieval.rebuild()

    def verify(self, progress: Progress | None = None) -> LibraryReport:
        """Compare everything stored with its digest, and report what is wrong. Reads every byte."""
        self.refresh()
        with self._lock:
            return maintenance.verify(
                self._catalog,
                self._sources,
                self._reader,
                self._retrieval,
                self._settings,
                progress or _no_progress,
            )

    # Calibration

    def store_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Store what was learnt from the exemplars as they are now (JSON values).

        Raises
        ------
        InputError
            If it is not JSON.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        self._check_writable("store a calibration")
        try:
            text = json.dumps({"digest": self.digest, "data": dict(calibration)}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a calibration must consist of finite JSON values: {error}."
            ) from error
        self._catalog.set_note("calibration", text)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """The stored calibration, or None if there is none for the exemplars as they are now."""
        text = self._catalog.note("calibration")
        stored = json.loads(text) if text else None
        return stored["data"] if stored is not None and stored["digest"] == self.digest else None

    def _see_own(self) -> None:
        """Take in what this object itself has just committed."""
        with self._catalog.database.snapshot():
            self._see(self._version)

    def _own_encoder(self) -> ExemplarEncoder:
        if self._encoder is None:
            self._encoder = self._make_encoder(self.bundle, self.intensity)
        return self._encoder

    def _check_writable(self, what: str) -> None:
        if self._writer_lock is None:
            raise LibraryWriteError(
                f"cannot {what}: the library {self.path} is open for reading. Open it with "
                "mode='write'."
            )


def _no_progress(done: int, total: int) -> None:
    """Tell nobody."""
