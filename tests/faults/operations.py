"""What is done while faults are injected, and what must hold of its folder afterwards.

Each operation works below one folder: ``prepare`` makes what it starts from, ``run`` does it,
``state`` reads what is there, checks it against its digests, and raises if anything is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
from support.fake_bundle import make_fake_bundle
from support.fake_library import HashEncoder, StubBundle, draw, embedding
from support.former_tags import in_the_clear
from support.leaks import leaks
from support.pictures import LABELS, disc, write_pairs

from faults.archive_operations import ARCHIVE_OPERATIONS
from faults.libraries import (
    exemplar,
    library_state,
    on_library,
    state_of,
    stub_library,
    writing,
)
from faults.model_operations import MODEL_OPERATIONS
from faults.node_operations import NODE_OPERATIONS
from faults.operation import CommandError, Operation, command, names
from recallseg.engines.bundle import Bundle
from recallseg.engines.signing import SigningKey, create_key, read_trusted
from recallseg.runtime.library import Library
from recallseg.runtime.library.identifiers import is_hashed
from recallseg.runtime.library.identifiers_file import IDENTIFIERS
from recallseg.runtime.library.identifying import is_random_key
from recallseg.runtime.library.installing import install, installed
from recallseg.runtime.library.releases import read_release
from recallseg.runtime.library.reverting import revert
from recallseg.runtime.services.audit_keys import read_audit_key

__all__ = ["LIFE", "OPERATIONS", "library_state"]

PATIENT = "Doe^Jane of 17"


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
    stub_library(root)
    with writing(root) as library:
        library.retire(["case 1", "case 2"])


def _reinstate(library: Library) -> None:
    library.reinstate([one.key for one in library.retired])


def _rename(library: Library) -> None:
    library.rename_structure("wall", "membrane")


def _with_later_changes(root: Path) -> None:
    """One retired, one back in use and two more after the third change."""
    stub_library(root)
    with writing(root) as library:
        library.retire("case 3")
        library.add(**exemplar(7))
        library.reinstate("case 3")
        library.retire("case 1")
        library.add(**exemplar(8))


def _revert(library: Library) -> None:
    revert(library, [change.revision for change in library.history()][3])


def _with_patients(root: Path) -> None:
    """As an earlier version made it: keys of files, patients in the clear."""
    stub_library(root)
    with writing(root) as library:
        for number in range(3):
            library.retag(f"case {number}", {"n": str(number), "patient": f"{number}"})
    (root / "library" / IDENTIFIERS).unlink()
    in_the_clear(root / "library", PATIENT)


def _anonymise(root: Path) -> None:
    with writing(root) as library:
        library.anonymise()


def _unnamed(root: Path) -> Any:
    """What is there by its content, as keys are drawn; and whether former keys are known."""
    there = state_of(root / "library")
    found = []
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        for one in library:
            known = library.whois(one.key)
            tags = {name: "hash" if is_hashed(value) else value for name, value in one.tags.items()}
            drawn = is_random_key(one.key)
            told = (known.name, known.former, sorted(known.tags.items()))
            found.append((one.content, drawn, sorted(tags.items()), told, there[one.key][0]))
        former = [library.whois(f"case {number}").key in library for number in range(4)]
    files = [p for p in (root / "library").rglob("*") if p.is_file() and p.name != IDENTIFIERS]
    return sorted(found), former, bool(leaks(files, [PATIENT]))


def _two_libraries(root: Path) -> None:
    stub_library(root)
    with Library.create(root / "other", StubBundle(), encoder=HashEncoder()) as library:
        for number in (2, 7, 8):
            library.add(**exemplar(number))


def _merge(root: Path) -> None:
    with (
        writing(root) as library,
        Library.open(root / "other", encoder=HashEncoder()) as other,
    ):
        library.merge(other)


def _backed_up(root: Path) -> None:
    stub_library(root)
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        library.backup(root / "copy")
    with writing(root) as library:
        library.remove("case 1")


def _copy(root: Path) -> None:
    with Library.open(root / "library", encoder=HashEncoder()) as library:
        library.backup(root / "copy")


def _copied(root: Path) -> Any:
    there = (root / "copy").exists()
    moved = Path("copy") if there else Path("library")
    return there, state_of(root / moved), library_state(root)


def _restore(root: Path) -> None:
    Library.restore(root / "copy", root / "library", over_newer=True)


def _with_signed(root: Path) -> None:
    stub_library(root)
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
    return None if used is None else (used.library, state_of(root / "site" / "current"))


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
                if not path.name.endswith((".lock", ".tmp")):
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


def _key_pair(root: Path) -> bool:
    """Whether there is a key; its other half must be there too."""
    if not (root / "key").exists():
        return False
    public = SigningKey.read(root / "key").public
    return read_trusted(root / "key.pub")[0].id == public.id


def _some_files(state: Any, after: Any) -> bool:
    return set(state) <= set(after)


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
    log = root / "audit" / "log.jsonl"
    # Between the two names of one file and the new log a rotation is under way.
    return any(not aside.samefile(log) for aside in log.parent.glob("log.jsonl.*"))


def _rotate_once(root: Path) -> None:
    try:
        done = _logged(root)
    except OSError as error:  # of who asks
        raise CommandError(str(error)) from error
    if not done:
        command("audit", "rotate", "{root}/audit/log.jsonl")(root)


def _with_key(root: Path) -> None:
    make_fake_bundle(root / "bundle")
    command("sign", "key", "{root}/key")(root)


OPERATIONS = {
    one.name: one
    for one in (
        Operation("library.create", lambda root: None, _create, library_state),
        on_library("add", lambda library: library.add(**exemplar(7))),
        on_library("add_many", lambda library: library.add_many(map(exemplar, (7, 8, 9)))),
        on_library("remove", lambda library: library.remove("case 1")),
        on_library("replace_mask", _replace),
        on_library("retag", lambda library: library.retag("case 2", {"view": "axial"})),
        on_library("rebuild", lambda library: library.rebuild(StubBundle(), encoder=HashEncoder())),
        on_library("rebuild_index", lambda library: library.rebuild_index()),
        on_library("compact", _remove_and_compact),
        on_library("retire", _retire_all_but_one),
        on_library("rename", _rename),
        on_library("reinstate", _reinstate, prepare=_with_retired),
        on_library("revert", _revert, prepare=_with_later_changes),
        Operation("library.anonymise", _with_patients, _anonymise, _unnamed),
        Operation("library.merge", _two_libraries, _merge, library_state),
        Operation("library.backup", stub_library, _copy, _copied),
        Operation("library.restore", _backed_up, _restore, library_state),
        Operation("library.release", _with_signed, _release, _released),
        Operation("library.install", _with_release, _install, _installed),
        Operation("library.read", stub_library, _read, library_state),
        Operation("import", _with_bundle, _IMPORT, _command_library_state, _some_exemplars),
        Operation(
            "calibrate",
            _with_library,
            command("library", "calibrate", "{root}/library", "--engine", "fake"),
            _command_library_state,
        ),
        Operation("watch", _with_library, _WATCH, _files_state("out"), _some_results),
        Operation("evaluate", _with_library, _EVALUATE, _files_state("report"), _some_files),
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
            _key_pair,
        ),
        Operation(
            "audit.key",
            lambda root: None,
            command("audit", "key", "{root}/key"),
            lambda root: (root / "key").exists() and bool(read_audit_key(root / "key")),
        ),
        Operation(
            "sign.bundle",
            _with_key,
            command("sign", "bundle", "{root}/bundle", "--key", "{root}/key"),
            lambda root: (Bundle.open(root / "bundle").identity, len(names(root))),
        ),
        Operation("segment", _with_library, _SEGMENT, _files_state("out"), _some_results),
        *MODEL_OPERATIONS,
        *ARCHIVE_OPERATIONS,
        *NODE_OPERATIONS,
    )
}


def _adding(number: int) -> Callable[[Path], None]:
    return on_library("", lambda library: library.add(**exemplar(number))).run


LIFE: list[Callable[[Path], Any]] = [
    _create,
    *(_adding(number) for number in range(4)),
    *(
        OPERATIONS[f"library.{name}"].run
        for name in ("add_many", "replace_mask", "retag", "remove", "compact", "rebuild")
    ),
    on_library("", lambda library: library.remove("case 8")).run,
    OPERATIONS["library.rebuild_index"].run,
]
"""A library's life, step by step, for those who cut the power in it."""
