"""How a library is tied to its bundle: what it records of it, how it finds it, who encodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError, LibraryCorruptError, LibraryMismatchError
from recallseg.engines.paths import SHIPPED, shipped_bundles
from recallseg.runtime.library.encoding import ExemplarEncoder, MemoryLayout
from recallseg.runtime.library.own import known_bundles, remember_bundle
from recallseg.runtime.library.records import Settings
from recallseg.runtime.library.store import Store
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["Binding", "accept_bundle", "bundle_settings", "encoder_maker", "open_bundle"]

EncoderMaker = Callable[[Bundle, Intensity], ExemplarEncoder]


class Binding:
    """The bundle that a library belongs to and its encoder, each opened when first needed.

    Parameters
    ----------
    store : the library.
    bundle : None for the one that made the library, to be looked for.
    encoder : used instead of the bundle's own.
    make : makes a bundle's own encoder.
    """

    def __init__(
        self,
        store: Store,
        bundle: Bundle | None,
        encoder: ExemplarEncoder | None,
        make: EncoderMaker,
    ) -> None:
        self._store = store
        self._bundle = bundle
        self._encoder = encoder
        self._make = make

    @property
    def bundle(self) -> Bundle:
        """The bundle; raises BundleError or LibraryMismatchError if it is gone."""
        if self._bundle is None:
            self._bundle = _find_bundle(self._store.settings, self._store.path)
        return self._bundle

    def encoder(self) -> ExemplarEncoder:
        """Return the encoder, made if it has to be; call with the store's lock held."""
        if self._encoder is None:
            self._encoder = self.make_encoder(self.bundle)
        return self._encoder

    def make_encoder(self, bundle: Bundle) -> ExemplarEncoder:
        """Return ``bundle``'s own encoder for the library's intensity rule."""
        return self._make(bundle, Intensity.from_json(self._store.settings.intensity))

    def change(self, bundle: Bundle, encoder: ExemplarEncoder) -> None:
        """Belong to another bundle, for which the library has been encoded anew."""
        self._bundle, self._encoder = bundle, encoder


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


def encoder_maker(engine: str, precision: str, threads: int | None) -> EncoderMaker:
    """Return what makes a bundle's own encoder when it is first needed."""

    def make(bundle: Bundle, intensity: Intensity) -> ExemplarEncoder:
        # Readers need no engine, and loading one takes a second.
        from recallseg.runtime.model.encoder import BundleEncoder

        return BundleEncoder(bundle, intensity, engine=engine, precision=precision, threads=threads)

    return make


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
