"""Libraries as a stranger could have made them: they are data, and nothing outside is touched."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.fake_library import HashEncoder, add, create, draw, embedding
from usearch.index import Index

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError, InputError, LibraryCorruptError, LibraryError
from recallseg.engines.limits import max_bytes
from recallseg.runtime.library import Library, catalog_file, index, retrieval
from recallseg.runtime.library.catalog_file import JOURNAL_MAGIC


@pytest.fixture
def library(tmp_path: Path) -> Path:
    with create(tmp_path / "library") as made:
        for number in range(3):
            add(made, number)
    return made.path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "000009.shard").write_bytes(b"somebody else's")
    (folder / "thesis").write_bytes(b"years of work")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_super_journal(library: Path, victim: Path) -> None:
    catalog = library / "library.sqlite"
    page = 8192
    pages = catalog.stat().st_size // page
    header = struct.pack(">8sIIIII", JOURNAL_MAGIC, 0, 7, pages, 512, page).ljust(512, b"\0")
    name = os.fsencode(victim)
    checksum = sum(struct.unpack(f"{len(name)}b", name)) & 0xFFFFFFFF
    record = struct.pack(">I", 0x40000000 // page + 1) + name
    record += struct.pack(">II", len(name), checksum) + JOURNAL_MAGIC
    (library / "library.sqlite-journal").write_bytes(header + record)


def test_a_journal_cannot_have_sqlite_delete_a_file(
    tmp_path: Path, library: Path, outside: Path
) -> None:
    plain = shutil.copytree(library, tmp_path / "plain")
    write_super_journal(plain, outside / "thesis")
    connection = sqlite3.connect(plain / "library.sqlite")
    connection.execute("SELECT * FROM state").fetchall()
    connection.close()
    assert not (outside / "thesis").exists()  # what SQLite does when it is merely asked to read
    (outside / "thesis").write_bytes(b"years of work")
    write_super_journal(library, outside / "thesis")
    for mode in ("read", "write"):
        with pytest.raises(LibraryCorruptError, match="names another journal"):
            Library.open(library, mode=mode)
    assert (outside / "thesis").exists()


def test_an_ordinary_journal_is_rolled_back(tmp_path: Path, library: Path) -> None:
    connection = sqlite3.connect(library / "library.sqlite", isolation_level=None)
    connection.execute("PRAGMA cache_size=1")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE exemplars SET created = created || 'x'")
    connection.execute(
        "INSERT INTO settings VALUES ('large', ?)", ("x" * 200_000,)
    )  # spills, so that the catalog is changed before the commit
    copy = shutil.copytree(library, tmp_path / "cut off")
    connection.close()
    assert (copy / "library.sqlite-journal").stat().st_size > 8192
    with Library.open(copy) as opened:
        assert [e.created[-1] for e in opened] == ["0"] * 3
        assert opened.verify().ok
    assert not (copy / "library.sqlite-journal").exists()


def test_a_journal_may_go_while_it_is_looked_at(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that commits removes its journal: its library is there all the same."""
    journal = library / "library.sqlite-journal"
    journal.write_bytes(b"\0" * 512)
    regular = catalog_file._regular

    def committed(path: Path) -> int:
        size = regular(path)
        if path == journal:
            path.unlink()
        return size

    monkeypatch.setattr(catalog_file, "_regular", committed)
    Library.open(library, encoder=HashEncoder()).close()
    assert not journal.exists()


def grow_by_journal(library: Path) -> None:
    header = struct.pack(">8sIIIII", JOURNAL_MAGIC, 0, 7, 2**31, 512, 8192).ljust(1024, b"\0")
    (library / "library.sqlite-journal").write_bytes(header)


def ask_for_wal(library: Path) -> None:
    with (library / "library.sqlite").open("r+b") as file:
        file.seek(18)
        file.write(b"\2\2")


def leave_beside(suffix: str) -> Callable[[Path], None]:
    return lambda library: (library / f"library.sqlite{suffix}").touch() or None


def run_sql(*statements: str) -> Callable[[Path], None]:
    def change(library: Path) -> None:
        connection = sqlite3.connect(library / "library.sqlite")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    return change


def link_catalog(library: Path) -> None:
    (library / "library.sqlite").rename(library / "elsewhere")
    (library / "library.sqlite").symlink_to("elsewhere")


def second_name(library: Path) -> None:
    os.link(library / "library.sqlite", library / "second")


def link_journal(library: Path) -> None:
    (library / "library.sqlite-journal").symlink_to("elsewhere")


def pipe_as_catalog(library: Path) -> None:
    (library / "library.sqlite").unlink()
    os.mkfifo(library / "library.sqlite")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (grow_by_journal, "it would make 2147483648 pages"),
        (ask_for_wal, "asks for a write-ahead log"),
        (leave_beside("-wal"), "write-ahead logs belong to no library"),
        (leave_beside("-shm"), "write-ahead logs belong to no library"),
        (link_catalog, "link or no ordinary file"),
        (second_name, "has 2 names"),
        (link_journal, "link or no ordinary file"),
        (pipe_as_catalog, "link or no ordinary file"),
        (
            run_sql("CREATE TRIGGER t AFTER INSERT ON tags BEGIN DELETE FROM exemplars; END"),
            "has the trigger 't'",
        ),
        (
            run_sql(
                "ALTER TABLE tags RENAME TO other", "CREATE VIEW tags AS SELECT 1 AS exemplar"
            ),
            "table 'other'|view 'tags'",
        ),
        (run_sql("CREATE TABLE extra (x DEFAULT (load_extension('x')))"), "has the table 'extra'"),
        (run_sql("CREATE INDEX extra ON tags (hex(value))"), "has the index 'extra'"),
    ],
)  # fmt: skip
def test_what_sqlite_must_not_open(
    library: Path, change: Callable[[Path], None], match: str
) -> None:
    change(library)
    for mode in ("read", "write"):
        with pytest.raises(LibraryCorruptError, match=match):
            Library.open(library, mode=mode)


def test_a_library_made_anew_never_follows_a_link(tmp_path: Path, outside: Path) -> None:
    for name in ("library.sqlite", "writer.lock", "library.sqlite-journal"):
        folder = tmp_path / f"new {name}"
        folder.mkdir()
        (folder / name).symlink_to(outside / "thesis")
        before = contents(outside)
        with pytest.raises(LibraryError):
            create(folder)
        assert contents(outside) == before


@pytest.mark.parametrize("name", ["memories", "sources", "index"])
def test_a_linked_folder_is_not_entered(library: Path, outside: Path, name: str) -> None:
    if (library / name).exists():
        shutil.move(library / name, outside / "moved")
    (library / name).symlink_to(outside)
    refused = 0
    try:  # opened for writing, it cleans up: what the link led to was emptied
        with Library.open(library, mode="write", encoder=HashEncoder()) as opened:
            for work in (opened.rebuild_index, lambda: add(opened, 7), opened.compact):
                try:
                    work()
                except LibraryError:
                    refused += 1
    except LibraryError:
        refused += 1
    assert refused
    assert (outside / "thesis").read_bytes() == b"years of work"
    assert (outside / "000009.shard").read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    "name",
    [
        "writer.lock",
        "memories/000001.shard",
        "sources/000000/000000004.npz.tmp",
        "sources/000000/000000004.npz",
        "index/new.tmp",
    ],
)
def test_nothing_is_written_through_a_link(
    library: Path, outside: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "EXACT_LIMIT", 2)
    (library / name).parent.mkdir(exist_ok=True)
    (library / name).unlink(missing_ok=True)
    (library / name).symlink_to(outside / "thesis")
    try:
        with Library.open(library, mode="write", encoder=HashEncoder()) as opened:
            add(opened, 7)
            opened.rebuild_index()
            opened.compact()
    except LibraryError as error:
        if "link" not in str(error):
            raise
    assert (outside / "thesis").read_bytes() == b"years of work"


def test_a_hard_link_is_not_written_through(library: Path, outside: Path) -> None:
    (library / "memories/000001.shard").unlink()
    os.link(outside / "thesis", library / "memories/000001.shard")
    opened = Library.open(library, mode="write", encoder=HashEncoder())
    with pytest.raises(LibraryError, match="2 names"):
        add(opened, 7)
    opened.close()
    assert (outside / "thesis").read_bytes() == b"years of work"


def test_reading_never_waits_for_a_pipe(library: Path) -> None:
    for name in ("memories/000001.shard", "sources/000000/000000001.npz"):
        (library / name).unlink()
        os.mkfifo(library / name)
    with Library.open(library) as opened:
        problems = opened.verify().problems
    assert sum("not a file" in problem for problem in problems) == 4


def test_what_is_no_shard_is_not_deleted(library: Path) -> None:
    (library / "memories/notes.txt").write_text("mine")
    (library / "memories/000077.shard").write_text("of a writer that died")
    Library.open(library, mode="write").close()
    assert (library / "memories/notes.txt").exists()
    assert not (library / "memories/000077.shard").exists()


def test_only_an_index_that_was_built_here_is_opened(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (index, retrieval):
        monkeypatch.setattr(module, "EXACT_LIMIT", 2)
    with Library.open(library, mode="write") as opened:
        opened.rebuild_index()
    (file,) = (library / "index").iterdir()
    opened_files: list[str] = []
    restore = Index.restore
    monkeypatch.setattr(
        Index,
        "restore",
        lambda path, **options: (opened_files.append(path), restore(path, **options))[1],
    )
    with Library.open(library) as opened:
        expected = opened.search(embedding(1), "nucleus", 3)
    assert opened_files == [str(file)]
    # A stranger's catalog can state any digest, and the file that has it.
    hostile = bytearray(file.read_bytes())
    hostile[64:128] = b"\xff" * 64
    file.write_bytes(hostile)
    quick, whole = index.file_digests(file, whole=True)
    run_sql(f"UPDATE indexes SET quick = x'{quick.hex()}', digest = x'{whole.hex()}'")(library)
    opened_files.clear()
    with Library.open(library) as opened:
        assert opened.search(embedding(1), "nucleus", 3) == expected
    assert str(file) not in opened_files
    with Library.open(library) as opened:  # a reader's own lies in its cache, and is found again
        assert opened.search(embedding(1), "nucleus", 3) == expected
    # Compared with what was to be written, and then the one that took its place.
    assert [Path(name).name == "new.tmp" for name in opened_files] == [True, False]
    for name in ("../../outside.usearch", "/etc/passwd", "1-present-1-1-1.usearch/../x"):
        run_sql(f"UPDATE indexes SET file = '{name}'")(library)
        with Library.open(library) as opened:
            assert opened.search(embedding(1), "nucleus", 3) == expected
    assert len(opened_files) == 5


def test_the_place_of_a_bundle_is_not_taken_from_the_catalog(
    tmp_path: Path, fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(fake_bundle.path, tmp_path / "bundle"))
    Library.create(tmp_path / "library", bundle, engine="fake").close()
    assert Library.open(tmp_path / "library").bundle.path == bundle  # this user named it
    monkeypatch.setenv("RECALLSEG_STATE", str(tmp_path / "another user"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fake_bundle.path, tmp_path / fake_bundle.name)
    with pytest.raises(BundleError, match=r"says that it lay in .*Name it once"):
        _ = Library.open(tmp_path / "library").bundle
    Library.open(tmp_path / "library", bundle).close()
    assert Library.open(tmp_path / "library").bundle.path == bundle
    state = tmp_path / "another user" / "bundles"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in state.iterdir()} == {0o600}
    state.chmod(0o777)  # then others could have written it
    with pytest.raises(BundleError, match="Name it once"):
        _ = Library.open(tmp_path / "library").bundle


def test_an_index_holds_what_the_catalog_says_or_is_built_anew(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (index, retrieval):
        monkeypatch.setattr(module, "EXACT_LIMIT", 2)
    with Library.open(library, mode="write") as opened:
        opened.rebuild_index()
        expected = opened.search(embedding(1), "nucleus", 3)
    run_sql("UPDATE indexes SET last = 0")(library)
    for mode in ("read", "write"):
        with Library.open(library, mode=mode, encoder=HashEncoder()) as opened:
            assert opened.search(embedding(1), "nucleus", 3) == expected
            if mode == "write":
                add(opened, 30)
                assert len(opened.search(embedding(1), "nucleus", 9)) == 4


def npz(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def bomb() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**14, 2**14)}
    )
    return npz("image.npy", header.getvalue() + bytes(2**28))


def declares_too_much() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**20)}
    )
    return npz("image.npy", header.getvalue())


def lies_about_its_size() -> bytes:
    data = bytearray(npz("image.npy", bytes(2**28)))
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 200)
    return bytes(data)


def lists_without_end() -> bytes:
    """A list of 200,000 entries that are one and the same: each would be an object in memory."""
    data = npz("x.npy", b"")
    at, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    entry, tail = data[at:end] * 200_000, bytearray(data[end:])
    struct.pack_into("<HHI", tail, 8, 1, 1, len(entry))
    return data[:at] + entry + bytes(tail)


def pickled() -> bytes:
    file = io.BytesIO()
    np.savez(file, image=np.array([{}], object))
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (bomb, "unpacks to 268435.* bytes; at most 64 MiB.*RECALLSEG_MAX_BYTES"),
        (declares_too_much, r"declares \(1048576, 1048576\)"),
        (lies_about_its_size, "CRC|magic"),
        (lists_without_end, "lists more than 4096 arrays"),
        (pickled, "Python objects"),
        (lambda: b"PK", "zip"),
        (lambda: npz("other.npy", b""), "magic|image"),
    ],
)
def test_a_source_cannot_unpack_without_bound(
    library: Path, make: Callable[[], bytes], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import sha256
    from tracemalloc import get_traced_memory, start, stop

    monkeypatch.setenv("RECALLSEG_MAX_BYTES", "64 MiB")
    assert max_bytes() == 2**26
    data = make()
    (library / "sources/000000/000000001.npz").write_bytes(data)
    run_sql(f"UPDATE exemplars SET source = x'{sha256(data).hexdigest()}' WHERE id = 1")(library)
    del data
    with Library.open(library) as opened:
        key = next(iter(opened)).key
        start()
        with pytest.raises(LibraryCorruptError, match=match):
            opened.source(key)
        peak = get_traced_memory()[1]
        stop()
    assert peak < 2**25


def test_a_catalog_without_end_is_given_up(library: Path) -> None:
    """Every child of the table's root is the root's own child again: SQLite reads for ever."""
    catalog = library / "library.sqlite"
    connection = sqlite3.connect(catalog)
    connection.executemany(
        "INSERT INTO annotations VALUES (9, 1, ?)", [(n,) for n in range(40_000)]
    )
    connection.commit()
    (root,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'annotations'"
    ).fetchone()
    connection.close()
    data = bytearray(catalog.read_bytes())
    page = 8192
    start = (root - 1) * page
    assert data[start] == 2  # an interior page of an index
    cells = struct.unpack_from(">H", data, start + 3)[0]
    leaf = struct.unpack_from(">I", data, start + struct.unpack_from(">H", data, start + 12)[0])[0]
    middle = bytes(data[start : start + page])
    spare = len(data) // page
    for depth in range(4):  # each level's children are all the page of the level below
        copy = bytearray(middle)
        child = leaf if depth == 0 else spare + depth
        for cell in range(cells):
            at = struct.unpack_from(">H", copy, 12 + 2 * cell)[0]
            struct.pack_into(">I", copy, at, child)
        struct.pack_into(">I", copy, 8, child)
        data += copy
    data[start : start + page] = data[-page:]
    struct.pack_into(">I", data, 28, len(data) // page)
    catalog.write_bytes(data)
    with (
        pytest.raises(LibraryCorruptError, match="more rows than a file of its size"),
        Library.open(library) as opened,
    ):
        opened._store.catalog.numbers(9, True, {})


def test_files_belong_to_whom_the_folder_belongs(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with create(tmp_path / "private") as library:
            add(library, 1)
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        with create(shared) as library:
            add(library, 1)
    finally:
        os.umask(before)
    for folder, mode in ((tmp_path / "private", 0o600), (shared, 0o644)):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == 4
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
        folders = {stat.S_IMODE(p.stat().st_mode) & 0o66 for p in folder.rglob("*") if p.is_dir()}
        assert folders == {mode & 0o66}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE memories SET slot = -1",
        "UPDATE memories SET slot = 9223372036854775807",
        "UPDATE memories SET slot = 'x'",
        "UPDATE memories SET shard = -4",
        "UPDATE memories SET slot = 0",
        "UPDATE shards SET slots = 1",
        "UPDATE state SET revision = 'x'",
        "UPDATE state SET exemplars = -1",
        "UPDATE state SET exemplars = 4611686018427387904",
        "UPDATE state SET exemplars = 1000000000",
        "UPDATE state SET digest_sum = 'no number'",
        "UPDATE structures SET name = '../../x'",
        "UPDATE structures SET name = char(27) || '[2J'",
        "UPDATE structures SET present = 1e300",
        "UPDATE exemplars SET key = char(27) || id",
        "UPDATE exemplars SET height = -4",
        "UPDATE exemplars SET created = char(27) || '[2J'",
        "UPDATE exemplars SET content = x'00'",
        "UPDATE tags SET value = x'00'",
        "UPDATE encodings SET embedding = 7",
        "UPDATE encodings SET embedding = x'00'",
        "UPDATE encodings SET embedding = zeroblob(96)",
        "UPDATE settings SET value = '{}'",
        "UPDATE settings SET value = '[' || replace(hex(zeroblob(50000)), '0', '[')",
        "UPDATE settings SET value = json_set(value, '$.layout.tokens', -1)",
        "UPDATE settings SET value = json_set(value, '$.layout.tokens', 1e9)",
        "UPDATE settings SET value = json_set(value, '$.layout.format', 'x')",
        "UPDATE settings SET value = json_set(value, '$.embedding_dim', 'x')",
        "UPDATE settings SET value = json_set(value, '$.shard_bytes', 0)",
        "UPDATE settings SET value = json_set(value, '$.intensity', json('{\"x\": 1}'))",
        "UPDATE settings SET value = json_set(value, '$.identity', 5)",
        "UPDATE settings SET value = json_set(value, '$.bundle_path', 5)",
    ],
)
def test_values_that_no_library_has(library: Path, statement: str) -> None:
    with Library.open(library, mode="write", encoder=HashEncoder()) as opened:
        image, mask = draw(8)
        opened.add(image, {"nucleus": mask}, tags={"a": "b"})
    run_sql(statement)(library)
    found = 0
    for mode in ("read", "write"):
        try:
            with Library.open(library, mode=mode, encoder=HashEncoder()) as opened:
                for use in (
                    lambda lib: [*lib],
                    lambda lib: lib.search(embedding(1), "nucleus", 2),
                    lambda lib: (lib.calibrations, lib.origins),
                    lambda lib: lib.intensity,
                    lambda lib: lib.gather(
                        lib.memories([next(iter(lib)).key], "nucleus"), *_buffers()
                    ),
                    lambda lib: lib.embeddings("nucleus"),
                    lambda lib: found_problems(lib),
                ):
                    try:
                        use(opened)
                    except (LibraryError, InputError):
                        found += 1
                if mode == "write":
                    add(opened, 20)
        except LibraryError:
            found += 1
    assert found


def found_problems(library: Library) -> None:
    if not library.verify().ok:
        raise LibraryCorruptError("as verify says")


def _buffers() -> tuple[np.ndarray, np.ndarray]:
    from support.fake_library import buffers

    return buffers(1)


def test_what_is_known_is_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recallseg.runtime.library import own

    monkeypatch.setenv("RECALLSEG_STATE", str(tmp_path))
    own.remember_bundle("ab", tmp_path / "bundle")
    assert own.known_bundles("ab") == [str(tmp_path / "bundle")]
    (tmp_path / "bundles" / "ab").write_text(json.dumps({"x": 1}))
    assert own.known_bundles("ab") == []
    assert own.known_bundles("../bundles/ab") == []
