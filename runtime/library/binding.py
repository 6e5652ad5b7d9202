"""How a library is tied to its bundle: what it records of it, how it finds it, which model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError, LibraryCorruptError, LibraryMismatchError
from recallseg.engines.paths import SHIPPED, shipped_bundles
from recallseg.runtime.library.encoding import Encoded, ExemplarEncoder, MemoryLayout
from recallseg.runtime.library.own import known_bundles, remember_bundle
from recallseg.runtime.library.records import Settings
from recallseg.runtime.library.store import Store
from recallseg.runtime.model.preprocess import Intensity

if TYPE_CHECKING:  # readers need no engine, and importing what runs one takes its time
    from recallseg.runtime.model.choice import Choice
    from recallseg.runtime.model.model import Model

__all__ = ["Binding", "accept_bundle", "bundle_settings", "lanes_of", "open_bundle"]


class Binding:
    """The bundle that a library belongs to and the models that run it, opened when first needed.

    Parameters
    ----------
    store : the library.
    bundle : None for the one that made the library, to be looked for.
    encoder : used instead of the bundle's own.
    choice : of the model that exemplars are encoded with.
    model : that model, if it is open already.
    """

    def __init__(
        self,
        store: Store,
        bundle: Bundle | None,
        encoder: ExemplarEncoder | None,
        choice: Choice,
        model: Model | None = None,
    ) -> None:
        self._store = store
        self._bundle = bundle
        self._encoder = encoder
        self.choice = choice
        self._given = model
        self._models: WeakSet[Model] = WeakSet(() if model is None else (model,))
        self._opening = Lock()

    @property
    def bundle(self) -> Bundle:
        """The bundle; raises BundleError or LibraryMismatchError if it is gone."""
        if self._bundle is None:
            self._bundle = _find_bundle(self._store.settings, self._store.path)
        return self._bundle

    def model(self, choice: Choice) -> Model:
        """Return the model that is open with this choice, or open it."""
        with self._opening:
            for model in self._models:
                if choice.serves(model):
                    return model
            model = choice.open(self.bundle)
            self._models.add(model)
            return model

    def accept(self, bundle: Bundle) -> None:
        """Take ``bundle`` for the one that is looked for; LibraryMismatchError if it is not."""
        accept_bundle(bundle, self._store.settings, self._store.path)
        self._bundle = self._bundle or bundle

    def encoder(self) -> ExemplarEncoder:
        """Return the encoder; the model that it takes stays open for as long as the library."""
        found = self._encoder
        closed = isinstance(found, _ModelEncoder) and found.model.closed
        if found is None or (closed and self._given is None):
            model = self.model(self.choice) if self._given is None else self._given
            found = self._encoder = _ModelEncoder(model, self._intensity)
        return found

    def make_encoder(self, bundle: Bundle) -> ExemplarEncoder:
        """Return an encoder of another bundle for the library's intensity rule."""
        return _ModelEncoder(self.choice.open(bundle), self._intensity)

    def change(self, bundle: Bundle, encoder: ExemplarEncoder) -> None:
        """Belong to another bundle, for which the library has been encoded anew."""
        if bundle is not self._bundle:
            self._given = None
            self._models.clear()
        if isinstance(encoder, _ModelEncoder):
            self._models.add(encoder.model)
        self._bundle, self._encoder = bundle, encoder

    @property
    def _intensity(self) -> Intensity:
        return Intensity.from_json(self._store.settings.intensity)


@dataclass(frozen=True)
class _ModelEncoder:
    """A model as a library's encoder."""

    model: Model
    intensity: Intensity

    def encode(self, image: NDArray[Any], masks: Mapping[str, NDArray[np.bool_]]) -> Encoded:
        return self.model.memorize(image, masks, self.intensity)

    def embed(self, image: NDArray[Any]) -> NDArray[np.float32]:
        return self.model.embed(image, self.intensity)


@contextmanager
def lanes_of(encoder: ExemplarEncoder, images: int) -> Iterator[list[ExemplarEncoder]]:
    """Lend encoders that make of an image what ``encoder`` does, and may work at the same time.

    Itself alone, unless its model has lanes for so many images, see :meth:`Model.lanes`.
    """
    if not isinstance(encoder, _ModelEncoder):
        yield [encoder]
        return
    models = encoder.model.lanes(images)
    try:
        yield [replace(encoder, model=model) for model in models]
    finally:
        for model in models:
            if model is not encoder.model:
                model.close()


def open_bundle(bundle: Bundle | str | Path) -> Bundle:
    """Open a folder or a shipped bundle by name; an open bundle is returned as it is."""
    return Bundle.open(bundle) if isinstance(bundle, (str, Path)) else bundle


def bundle_settings(bundle: Bundle, memory_format: str) -> dict[str, Any]:
    """Return those fields of :class:`Settings` that come from the bundle, and note its place."""
    remember_bundle(bundle.identity, Path(bundle.path))
    return {
        "identity": bundle.identity,
        "bundle_name": bundle.name,
        "bundle_path": str(Path(bundle.path).absolute()),
        "embedding_dim": bundle.geometry.embedding_dim,
        "layout": MemoryLayout.of(bundle.geometry, memory_format),
    }


def _find_bundle(settings: Settings, library: Path) -> Bundle:
    """Open the bundle that made the library: a shipped one, or where this user had it.

    The place in the catalog is what the sender says, so it is told and not opened.
    """
    places = known_bundles(settings.identity)
    if settings.bundle_name in shipped_bundles():
        places.append(str(SHIPPED / settings.bundle_name))
    for place in places:
        try:
            return accept_bundle(Bundle.open(place), settings, library)
        except (BundleError, LibraryMismatchError):
            continue  # moved, or another one lies there now
    raise BundleError(
        f"the library {library} was made with bundle '{settings.bundle_name}' (identity "
        f"{settings.identity[:12]}), which is not where this user had it, if ever; the library "
        f"says that it lay in {settings.bundle_path!r}. Name it once: 'recallseg verify FOLDER', "
        "or Library.open(..., bundle=FOLDER)."
    )


def accept_bundle(bundle: Bundle, settings: Settings, library: Path) -> Bundle:
    """Return ``bundle`` if it, under whichever identity, made the library.

    Raises
    ------
    LibraryMismatchError
        If other weights or settings made it.
    """
    if not bundle.known_as(settings.identity):
        mend = (
            "or encode its images anew with 'recallseg library rebuild'"
            if settings.keep_sources
            else "or make a new library: this one did not keep its images"
        )
        raise LibraryMismatchError(
            f"the library {library} was made with bundle '{settings.bundle_name}' (identity "
            f"{settings.identity[:12]}), not with '{bundle.name}' ({bundle.identity[:12]}). Open "
            f"it with the former, {mend}. If the weights are the same, export them again with "
            "this RecallSeg: the bundle then knows its earlier identities."
        )
    if (settings.embedding_dim, settings.layout) != (
        bundle.geometry.embedding_dim,
        MemoryLayout.of(bundle.geometry, settings.layout.format),
    ):
        raise LibraryCorruptError(
            f"the library {library} states other sizes than bundle '{bundle.name}', which made it: "
            f"embeddings of {settings.embedding_dim} numbers, memories {settings.layout}. Restore "
            "it from a backup, or ask for it anew from who made it."
        )
    remember_bundle(settings.identity, Path(bundle.path))
    return bundle
