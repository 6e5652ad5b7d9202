"""Libraries, bundles, indexes, releases as strangers could make them, and what is done to them.

Beside what is received lies a folder ``outside`` with files of somebody else: whatever is planted
leads there, and nothing may ever get there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import sqlite3
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from support.fake_bundle import make_fake_bundle

from fuzz.mutations import INTERESTING, damage
from recallseg.engines.bundle import Bundle
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import InputError, RecallSegError
from recallseg.engines.golden import GoldenTensors
from recallseg.engines.heads import REFINE, feature_count, graph_digest
from recallseg.engines.manifest import data_files
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.paths import SHIPPED
from recallseg.engines.signing import SigningKey, create_key, sign_document
from recallseg.runtime.library import Library, index, releases, retrieval
from recallseg.runtime.library.catalog_file import JOURNAL_MAGIC
from recallseg.runtime.library.choices import Choice
from recallseg.runtime.library.heads import Head
from recallseg.runtime.library.installing import install
from recallseg.runtime.library.kept import Kept, Recall
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["KINDS", "make", "mark", "prepare", "unharmed", "use", "warm"]

KINDS = ("library", "bundle", "index", "release")
GRAPH = "portable/fp32/memorize"
RELEASE = "release"
_SECRET = b"somebody else's"
_STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**62, -(2**63), 1e300, float("inf"), "", "x", "../../outside"),
    *(
        "/etc/passwd",
        "\x1b[2J",
        "x" * 5000,
        b"",
        b"\0" * 96,
        b"\xff" * 32,
        "[" * 3000,
        "{}",
        "null",
    ),
)


def prepare(folder: Path) -> None:
    """Make the good ones, from which all others are made, and the folder of somebody else."""
    mark("end")  # of one before that was ended, if there was one
    os.environ["RECALLSEG_STATE"] = str(folder / "state")
    os.environ["RECALLSEG_CACHE"] = str(folder / "cache")
    for module in (index, retrieval):
        module.EXACT_LIMIT = 2
    bundle = make_fake_bundle(folder / "good" / "bundle")
    rng = np.random.default_rng(0)
    signer = _signer(folder)
    with Library.create(folder / "good" / "library", bundle, engine="fake") as library:
        for number in range(6):
            image = rng.integers(0, 256, (40, 40), np.uint8)
            mask = np.zeros((40, 40), bool)
            mask[5 : 20 + number, 5:20] = True
            library.add(
                image,
                {"disc": mask},
                key=f"e{number}",
                tags={"n": str(number), "PatientID": f"P{number // 2}"},
                absent=("cyst",),
                group=f"P{number // 2}",
            )
        _fill(library)
        library.release(folder / "good" / "release", version="1.0.0", key=signer, images=True)
    shutil.copytree(SHIPPED / "demo", folder / "good" / "real")
    _set_outside(folder)


def _signer(folder: Path) -> SigningKey:
    """Return the key of a maker whom this user trusts."""
    path = folder / "state" / "maker.key"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        create_key(path)
    return SigningKey.read(path)


def _fill(library: Library) -> None:
    """Put in all else that a library can have."""
    library.retire("e5")
    library.rename_structure("cyst", "fluid")
    Segmenter(library, structures=("disc",), k=2, engine="fake").calibrate()
    rng = np.random.default_rng(1)
    shapes = [(8, feature_count(1)), (8,), (4, 8), (4,), (1, 4), (1,)]
    units = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    numbers = [library.number(f"e{number}") for number in range(4)]
    choice = Choice(*(0.5, 0.0, 0.7, 0.8, 0.01, 0.2, 4, "", False, (0.7, 0.9)))
    folds = {number: place // 2 for place, number in enumerate(numbers)}
    head = Head(
        *(("disc",), {"disc": choice}, units, (units, units), folds, folds, "groups", {"k": 2}),
        *(library.generation, graph_digest(REFINE), "2026-01-01T00:00:00+00:00"),
        *(library.newest, len(library)),
    )
    library.heads.store(head)
    recall = Recall(
        *({"disc": (1, 2)}, {"disc": 0.5}, {"disc": 0.8}, {"disc": 0.1}),
        {"disc": np.zeros((16, 16), np.float16)},
    )
    library.heads.keep(numbers[0], Kept("ab" * 32, library.generation, recall, recall, recall))
    library.rebuild_index()


def _set_outside(folder: Path) -> None:
    (folder / "outside").mkdir(exist_ok=True)
    for name in ("secret", "000001.shard", "000000001.npz"):
        file = folder / "outside" / name
        if not file.is_file() or file.read_bytes() != _SECRET:
            file.write_bytes(_SECRET)
    for path in (folder / "outside").iterdir():
        if path.name not in ("secret", "000001.shard", "000000001.npz"):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()


def unharmed(folder: Path) -> bool:
    """Whether somebody else's files are what they were."""
    found = {path.name: path.read_bytes() for path in (folder / "outside").iterdir()}
    return len(found) == 3 and set(found.values()) == {_SECRET}


def make(kind: str, number: int, seed: int, folder: Path) -> Path:
    """Make what is received; the same for the same arguments, always."""
    rng = random.Random(f"{seed} {kind} {number}")
    path = folder / "received"
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    shutil.rmtree(folder / "installed", ignore_errors=True)
    shutil.rmtree(folder / "copy", ignore_errors=True)
    if kind == "release":
        path.mkdir()
        _release(path, rng)
        _set_outside(folder)
        return path
    source = rng.choice(("bundle", "real")) if kind == "bundle" else "library"
    shutil.copytree(folder / "good" / source, path)
    ways = {"library": _LIBRARY, "bundle": _BUNDLE, "index": (_index,)}[kind]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with suppress(Exception):  # a second one may find nothing left that it could damage
            rng.choice(ways)(path, rng)
        if any(file.is_fifo() for file in path.rglob("*")):
            break  # who would damage that would wait for ever
    _set_outside(folder)  # the second may have gone through the link of the first
    return path


def warm(kind: str, folder: Path) -> None:
    """Use what is undamaged, so that all is imported and set aside that is at first use."""
    path = folder / "received"
    source = {"bundle": "real", "release": "release"}.get(kind, "library")
    if source == "release":
        path.mkdir()
        shutil.copy(folder / "good" / "release", path / RELEASE)
    else:
        shutil.copytree(folder / "good" / source, path)
    use(path)


def mark(what: str) -> None:
    """Make a call that fails, for who traces: what is between is of the package, not of a test."""
    with suppress(OSError):
        os.unlink(f"/recallseg-fuzz:{what}")


def use(path: Path) -> None:
    """Do everything that one does with a library or bundle; InputError if something was refused."""
    refused: list[str] = []
    mark("begin")

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RecallSegError as error:
            refused.append(str(error))
            return None

    try:
        if os.path.lexists(path / RELEASE):
            trust = (_signer(path.parent).public,)
            made = attempt(lambda: install(path / RELEASE, path.parent / "installed", trust))
            if made is not None:
                _use_library(path.parent / "installed" / "current", attempt)
        elif os.path.lexists(path / "library.sqlite") or not os.path.lexists(
            path / "manifest.json"
        ):
            _use_library(path, attempt)
        else:
            _use_bundle(path, attempt)
    finally:
        mark("end")
    if not unharmed(path.parent):
        raise AssertionError("somebody else's files were changed")
    if refused:
        raise InputError(refused[0])


def _use_library(path: Path, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    reading = attempt(lambda: Library.open(path, engine="fake"))
    if reading is not None:
        _read(reading, attempt)
    writing = attempt(lambda: Library.open(path, mode="write", engine="fake"))
    if writing is not None:
        _write(writing, attempt)


def _read(library: Library, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    image = np.full((40, 40), 90, np.uint8)
    attempt(lambda: list(library))
    attempt(library.verify)
    attempt(library.history)
    attempt(lambda: (library.calibrations, library.origins, library.retired, library.head))
    attempt(lambda: library.heads.check())
    attempt(lambda: library.whois("e1"))
    attempt(lambda: Segmenter(library, k=2, engine="fake").segment(image))
    attempt(lambda: library.backup(library.path.parent / "copy"))
    attempt(library.close)


def _write(library: Library, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    image = np.full((40, 40), 90, np.uint8)
    attempt(library.rebuild_index)
    attempt(library.rebuild)
    key = attempt(lambda: library.add(image, {"disc": image > 0}))
    if key is not None:
        attempt(lambda: library.retag(key, {"n": "7"}))
        attempt(lambda: library.retire(key))
        attempt(lambda: library.remove(key))
    attempt(lambda: library.rename_structure("disc", "disk"))
    attempt(library.anonymise)
    attempt(library.compact)
    attempt(library.close)


def _use_bundle(path: Path, attempt: Callable[[Callable[[], Any]], Any]) -> None:
    bundle = attempt(lambda: Bundle.open(path))
    if bundle is None:
        return
    attempt(bundle.check_files)
    attempt(lambda: GoldenTensors.load(bundle.golden_file))
    found = attempt(lambda: bundle.graph_file("memorize", ("portable",), "fp32"))
    if found is not None and bundle.name == "demo":
        attempt(lambda: OnnxRuntimeCpu(bundle.specs["memorize"], found[0]))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _bytes(path: Path, rng: random.Random) -> None:
    file = rng.choice(_files(path))
    file.write_bytes(damage("picture", file.name, file.read_bytes(), rng))


def _catalog_bytes(path: Path, rng: random.Random) -> None:
    file = path / "library.sqlite"
    data = bytearray(file.read_bytes())
    way = rng.randrange(4)
    if way == 0:  # the header
        data[rng.randrange(100)] = rng.randrange(256)
    elif way == 1:  # a number anywhere, mostly of a b-tree
        at = rng.randrange(0, len(data) - 4) if rng.random() < 0.3 else (
            rng.randrange(len(data) // 8192) * 8192 + rng.randrange(200)
        )  # fmt: skip
        struct.pack_into(">I", data, at, rng.choice(INTERESTING))
    elif way == 2:  # a page in place of another
        a, b = (rng.randrange(1, len(data) // 8192) * 8192 for _ in range(2))
        data[a : a + 8192] = data[b : b + 8192]
    else:
        data = bytearray(damage("picture", "x", bytes(data), rng))
    file.write_bytes(data)


def _sql(path: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    connection = sqlite3.connect(path / "library.sqlite")
    try:
        for statement, values in statements:
            connection.execute(statement, values)
        connection.commit()
    finally:
        connection.close()


def _catalog_value(path: Path, rng: random.Random) -> None:
    connection = sqlite3.connect(path / "library.sqlite")
    tables = [
        row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    table = rng.choice(tables)
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    connection.close()
    where = "" if rng.random() < 0.5 else " WHERE random() % 2"
    _sql(path, (f"UPDATE {table} SET {rng.choice(columns)} = ?{where}", (rng.choice(_STRANGE),)))


def _settings(path: Path, rng: random.Random) -> None:
    connection = sqlite3.connect(path / "library.sqlite")
    (text,) = connection.execute("SELECT value FROM settings WHERE name = 'library'").fetchone()
    connection.close()
    value = json.loads(text)
    _strange_json(value, rng)
    _sql(path, ("UPDATE settings SET value = ? WHERE name = 'library'", (json.dumps(value),)))


def _schema(path: Path, rng: random.Random) -> None:
    statement = rng.choice(
        (
            "CREATE TRIGGER t AFTER INSERT ON tags BEGIN DELETE FROM exemplars; END",
            "CREATE TRIGGER t BEFORE UPDATE ON state BEGIN SELECT writefile('x', 'y'); END",
            "CREATE VIEW v AS SELECT load_extension('/tmp/x')",
            "ALTER TABLE tags RENAME TO other",
            "CREATE TABLE extra (x)",
            "CREATE INDEX extra ON tags (hex(value))",
            "DROP TABLE removals",
            "DROP INDEX tags_by_value",
            "CREATE VIRTUAL TABLE f USING fts5(x)",
            "PRAGMA user_version = 99",
            "PRAGMA application_id = 0",
        )
    )
    _sql(path, (statement, ()))


def _journal(path: Path, rng: random.Random) -> None:
    pages = rng.choice((0, 1, 5, 2**31 - 1))
    numbers = (
        *(rng.choice((0, 1, 0xFFFFFFFF)), 7, pages),
        *(rng.choice((0, 512, 4096, 2**31)), rng.choice((512, 8192, 65536, 3))),
    )
    header = struct.pack(">8sIIIII", JOURNAL_MAGIC, *numbers)
    body = rng.randbytes(rng.choice((0, 600, 9000)))
    data = header.ljust(512, b"\0") + body
    if rng.random() < 0.5:
        name = os.fsencode(path.parent / "outside" / "secret")
        checksum = sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF
        data += struct.pack(">I", 0x40000000 // 8192 + 1) + name
        data += struct.pack(">II", len(name), checksum) + JOURNAL_MAGIC
    (path / "library.sqlite-journal").write_bytes(data)


def _wal(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        (path / rng.choice(("library.sqlite-wal", "library.sqlite-shm"))).write_bytes(
            rng.randbytes(99)
        )
    else:
        data = bytearray((path / "library.sqlite").read_bytes())
        data[18] = data[19] = 2
        (path / "library.sqlite").write_bytes(data)


def _link(path: Path, rng: random.Random) -> None:
    outside = path.parent / "outside"
    names = sorted(p.relative_to(path) for p in path.rglob("*"))
    more = ("writer.lock", "index/new.tmp", "library.sqlite-journal", "library.sqlite-wal",
            "sources/000000/000000006.npz", "sources/000000/000000006.npz.tmp",
            "memories/000001.shard", "memories/000002.shard", "signature.json")  # fmt: skip
    target = path / rng.choice((*names, *more))
    target.parent.mkdir(exist_ok=True)
    is_folder = target.is_dir()
    if is_folder:
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    way = rng.randrange(4)
    if way == 0 and not is_folder:
        os.link(outside / "secret", target)
    elif way == 1 and not is_folder:
        os.mkfifo(target)
    else:
        target.symlink_to(outside if is_folder or way == 2 else outside / "secret")


def _source(path: Path, rng: random.Random) -> None:
    number = rng.randint(1, 5)
    file = path / f"sources/000000/{number:09d}.npz"
    file.write_bytes(damage("picture", file.name, file.read_bytes(), rng))
    digest = hashlib.sha256(file.read_bytes()).digest()
    _sql(path, ("UPDATE exemplars SET source = ? WHERE id = ?", (digest, number)))


def _shard(path: Path, rng: random.Random) -> None:
    file = path / "memories/000001.shard"
    data = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        struct.pack_into("<I", data, rng.choice((8, 12, 16, 20, 24)), rng.choice(INTERESTING))
    else:
        data = bytearray(damage("picture", "x", bytes(data), rng))
    file.write_bytes(data)


def _index(path: Path, rng: random.Random) -> None:
    """Damage an index, and have the catalog state the digests of what it is now."""
    file = rng.choice(sorted((path / "index").iterdir()))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.6:
        at = rng.randrange(0, min(len(data) - 8, 400))
        struct.pack_into("<Q", data, at, rng.choice((*INTERESTING, 2**63, 2**40)))
    else:
        data = bytearray(damage("picture", "x", bytes(data), rng))
    file.write_bytes(data)
    quick, whole = index.file_digests(file, whole=True)
    name = rng.choice((file.name, file.name, file.name, "../../outside/secret", "/etc/passwd"))
    statement = "UPDATE indexes SET quick = ?, digest = ?, bytes = ?, file = ? WHERE file = ?"
    _sql(path, (statement, (quick, whole, len(data), name, file.name)))


def _strange_json(value: Any, rng: random.Random) -> None:
    """Replace, remove or repeat one value, somewhere."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.85:
            value = inner
            continue
        if rng.random() < 0.15:
            del value[key]
        else:
            strange = [v for v in (*_STRANGE, [], {}, [None] * 3) if not isinstance(v, bytes)]
            value[key] = rng.choice(strange)
        return


def _manifest(path: Path, rng: random.Random) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    _strange_json(manifest, rng)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _stated(path: Path, name: str, digest: str) -> None:
    """Put a file's new digest into the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    for entry in (manifest["golden"], *manifest["graphs"].values()):
        for file in (entry, *data_files(entry)):
            if file["file"] == name:
                file["sha256"] = digest
    (path / "manifest.json").write_text(json.dumps(manifest))


def _entry(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of the graph that is opened."""
    entry: dict[str, Any] = json.loads((path / "manifest.json").read_text())["graphs"][GRAPH]
    return entry


def _graph_bytes(path: Path, rng: random.Random) -> None:
    name = _entry(path)["file"]
    data = bytearray((path / name).read_bytes())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 4000))
        data[at] = rng.randrange(256)
    (path / name).write_bytes(data)
    _stated(path, name, digest_file(path / name))


def _weights(path: Path, rng: random.Random) -> None:
    """Change a file of weights, or what the graph says of where its weights lie."""
    entry = _entry(path)
    if rng.random() < 0.4:
        file = path / rng.choice(data_files(entry))["file"]
        file.write_bytes(damage("picture", file.name, file.read_bytes(), rng))
        _stated(path, f"graphs/{file.name}", digest_file(file))
        return
    model = onnx.load(path / entry["file"], load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if rng.random() < 0.3:  # all the same bytes
        first = rng.choice(outside)
        for tensor in outside:
            name = tensor.name
            tensor.CopyFrom(first)
            tensor.name = name
    else:
        said = rng.choice(rng.choice(outside).external_data)
        numbers = [str(rng.choice((-1, 0, 1, 4096, 2**31, 2**40, 2**63))), "1e3", "", "x"]
        names = ["../outside/secret", "manifest.json", "*/_ORT_MEM_ADDR_/*", path.name]
        said.value = rng.choice(names if said.key == "location" else numbers)
    (path / entry["file"]).write_bytes(model.SerializeToString())
    _stated(path, entry["file"], digest_file(path / entry["file"]))


def _graph_meaning(path: Path, rng: random.Random) -> None:
    """Change what a graph says and leave it well-formed."""
    name = _entry(path)["file"]
    model = onnx.load(path / name, load_external_data=False)
    graph = model.graph
    way = rng.randrange(7)
    if way == 0:
        rng.choice(graph.node).op_type = rng.choice(("Loop", "If", "Scan", "Add", "Expand", "Tile"))
    elif way == 1:
        tensor = rng.choice(graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", rng.choice(("../../../../outside/secret", "/etc/passwd",
                            str(path.parent / "outside/secret"), "*/_ORT_MEM_ADDR_/*"))),
                           ("offset", "0"), ("length", "64")):  # fmt: skip
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    elif way == 2:
        tensor = rng.choice(graph.initializer)
        tensor.dims[:] = [rng.choice((0, 1, 2**20, 2**40, -1)) for _ in range(rng.randint(1, 4))]
    elif way == 3:
        rng.choice(graph.node).domain = rng.choice(("com.microsoft", "evil", "ai.onnx.ml"))
    elif way == 4:
        node = rng.choice(graph.node)
        node.input[:] = [*rng.sample(list(node.input), len(node.input)), node.output[0]]
    elif way == 5:
        first = graph.input[0].name
        graph.node.insert(0, helper.make_node("Expand", [first, "huge"], ["grown"]))
        graph.initializer.append(helper.make_tensor("huge", TensorProto.INT64, [4], [2**15] * 4))
    else:
        tensor = rng.choice(graph.initializer)
        tensor.data_type = rng.randrange(25)
    (path / name).write_bytes(model.SerializeToString())
    _stated(path, name, digest_file(path / name))


def _hidden(path: Path, rng: random.Random) -> None:
    """Say something twice, or in a way that parsers read differently."""
    name = _entry(path)["file"]
    model = onnx.load(path / name, load_external_data=False)
    node = model.graph.node.pop(rng.randrange(len(model.graph.node)))
    data = node.SerializeToString()
    way = rng.randrange(4)
    if way == 0:  # a number of 33 bits, of which some take the lower 32
        tag, body = (1 << 3 | 2) + (1 << 32), data
    else:
        real = rng.choice((b"If", b"Loop", b"EPContext", b"StringNormalizer"))
        kind = (0, 1, 5)[way - 1]
        seen = {0: b"\x01", 1: b"Identity", 5: b"Relu"}[kind]
        extra = b"\x22" + bytes([len(real)]) + real + bytes([4 << 3 | kind]) + seen
        tag, body = 1 << 3 | 2, data + extra
    part = _varint(tag) + _varint(len(body)) + body
    (path / name).write_bytes(model.SerializeToString() + b"\x3a" + _varint(len(part)) + part)
    _stated(path, name, digest_file(path / name))


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def _golden(path: Path, rng: random.Random) -> None:
    file = path / "golden/golden.npz"
    file.write_bytes(damage("picture", file.name, file.read_bytes(), rng))
    _stated(path, "golden/golden.npz", digest_file(file))


def _note(path: Path, rng: random.Random) -> None:
    """Change what a note says, or its name: calibrations, history, origins, a rebuild."""
    connection = sqlite3.connect(path / "library.sqlite")
    notes = connection.execute("SELECT name, value FROM settings").fetchall()
    connection.close()
    name, text = rng.choice(notes)
    way = rng.randrange(4)
    if way == 0:  # one that begins as ours do
        others = ("at x", "at 999999999999999", "rebuild", "adding", "origins 1", "forget",
                  "identifiers", "calibration", f"calibration {'a' * 64} disc")  # fmt: skip
        values = ("[" * 5000, "{}", "1 2", "null", '{"identity": "x", "generation": 1}', text)
        statement = "INSERT OR REPLACE INTO settings VALUES (?, ?)"
        _sql(path, (statement, (rng.choice(others), rng.choice(values))))
    elif way == 1 and text.startswith("{"):
        value = json.loads(text)
        _strange_json(value, rng)
        _sql(path, ("UPDATE settings SET value = ? WHERE name = ?", (json.dumps(value), name)))
    else:
        strange = rng.choice(_STRANGE)
        _sql(path, ("UPDATE settings SET value = ? WHERE name = ?", (strange, name)))


def _learnt(path: Path, rng: random.Random) -> None:
    """Change a head or kept logits, and have the catalog state the digest of what it is now."""
    table = rng.choice(("heads", "kept_logits"))
    connection = sqlite3.connect(path / "library.sqlite")
    number, text, data = connection.execute(f"SELECT rowid, about, data FROM {table}").fetchone()
    connection.close()
    about = json.loads(text)
    if rng.random() < 0.7:
        _strange_json(about, rng)
    else:
        data = damage("picture", "x", data, rng)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + b"\0" + data).digest()
    statement = f"UPDATE {table} SET about = ?, data = ?, digest = ? WHERE rowid = ?"
    _sql(path, (statement, (json.dumps(about), data, digest, number)))


def _identifiers(path: Path, rng: random.Random) -> None:
    file = path / "identifiers.jsonl"
    lines = file.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    value = json.loads(lines[place])
    _strange_json(value, rng)
    lines[place] = json.dumps(value).encode()
    file.write_bytes(b"\n".join(lines) + b"\n")


def _release(path: Path, rng: random.Random) -> None:
    """Damage a release, or have one made by somebody who is trusted, and means harm."""
    good = path.parent / "good"
    way = rng.randrange(4)
    data = bytearray((good / "release").read_bytes())
    if way == 0:
        data = bytearray(damage("picture", "x", bytes(data), rng))
    elif way == 1:  # the header of a member
        at = 512 * rng.randrange(len(data) // 512)
        name = rng.choice((b"library/../../outside/secret", b"/etc/x", b"library/library.sqlite"))
        data[at : at + 100] = name.ljust(100, b"\0")
        data[at + 156] = rng.choice(b"0125gxL")
    else:
        library = path / "library"
        shutil.copytree(good / "library", library)
        for name in ("index", "identifiers.jsonl", "writer.lock"):
            gone = library / name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
        if way == 2:
            with suppress(Exception):
                rng.choice(_INSIDE)(library, rng)
        data = bytearray(_released(path, library, rng, strange=way == 3))
        shutil.rmtree(library)
    (path / RELEASE).write_bytes(data)


def _released(path: Path, library: Path, rng: random.Random, *, strange: bool) -> bytes:
    """Return a release of files as they are, signed."""
    stated = releases.read_release(path.parent / "good" / "release", (_signer(path.parent).public,))
    manifest = stated.to_json()
    names = [file for file in sorted(library.rglob("*")) if file.is_file()]
    manifest["files"] = [
        [f"library/{file.relative_to(library)}", file.stat().st_size, digest_file(file)]
        for file in names
    ]
    if strange:
        _strange_json(manifest, rng)
    document = json.dumps(manifest).encode()
    signature = sign_document("release", document, _signer(path.parent))
    made = io.BytesIO()
    members = [("release.json", document), ("release.json.sig", signature)]
    members += [(f"library/{file.relative_to(library)}", file.read_bytes()) for file in names]
    for name, content in members:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o600
        made.write(entry.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    return made.getvalue() + bytes(1024)


_INSIDE = (
    _catalog_bytes,
    _catalog_value,
    _settings,
    _schema,
    _wal,
    _source,
    _shard,
    _note,
    _learnt,
)
_LIBRARY = (
    *(_catalog_bytes, _catalog_bytes, _catalog_value, _catalog_value, _settings, _schema),
    *(_journal, _wal, _link, _link, _source, _shard, _index, _bytes),
    *(_note, _note, _learnt, _identifiers),
)
_BUNDLE = (
    *(_manifest, _manifest, _graph_bytes, _graph_meaning),
    *(_weights, _golden, _link, _bytes, _hidden),
)
