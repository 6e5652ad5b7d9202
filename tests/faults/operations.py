"""What is done while faults are injected, and what must hold of its folder afterwards.

Each operation works below one folder: ``prepare`` makes what it starts from, ``run`` does it,
``state`` reads what is there, checks it against its digests, and raises if anything is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from support.fake_bundle import make_fake_bundle
from support.fake_library import HashEncoder, StubBundle, draw, embedding
from support.pictures import LABELS, disc, write_pairs

from faults.model_operations import MODEL_OPERATIONS
from faults.node_operations import NODE_OPERATIONS
from faults.operation import Operation, command, names
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import LibraryNotFoundError
from recallseg.engines.signing import SigningKey, create_key
from recallseg.runtime.library import Library
from recallseg.runtime.library.installing import install, installed
from recallseg.runtime.library.releases import read_release
from recallseg.runtime.library.reverting import revert

__all__ = ["LIFE", "OPERATIONS", "library_state"]


def _exemplar(number: int) -> dict[str, Any]:
    image, mask = draw(number)
    masks = {"nucleus": mask, "wall": ~mask} if number % 2 else {"nucleus": mask}
    return {"image": image, "masks": masks, "tags": {"n": str(number)}, "key": f"case {number}"}


def _library(root: Path, exemplars: int = 4) -> None:
    with Library.create(root / "library", StubBundle(), encoder=HashEncoder()) as library:
        for number in range(exemplars):
            library.add(**_exemplar(number))


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[Library]:
    with Library.open(root / "library", mode="write", encoder=HashEncoder()) as library:
        yield library


def library_state(root: Path) -> Any:
    """Everything that the library below a folder holds, read anew; None where there is none."""
    return _state_of(root / "library")


def _state_of(folder: Path) -> Any:
    try:
        opened = Library.open(folder, encoder=HashEncoder())
    except LibraryNotFoundError:
        return None
    with opened as library:
        # What an operation that failed has left is deleted by the next one; names() looks then.
        problems = [one for one in library.verify().problems if "is deleted when" not in one]
        if problems:
            raise AssertionError(f"verify found: {problems}")
        found = {}
        for one in library:
            image, masks = library.source(one.key)
            parts = [np.asarray(image).tobytes(), *(masks[name].tobytes() for name in masks)]
            for name in one.structures:
                (memory,) = library.memories([one.key], name)
                parts.append(memory.digest)
            digest = hashlib.sha256(b"".join(parts)).hexdigest()
            found[one.key] = (one.structures, one.absent, tuple(sorted(one.tags.items())), digest)
        asked = embedding(0)
        for name in library.structures:
            hits = {hit.key for hit in library.search(asked, name, k=100) if not hit.absent}
            there = {key for key, value in found.items() if name in value[0]}
            if hits != there:
                raise AssertionError(f"search finds {sorted(hits)}, there are {sorted(there)}")
    return found


def _on_library(
    name: str,
    act: Callable[[Library], Any],
    prepare: Callable[[Path], None] | None = None,
) -> Operation:
    def run(root: Path) -> None:
        with _writing(root) as library:
            act(library)

    return Operation(f"library.{name}", prepare or _library, run, library_state)


def _replace(library: Library) -> None:
    library.replace_mask("case 1", "wall", draw(77)[1])


def _create(root: Path) -> None:
    Library.create(root / "library", StubBundle(), encoder=HashEncoder()).close()


def _remove_and_compact(library: Library) -> None:
    if "case 1" in library:
        library.remove("case 1")
    library.compact()


def _retire_all_but_one(library: Library) -> None:
    library.retire([key for key in ("case 1", "case 2") if key in library])


def _with_retired(root: Path) -> None:
    _library(root)
    with _writing(root) as library:
        library.retire(["case 1", "case 2"])


def _reinstate(library: Library) -> None:
    library.reinstate([one.key for one in library.retired])


def _rename(library: Library) -> None:
    library.rename_structure("wall", "membrane")


def _with_later_changes(root: Path) -> None:
    """One retired, one back in use and two more after the third change."""
    _library(root)
    with _writing(root) as library:
        library.retire("case 3")
        library.add(**_exemplar(7))
        library.reinstate("case 3")
        library.retire("case 1")
        library.add(**_exemplar(8))


def _revert(library: Library) -> None:
    revert(library, [change.revision for change in library.history()][3])


def _two_libraries(root: Path) -> None:
    _library(root)
    with Library.create(root / "other", StubBundle(), encoder=HashEncoder()) as library:
        for number in (2, 7, 8):
            library.add(**_exemplar(number))


def _merge(root: Path) -> None:
    with (
        _writing(root) as library,
        Library.open(root / "other", encoder=HashEncoder()) as other,
    ):
        library.merge(other)


def _backed_up(root: Path) -> None:
    _library(root)
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        library.backup(root / "copy")
    with _writing(root) as library:
        library.remove("case 1")


def _copy(root: Path) -> None:
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        library.backup(root / "copy")


def _copied(root: Path) -> Any:
    there = (root / "copy").exists()
    moved = Path("copy") if there else Path("library")
    return there, _state_of(root / moved), library_state(root)


def _restore(root: Path) -> None:
    Library.restore(root / "copy", root / "library", over_newer=True)


def _with_signed(root: Path) -> None:
    _library(root)
    create_key(root / "key")
    KEYS["private"] = SigningKey.read(root / "key")


KEYS: dict[str, Any] = {}
"""Read before faults are injected: a key that cannot be read is a fault of the input."""


def _release(root: Path) -> None:
    key = KEYS["private"]
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        library.release(root / "a.release", version="1.0.0", key=key, images=True)


def _released(root: Path) -> Any:
    if not (root / "a.release").exists():
        return None
    return read_release(root / "a.release", [KEYS["private"].public]).library


def _with_release(root: Path) -> None:
    _with_signed(root)
    _release(root)


def _install(root: Path) -> None:
    install(root / "a.release", root / "site", [KEYS["private"].public])


def _installed(root: Path) -> Any:
    used = installed(root / "site") if (root / "site").exists() else None
    return None if used is None else (used.library, _state_of(root / "site" / "current"))


def _read(root: Path) -> None:
    """Everything that only reads."""
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        for one in library:
            library.source(one.key)
        library.search(embedding(0), "nucleus", k=3)
        library.recall(embedding(0), ["nucleus"], 2)
        library.verify()


def _with_bundle(root: Path) -> None:
    make_fake_bundle(root / "bundle")
    write_pairs(root / "annotated", [0.2, 0.5, 0.8])
    command("library", "create", "{root}/library", "--bundle", "{root}/bundle")(root)


_IMPORT = command(
    *("library", "import", "{root}/library", "{root}/annotated"),
    *("--labels", LABELS, "--engine", "fake"),
)


def _with_library(root: Path) -> None:
    _with_bundle(root)
    _IMPORT(root)
    write_pairs(root / "held-out", [0.35, 0.65])
    for folder in ("new", "audit"):
        (root / folder).mkdir()
    for number in range(2):
        cv2.imwrite(str(root / "new" / f"q{number}.png"), disc(0.35 + 0.1 * number).image)


def _files_state(*folders: str) -> Callable[[Path], Any]:
    """The names in folders of outputs; pictures must be whole."""

    def state(root: Path) -> Any:
        found = {}
        for folder in folders:
            for path in sorted((root / folder).rglob("*")) if (root / folder).exists() else []:
                if path.suffix == ".png" and cv2.imread(str(path)) is None:
                    raise AssertionError(f"{path.name} is not a whole picture")
                if path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                if not path.name.endswith(".lock"):
                    found[str(path.relative_to(root))] = path.is_dir() or path.stat().st_size > 0
        return found

    return state


def _command_library_state(root: Path) -> Any:
    with Library.open(root / "library", root / "bundle") as library:
        report = library.verify()
        if not report.ok:
            raise AssertionError(f"verify found: {report}")
        calibrated = len(library.calibrations)
        return sorted((one.content, one.structures) for one in library), calibrated


def _some_exemplars(state: Any, after: Any) -> bool:
    return set(state[0]) <= set(after[0])


def _some_results(state: Any, after: Any) -> bool:
    """Whether no result lacks its record or its mask."""
    masks = {name.removesuffix(".mask.png") for name in state if name.endswith(".mask.png")}
    records = {name.removesuffix(".json") for name in state if name.endswith(".json")}
    return set(state) <= set(after) and records <= masks


_SEGMENT = command(
    *("segment", "{root}/library", "{root}/new/q0.png", "{root}/new/q1.png"),
    *("--output", "{root}/out", "--engine", "fake", "--resume"),
)

_AUDIT = ("--audit", "{root}/audit/log.jsonl")
_WATCH = command(
    *("watch", "{root}/new", "--library", "{root}/library", "--output", "{root}/out"),
    *("--once", "--settle", "0", "--engine", "fake", *_AUDIT),
)
_EVALUATE = command(
    *("evaluate", "{root}/library", "{root}/held-out", "--output", "{root}/report"),
    *("--labels", LABELS, "--engine", "fake"),
)


def _with_log(root: Path) -> None:
    _with_library(root)
    _WATCH(root)


def _logged(root: Path) -> Any:
    """Whether a log that can be followed to its end was put aside."""
    command("audit", "verify", "{root}/audit/log.jsonl")(root)
    return len(list((root / "audit").glob("log.jsonl.*"))) > 0


def _rotate_once(root: Path) -> None:
    if not _logged(root):
        command("audit", "rotate", "{root}/audit/log.jsonl")(root)


def _with_key(root: Path) -> None:
    make_fake_bundle(root / "bundle")
    command("sign", "key", "{root}/key")(root)


OPERATIONS = {
    one.name: one
    for one in (
        Operation("library.create", lambda root: None, _create, library_state),
        _on_library("add", lambda library: library.add(**_exemplar(7))),
        _on_library("add_many", lambda library: library.add_many(map(_exemplar, (7, 8, 9)))),
        _on_library("remove", lambda library: library.remove("case 1")),
        _on_library("replace_mask", _replace),
        _on_library("retag", lambda library: library.retag("case 2", {"view": "axial"})),
        _on_library(
            "rebuild", lambda library: library.rebuild(StubBundle(), encoder=HashEncoder())
        ),
        _on_library("rebuild_index", lambda library: library.rebuild_index()),
        _on_library("compact", _remove_and_compact),
        _on_library("retire", _retire_all_but_one),
        _on_library("rename", _rename),
        _on_library("reinstate", _reinstate, prepare=_with_retired),
        _on_library("revert", _revert, prepare=_with_later_changes),
        Operation("library.merge", _two_libraries, _merge, library_state),
        Operation("library.backup", _library, _copy, _copied),
        Operation("library.restore", _backed_up, _restore, library_state),
        Operation("library.release", _with_signed, _release, _released),
        Operation("library.install", _with_release, _install, _installed),
        Operation("library.read", _library, _read, library_state),
        Operation("import", _with_bundle, _IMPORT, _command_library_state, _some_exemplars),
        Operation(
            "calibrate",
            _with_library,
            command("library", "calibrate", "{root}/library", "--engine", "fake"),
            _command_library_state,
        ),
        Operation("watch", _with_library, _WATCH, _files_state("out"), _some_results),
        Operation("evaluate", _with_library, _EVALUATE, _files_state("report"), _some_results),
        Operation(
            "audit.rotate",
            _with_log,
            _rotate_once,
            _logged,
        ),
        Operation(
            "sign.key",
            lambda root: None,
            command("sign", "key", "{root}/key"),
            lambda root: len(names(root)),
        ),
        Operation(
            "audit.key",
            lambda root: None,
            command("audit", "key", "{root}/key"),
            lambda root: len(names(root)),
        ),
        Operation(
            "sign.bundle",
            _with_key,
            command("sign", "bundle", "{root}/bundle", "--key", "{root}/key"),
            lambda root: (Bundle.open(root / "bundle").identity, len(names(root))),
        ),
        Operation("segment", _with_library, _SEGMENT, _files_state("out"), _some_results),
        *MODEL_OPERATIONS,
        *NODE_OPERATIONS,
    )
}


def _adding(number: int) -> Callable[[Path], None]:
    return _on_library("", lambda library: library.add(**_exemplar(number))).run


LIFE: list[Callable[[Path], Any]] = [
    _create,
    *(_adding(number) for number in range(4)),
    *(
        OPERATIONS[f"library.{name}"].run
        for name in ("add_many", "replace_mask", "retag", "remove", "compact", "rebuild")
    ),
    _on_library("", lambda library: library.remove("case 8")).run,
    OPERATIONS["library.rebuild_index"].run,
]
"""A library's life, step by step, for those who cut the power in it."""
