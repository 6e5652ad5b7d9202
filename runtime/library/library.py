"""The library as its users see it; the work lies in the modules that it calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.engines.pixels import Pixels, open_pixels
from recallseg.runtime.checks import check_image, check_tags
from recallseg.runtime.formats.images import open_image
from recallseg.runtime.library import maintenance, recalling
from recallseg.runtime.library.binding import (
    Binding,
    accept_bundle,
    bundle_settings,
    open_bundle,
)
from recallseg.runtime.library.calibration_door import CalibrationDoor
from recallseg.runtime.library.encoding import MEMORY_FORMATS, ExemplarEncoder, Origin
from recallseg.runtime.library.exemplar import (
    Exemplar,
    Match,
    Recollection,
    StoredMemory,
)
from recallseg.runtime.library.exemplar_door import ExemplarDoor
from recallseg.runtime.library.head_door import HeadDoor
from recallseg.runtime.library.identifiers_file import Identity
from recallseg.runtime.library.queries import unknown_key
from recallseg.runtime.library.records import Settings
from recallseg.runtime.library.shards import DEFAULT_SHARD_BYTES
from recallseg.runtime.library.store import Store
from recallseg.runtime.library.upkeep_door import UpkeepDoor
from recallseg.runtime.model.preprocess import Intensity

if TYPE_CHECKING:
    from recallseg.runtime.model.choice import Choice
    from recallseg.runtime.model.model import GpuOptions, Model

__all__ = ["Library"]

_PAGE = 256


class Library(ExemplarDoor, UpkeepDoor, CalibrationDoor, HeadDoor):
    """An open library. Make one with :meth:`create` or :meth:`open`; close it, or use ``with``.

    Any number of processes may read while one writes. Every method sees what others have committed.
    One object may be shared between threads.
    """

    def __init__(self, store: Store, binding: Binding) -> None:
        self._store = store
        self._binding = binding

    @cached_property
    def _pixels(self) -> Pixels:
        return open_pixels()

    @classmethod
    def create(
        cls,
        path: str | Path,
        bundle: Bundle | str | Path,
        *,
        intensity: Intensity | None = None,
        keep_sources: bool = True,
        memory_format: str = "fp16",
        encoder: ExemplarEncoder | None = None,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
        model: Model | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> Library:
        """Make an empty library in a new or empty folder, open for writing.

        Parameters
        ----------
        path : folder.
        bundle : whose encoders this library belongs to.
        intensity : rule from pixel values to 0..1, for exemplars and queries alike.
        keep_sources : store images and masks too; without them it cannot be rebuilt or calibrated.
        memory_format : ``fp16``, or ``int8`` with a scale per token: about half the bytes, rounded
            to 1/127 of the token's largest number.
        encoder : used instead of the bundle's own.
        engine, precision, threads, gpu : of the model that encodes exemplars, and that segmenters
            share unless told otherwise; opened when first needed. None for onnxruntime-cpu, fp32,
            all cores, and an engine's defaults on a GPU.
        model : an open one, instead; the library does not close it.
        shard_bytes : about how large a file of memories gets.

        Raises
        ------
        InputError
            If there is no such ``memory_format``, or ``model`` is another than asked for beside it.
        LibraryMismatchError
            If ``model`` is of another bundle.
        LibraryError
            If the folder holds something already.
        LibraryWriteError, LibraryLockedError, BundleError
        """
        if memory_format not in MEMORY_FORMATS:
            raise InputError(
                f"memory_format must be one of {', '.join(MEMORY_FORMATS)}, got {memory_format!r}."
            )
        opened = open_bundle(bundle)
        choice = _choice(engine, precision, threads, model, gpu)
        settings = Settings(
            **bundle_settings(opened, memory_format),
            intensity=(intensity or Intensity()).to_json(),
            keep_sources=keep_sources,
            shard_bytes=shard_bytes,
        )
        if model is not None:
            accept_bundle(model.bundle, settings, Path(path))
        store = Store.create(Path(path), settings)
        return cls(store, Binding(store, opened, encoder, choice, model))

    @classmethod
    def open(
        cls,
        path: str | Path,
        bundle: Bundle | str | Path | None = None,
        *,
        mode: Literal["read", "write"] = "read",
        encoder: ExemplarEncoder | None = None,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
        model: Model | None = None,
    ) -> Library:
        """Open a library.

        Parameters
        ----------
        path : folder.
        bundle : None for the one it was made with, which is looked for when it is first needed, at
            its old place and then by its name.
        mode : ``write`` to add, remove, rebuild or calibrate; one process at a time.
        encoder, engine, precision, threads, gpu, model : as for :meth:`create`.

        Raises
        ------
        LibraryNotFoundError, LibraryVersionError, LibraryCorruptError
            If there is none, a newer RecallSeg wrote it, or it is damaged.
        LibraryMismatchError
            If it was made with another bundle than ``bundle`` or ``model``.
        LibraryLockedError, LibraryWriteError
            If another process is writing, or the folder cannot be written; with ``write`` only.
        """
        choice = _choice(engine, precision, threads, model, gpu)
        store = Store.open(Path(path), mode)
        try:
            opened = None
            for given in (bundle, None if model is None else model.bundle):
                if given is not None:
                    opened = accept_bundle(open_bundle(given), store.settings, store.path)
            if store.writable:
                maintenance.reclaim(store)
        except BaseException:
            store.abandon()
            raise
        return cls(store, Binding(store, opened, encoder, choice, model))

    # Life

    def close(self) -> None:
        """Save worn search indexes, close the files, let others write. Harmless if repeated."""
        self._store.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"recallseg.Library({str(self.path)!r}, {self._store.state.exemplars} exemplars of "
            f"{', '.join(self._store.structures) or 'nothing'}, digest {self.digest[:12]})"
        )

    # What it is

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._store.path

    @property
    def replaced(self) -> bool:
        """Whether another library, or none, is found now where this one was opened.

        So it is after ``library install`` has put another release in use, or when the folder was
        moved. This object goes on with the one that it opened. Costs some microseconds.
        """
        return self._store.replaced

    @property
    def bundle(self) -> Bundle:
        """The bundle it belongs to; raises BundleError or LibraryMismatchError if it is gone."""
        return self._binding.bundle

    @property
    def bundle_identity(self) -> str:
        """Identity of the bundle that it belongs to, known without opening that."""
        return self._store.settings.identity

    @property
    def intensity(self) -> Intensity:
        """The rule from pixel values to 0..1 for exemplars and queries."""
        return Intensity.from_json(self._store.settings.intensity)

    @property
    def keeps_sources(self) -> bool:
        """Whether images and masks are stored."""
        return self._store.settings.keep_sources

    @property
    def memory_format(self) -> str:
        """How memories are stored: ``fp16``, or ``int8`` with a scale per token."""
        return self._store.settings.layout.format

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._store.writable

    @property
    def structures(self) -> tuple[str, ...]:
        """Structures that at least one exemplar shows, in order of first addition."""
        self.refresh()
        return tuple(row.name for row in self._store.structures.values() if row.present)

    @property
    def digest(self) -> str:
        """Digest over exemplars and intensity rule, as of the last call: hex.

        Equal for equal annotations under equal keys and tags, in whatever order they were added.
        """
        return self._store.digest

    @property
    def origins(self) -> tuple[tuple[Origin | None, int], ...]:
        """What made its memories, and of how many exemplars; None where that is not recorded."""
        self.refresh()
        with self._store.lock, self._store.catalog.database.snapshot():
            self._store.see_newest()
            return self._store.origins()

    def count(
        self, structure: str, *, absent: bool = False, tags: Mapping[str, str] | None = None
    ) -> int:
        """Return how many exemplars show a structure, or say that it is absent.

        Parameters
        ----------
        tags : count only exemplars that have all of these.
        """
        wanted = self.conceal(tags)
        self.refresh()
        row = self._store.structures.get(structure)
        if row is None:
            return 0
        if wanted:
            return len(self._store.catalog.numbers(row.id, not absent, wanted))
        return row.absent if absent else row.present

    def __len__(self) -> int:
        self.refresh()
        return self._store.state.exemplars

    def __contains__(self, key: object) -> bool:
        """Whether there is an exemplar with this key, in use or retired."""
        return isinstance(key, str) and self._store.catalog.number(key) is not None

    def __iter__(self) -> Iterator[Exemplar]:
        """Yield exemplars in order of addition, without retired ones.

        Changes made meanwhile may be seen or not.
        """
        catalog, after = self._store.catalog, 0
        while True:
            with catalog.database.snapshot():
                page = catalog.exemplars(after, _PAGE, retired=False)
            if not page:
                return
            yield from (exemplar for _, exemplar in page)
            after = page[-1][0]

    def __getitem__(self, key: str) -> Exemplar:
        return self.get(key)

    def get(self, key: str) -> Exemplar:
        """Return one exemplar, in use or retired, as ``library[key]`` does.

        Raises
        ------
        InputError
            If there is none.
        """
        exemplar = self._store.catalog.exemplar(key)
        if exemplar is None:
            raise unknown_key(key)
        return exemplar

    def whois(self, key: str) -> Identity:
        """Return what a key stands for: name, tags, group, as far as that was told.

        It is in a file of the library that only its owner can read, and that copies are made
        without. A key from before :meth:`anonymise` is known too.

        Raises
        ------
        InputError
            If there is no such key.
        LibraryError
            If others may read that file, or it is damaged.
        """
        return self._store.whois(key)

    def conceal(self, tags: Mapping[str, str] | None) -> dict[str, str]:
        """Return tags as the library's exemplars have them: hashed where they identify somebody.

        Raises
        ------
        InputError
            For unusable tags, or one that identifies where the library cannot know it.
        """
        return self._store.identifiers.conceal(check_tags(tags))

    def source(self, key: str) -> tuple[NDArray[Any], dict[str, NDArray[np.bool_]]]:
        """Return image and masks as they were added.

        Raises
        ------
        InputError
            If there is no such key, or sources were not kept.
        LibraryCorruptError
            If the stored file is missing or damaged.
        """
        store = self._store
        number = store.number(key)
        digest = store.catalog.source_digest(number)
        if digest is None:
            store.number(key)
            raise InputError(f"the library {self.path} did not keep the image of exemplar '{key}'.")
        try:
            return store.sources.read(number, digest, key, store.catalog.names_in_source(number))
        except LibraryCorruptError:
            if store.number(key) != number:  # another process replaced it meanwhile, or removed it
                return self.source(key)
            raise

    def embeddings(
        self, structure: str, *, absent: bool = False
    ) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Return keys and embeddings (N x D, unit length) of the exemplars that show a structure.

        ``absent`` asks for those instead that say it is absent.
        """
        self.refresh()
        row, catalog = self._store.structure(structure), self._store.catalog
        with catalog.database.snapshot():
            numbers, vectors = catalog.embeddings(row.id, not absent)
            return tuple(catalog.keys(numbers.tolist())), vectors

    def model(
        self,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
    ) -> Model:
        """Return a model of the library's bundle: one that is open like this, or a new one.

        It stays open for as long as anything uses it: this library to add, a segmenter, you.

        Parameters
        ----------
        engine, precision, threads, gpu : see :meth:`recallseg.Model.open`; None for what the
            library was opened with.

        Raises
        ------
        InputError, EngineUnavailableError, BundleError, LibraryMismatchError
        """
        return self._binding.model(self._binding.choice.but(engine, precision, threads, gpu))

    def accept(
        self,
        model: Model,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        gpu: GpuOptions | None = None,
    ) -> None:
        """Raise unless ``model`` is of the library's bundle, and what is asked for beside it.

        Raises
        ------
        LibraryMismatchError, InputError
        """
        _choice(engine, precision, threads, model, gpu)
        self._binding.accept(model.bundle)

    def embed(self, image: Any) -> NDArray[np.float32]:
        """Return the embedding (D, unit length) that an image would be stored with.

        ``image`` is what :meth:`add` takes.

        Raises
        ------
        InputError
            For an unusable image.
        EngineRunError
            If the encoder fails.
        """
        return self._binding.encoder().embed(check_image(open_image(image)))

    # Recall

    def refresh(self) -> bool:
        """See what other processes have committed; return whether there was anything.

        Every method does so by itself. Costs some ten microseconds when there is nothing new.

        Raises
        ------
        LibraryMismatchError
            If it has been rebuilt for another bundle since it was opened.
        """
        return self._store.refresh()

    def search(
        self,
        embedding: NDArray[np.float32],
        structure: str,
        k: int,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> list[Match]:
        """Return the k nearest exemplars that show a structure, nearest first; all if fewer do.

        Between them stand, with ``absent`` set, exemplars that say the structure is absent and are
        nearer than the last of these: at most as many. Where none shows it, the k nearest of those
        that lack it are all there is.

        Parameters
        ----------
        embedding : D float, of any length but 0.
        structure : as it was named when added.
        k : at least 1.
        tags : only exemplars that have all of these.

        Raises
        ------
        InputError
            For an unknown structure, a k that is no whole number from 1, or an unusable embedding.
        """
        wanted = self.conceal(tags)
        found = recalling.recall(self._store, embedding, (structure,), k, wanted, hold=False).found
        return [*found[structure].matches]

    def recall(
        self,
        embedding: NDArray[np.float32],
        structures: Sequence[str],
        k: int,
        *,
        tags: Mapping[str, str] | None = None,
        without: Collection[str] = (),
    ) -> Recollection:
        """Return what :meth:`search` finds for each structure, with memories, of one state.

        Whatever other processes remove, compact or encode anew after this call, what it returned
        can be gathered.

        Parameters
        ----------
        embedding, k, tags : as for :meth:`search`.
        structures : as they were named when added.
        without : keys of exemplars that are passed over.

        Raises
        ------
        InputError
            As :meth:`search`.
        LibraryCorruptError
            If a shard is missing or cut off.
        """
        return recalling.recall(self._store, embedding, structures, k, self.conceal(tags), without)

    def memories(self, keys: Sequence[str], structure: str) -> list[StoredMemory]:
        """Return the memories of a structure of these exemplars.

        Raises
        ------
        InputError
            For a key or structure without a memory.
        LibraryCorruptError
            If a shard is missing or cut off.
        """
        return recalling.memories(self._store, keys, structure)

    def gather(
        self,
        memories: Sequence[StoredMemory],
        memories_out: NDArray[Any],
        pointers_out: NDArray[np.float32],
    ) -> None:
        """Copy memories of exemplars, from memory-mapped files, into the caller's buffers.

        Parameters
        ----------
        memories : k of them, as :meth:`recall` or :meth:`memories` gave them.
        memories_out : k x T x memory_dim, float32 or float16, C-contiguous.
        pointers_out : k x C float32.

        Raises
        ------
        InputError
            For buffers of another shape or dtype.
        LibraryCorruptError
            If a memory is not what was stored, or its file was cut short.
        """
        recalling.gather(self._store, self._pixels, memories, memories_out, pointers_out)


def _choice(
    engine: str | None,
    precision: str | None,
    threads: int | None,
    model: Model | None,
    gpu: GpuOptions | None = None,
) -> Choice:
    """Return what the library's model is opened with; InputError if ``model`` is another."""
    from recallseg.runtime.model.choice import Choice

    if model is None:
        return Choice().but(engine, precision, threads, gpu)
    choice = Choice.of(model)
    choice.but(engine, precision, threads, gpu).require(model)
    return choice
