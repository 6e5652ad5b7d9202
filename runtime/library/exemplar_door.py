"""The library's door to its exemplars: added, corrected, tagged, removed; see `changing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recallseg.runtime.library import changing
from recallseg.runtime.library.binding import Binding
from recallseg.runtime.library.encoding import ExemplarEncoder
from recallseg.runtime.library.store import Store

__all__ = ["ExemplarDoor"]

Progress = Callable[[int, int], None]


class ExemplarDoor:
    """The part of :class:`recallseg.Library` that adds exemplars and changes them."""

    _store: Store
    _binding: Binding

    def add(
        self,
        image: Any,
        masks: Mapping[str, Any],
        *,
        absent: tuple[str, ...] = (),
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
        name: str | None = None,
        group: str | None = None,
        encoder: ExemplarEncoder | None = None,
    ) -> str:
        """Add an annotated image and return its key. It is stored in full or not at all.

        Parameters
        ----------
        image : HxW grey or HxWx3 RGB, integer or floating: a path, a numpy array, a PIL image, or
            what offers DLPack on the CPU, e.g. a PyTorch tensor.
        masks : structure -> mask HxW, boolean or of 0 and 1, not empty; no path, since the numbers
            of a mask file have to be given a meaning, see :func:`recallseg.import_exemplars`.
        absent : structures that the image is known not to show.
        tags : e.g. ``{"modality": "MR"}``, for filtered search. Values that identify somebody are
            hashed, see :func:`recallseg.runtime.library.identifying.identifies`.
        key : of the exemplar. It stands in records of other patients, so it is random unless given;
            then the same image with the same masks is refused if it is there already.
        name : where it comes from, e.g. its file: only :meth:`whois` tells.
        group : what it shares with others, e.g. patient, series or volume: when a head is fitted,
            all of a group are left out together. Stored as a keyed hash; only :meth:`whois` tells.
            None: it stands by itself.
        encoder : used instead of the library's own, for this exemplar.

        Raises
        ------
        InputError
            For unusable images, masks, names or tags, or a key that is there already.
        LibraryWriteError
            If the library is open for reading only, or the disk is full; nothing stored is lost.
        EngineRunError
            If the encoder fails or gives wrong tensors.
        """
        given = encoder
        make = self._binding.encoder if given is None else lambda: given
        item = changing.Addition(
            image=image, masks=masks, absent=absent, tags=tags, key=key, name=name, group=group
        )
        return changing.add(self._store, make, item)

    def add_many(
        self,
        items: Iterable[changing.Addition],
        *,
        details: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Add annotated images in one commit, and return their keys: all are added, or none.

        All are looked at before the first is encoded: files are read, checked and let go, and read
        again when their turn comes, so that a list of paths needs the memory of the few images that
        are worked on. On a CPU up to four are encoded at once, with a share of the threads each.
        Until the commit at the end nobody sees any of them, also if the process dies.

        Parameters
        ----------
        items : for each a mapping with the parts that :meth:`add` takes, by its names.
        details : what the history shall say of it beside, names and short texts as of tags; nothing
            that identifies anybody.
        progress : is told how many are encoded and written, of how many; that all are when they are
            there.

        Raises
        ------
        InputError
            As :meth:`add`, with the position in the list, counted from 0; also for a key that two
            of them have.
        LibraryWriteError, EngineRunError
            As :meth:`add`; nothing was added.

        Examples
        --------
        >>> pictures = [np.full((64, 64), 50, np.uint8) for _ in range(3)]
        >>> for i, picture in enumerate(pictures):
        ...     picture[16 * i : 16 * i + 16] = 250
        >>> with Library.create("many", "demo") as library:
        ...     items = [
        ...         {"image": picture, "masks": {"bar": picture > 200}, "key": f"bar {i}"}
        ...         for i, picture in enumerate(pictures)
        ...     ]
        ...     print(library.add_many(items))
        ['bar 0', 'bar 1', 'bar 2']
        """
        return changing.add_many(self._store, self._binding.encoder, items, details, progress)

    def remove(self, key: str) -> None:
        """Erase an exemplar for good; the space of its memories is freed by :meth:`compact`.

        To take one out of use and keep it, :meth:`retire` it.

        Raises
        ------
        InputError
            If there is no such key.
        LibraryWriteError
            If the library is open for reading only or cannot be written.
        """
        changing.remove(self._store, key)

    def replace_mask(self, key: str, structure: str, mask: Any) -> None:
        """Give an exemplar another mask of a structure that it shows; in full or not at all.

        It is encoded anew from its stored image. Key, tags and the other masks stay; it counts as
        the newest exemplar from then on, and no calibration was made with it.

        Parameters
        ----------
        mask : HxW, as for :meth:`add`.

        Raises
        ------
        InputError
            If there is no such key, it has no mask of that structure, its image was not kept, or
            for an unusable mask.
        LibraryCorruptError
            If its stored image is damaged.
        LibraryWriteError, EngineRunError
            As :meth:`add`.
        """
        changing.replace_mask(self._store, self._binding.encoder, key, structure, mask)

    def retag(self, key: str, tags: Mapping[str, str] | None) -> None:
        """Give an exemplar other tags, instead of those that it has; in full or not at all.

        The library's digest changes with them; embedding and memories do not.

        Parameters
        ----------
        tags : as for :meth:`add`; None for none.

        Raises
        ------
        InputError
            If there is no such key, or for unusable tags.
        LibraryWriteError
            If the library is open for reading only or cannot be written.

        Examples
        --------
        >>> with Library.create("cases", "demo") as library:
        ...     image = np.zeros((64, 64), np.uint8)
        ...     image[16:48, 16:48] = 255
        ...     _ = library.add(image, {"square": image > 0}, key="a", tags={"view": "axial"})
        ...     library.retag("a", {**library["a"].tags, "scanner": "3 T"})
        ...     print(library["a"].tags)
        {'scanner': '3 T', 'view': 'axial'}
        """
        changing.retag(self._store, key, tags)
