"""The libraries and segmenters that rules ask, opened when first needed and kept up to date.

Between two questions a library may have been added to, fitted anew, rebuilt for another bundle,
replaced by another folder (as ``library install`` does), or taken away. All of that is seen when
the next question is asked: what changed is opened again, and what is gone is a LibraryNotFoundError
until it is back. A question that is under way keeps what it was asked of.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from recallseg.engines.errors import (
    InputError,
    LibraryError,
    LibraryMismatchError,
    RecallSegError,
)
from recallseg.runtime.library import Library
from recallseg.runtime.model.choice import Choice
from recallseg.runtime.model.model import Model
from recallseg.runtime.segmenting.current import Current
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.rules import Rule

__all__ = ["Questions", "check_rule"]


@dataclass
class _Open:
    library: Library
    current: Current
    users: int = 0
    left: bool = False  # for another one: closed as soon as nobody uses it

    def close_unused(self) -> None:
        if self.left and not self.users:
            with suppress(LibraryError):  # it may be gone
                self.library.close()


class Questions:
    """Segmenters of rules. Rules of one bundle, engine and precision share a model.

    May be shared between threads; queries take turns on their model.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[str, _Open] = {}
        self._models: list[Model] = []

    @contextmanager
    def ask(self, rule: Rule) -> Iterator[Segmenter]:
        """Yield the segmenter of a rule, as its library is now; it stays that in the block.

        Raises
        ------
        LibraryNotFoundError
            If the library is gone; ask again when it is back.
        LibraryError, BundleError, EngineError, InputError
            As :class:`recallseg.Segmenter` says.
        """
        with self._lock:
            held, segmenter = self._current(rule)
            held.users += 1
        try:
            yield segmenter
        finally:
            with self._lock:
                held.users -= 1
                held.close_unused()

    def _current(self, rule: Rule) -> tuple[_Open, Segmenter]:
        with self._lock:
            known = self._open.get(rule.name)
            if known is not None and not known.library.replaced:
                try:
                    return known, known.current.get()
                except LibraryMismatchError:
                    pass  # rebuilt for another bundle
            self.forget(rule)
            library = Library.open(rule.library)
            current = Current(library, partial(self._make, rule, library))
            try:
                made = current.get()
            except BaseException:
                library.close()
                raise
            self._open[rule.name] = opened = _Open(library, current)
            return opened, made

    def warm_up(self, rules: Iterable[Rule]) -> dict[str, RecallSegError]:
        """Open what rules ask and let each answer once; return what failed, by rule."""
        failed = {}
        for rule in rules:
            try:
                with self.ask(rule) as segmenter:
                    segmenter.warm_up(1)
            except RecallSegError as error:
                failed[rule.name] = error
        return failed

    def forget(self, rule: Rule) -> None:
        """Let the next question open what a rule asks anew."""
        with self._lock:
            known = self._open.pop(rule.name, None)
            if known is not None:
                known.left = True
                known.close_unused()

    def close(self) -> None:
        """Close everything. Harmless if repeated."""
        with self._lock:
            for known in self._open.values():
                with suppress(LibraryError):
                    known.library.close()
            self._open.clear()
            for model in self._models:
                model.close()
            self._models.clear()

    def _make(self, rule: Rule, library: Library) -> Segmenter:
        recipe = rule.recipe
        choice = Choice(recipe.engine, recipe.precision, recipe.threads)
        model = next(
            (
                each
                for each in self._models
                if choice.serves(each) and each.bundle.known_as(library.bundle_identity)
            ),
            None,
        )
        if model is None:
            model = choice.open(library.bundle)
            self._models.append(model)
        return Segmenter(
            library,
            k=recipe.k,
            reach=recipe.reach,
            tags=recipe.tags,
            structures=rule.structures,
            frames=rule.volumes.propagate,
            model=model,
        )


def check_rule(rule: Rule) -> str:
    """Return what keeps a rule from being asked, without opening a model; empty if nothing does."""
    try:
        rule.volumes.settings()
        Choice().but(rule.recipe.engine, rule.recipe.precision, rule.recipe.threads)
        with Library.open(rule.library) as library:
            known = library.structures
            if not known:
                raise InputError(f"the library {rule.library} is empty.")
            unknown = [name for name in rule.structures or () if name not in known]
            if unknown:
                raise InputError(
                    f"the library {rule.library} has no exemplar of '{unknown[0]}'; it knows "
                    f"{', '.join(known)}."
                )
            most = library.bundle.geometry.max_k
            if rule.recipe.k + rule.volumes.propagate > most:
                raise InputError(f"k and propagate may be {most} together, no more.")
    except RecallSegError as error:
        return f"rule '{rule.name}': {error}"
    return ""
