"""Releases of libraries: one signed file in, the same library out, and no changed bit between."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import tarfile
from pathlib import Path

import pytest
from support.fake_library import HashEncoder, add, create, draw
from support.records import check_written

from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    SignatureError,
)
from recallseg.engines.signing import PublicKey, SigningKey, create_key, sign_document
from recallseg.runtime.library import Library, releases
from recallseg.runtime.library.comparing import compare
from recallseg.runtime.library.installing import install, installed, roll_back
from recallseg.runtime.library.releases import read_release, unpack
from recallseg.runtime.model.preprocess import Intensity

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    path = tmp_path_factory.mktemp("keys") / "maker"
    create_key(path)
    return SigningKey.read(path)


@pytest.fixture
def trust(signer: SigningKey) -> list[PublicKey]:
    return [signer.public]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    made = create(tmp_path / "livers")
    for number in range(4):
        add(made, number, key=f"case {number}", tags={"view": "axial"})
    return made


def opened(path: Path) -> Library:
    return Library.open(path, encoder=HashEncoder())


def test_what_is_installed_is_what_was_released(
    library: Library, signer: SigningKey, trust: list[PublicKey], tmp_path: Path
) -> None:
    file = tmp_path / "a.release"
    described = library.release(file, version="1.2.0", key=signer, images=True)
    assert read_release(file, trust) == described
    assert install(file, tmp_path / "site", trust) == described
    with opened(tmp_path / "site" / "current") as got:
        assert got.verify().ok
        assert got.digest == library.digest == described.library
        assert [one.key for one in got] == [one.key for one in library]
        assert (got.source("case 1")[0] == draw(1)[0]).all()
    assert "who" not in (tmp_path / "site" / "1.2.0.json").read_text()
    with tarfile.open(file) as listed:
        assert listed.getnames()[:3] == [
            "release.json",
            "release.json.sig",
            "library/library.sqlite",
        ]
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_images_none_travel_and_nothing_names_who_or_where(
    library: Library, signer: SigningKey, trust: list[PublicKey], tmp_path: Path
) -> None:
    described = library.release(tmp_path / "a.release", version="1.0.0", key=signer)
    assert not described.images
    assert not [name for name in described.files if "sources" in name]
    unpack(tmp_path / "a.release", tmp_path / "out", trust)
    with opened(tmp_path / "out") as got:
        assert got.verify().ok
        assert not got.keeps_sources
        assert [change.what for change in got.history()] in ([], ["unrecorded"])
    content = (tmp_path / "a.release").read_bytes()
    assert b"no-such-bundle" not in content  # the path of the bundle where it was made
    image = draw(0)[0].tobytes()
    assert image not in content


def test_any_changed_bit_is_refused_with_its_place(
    library: Library, signer: SigningKey, trust: list[PublicKey], tmp_path: Path
) -> None:
    file = tmp_path / "a.release"
    library.release(file, version="1.0.0", key=signer, images=True)
    content = bytearray(file.read_bytes())
    rng = random.Random(5)
    places = [
        *range(0, 520, 37),
        *(rng.randrange(len(content)) for _ in range(150)),
        len(content) - 1,
    ]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises((LibraryCorruptError, SignatureError)) as refused:
            install(tmp_path / "changed", tmp_path / "site", trust)
        where = "release.json" if isinstance(refused.value, SignatureError) else "from byte"
        assert where in str(refused.value)
    assert [each.name for each in (tmp_path / "site").iterdir()] == ["install.lock"]
    for cut in (0, 100, 3000, len(content) - 1):
        (tmp_path / "changed").write_bytes(content[:cut])
        with pytest.raises((LibraryCorruptError, SignatureError)):
            install(tmp_path / "changed", tmp_path / "site", trust)
    (tmp_path / "changed").write_bytes(content + b"\0")
    with pytest.raises(LibraryCorruptError, match=r"its end, from byte"):
        install(tmp_path / "changed", tmp_path / "site", trust)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", [["library/library.sqlite", 1e999, "ab"]]),
        ("files", [["library/library.sqlite", -1, "ab"]]),
        ("files", [["library/library.sqlite", 1, None]]),
        ("files", [["library/../library.sqlite", 1, "ab"]]),
        ("files", [["library/library.sqlite", 1, "ab"]] * 2),
        ("files", [[[], {}, None]]),
        ("files", []),
        ("files", {"a": 1}),
        ("files", None),
        ("library", 1.5),
        ("library", {}),
        ("library", None),
        ("version", 1),
        ("version", "../1.0.0"),
        ("name", ["a"]),
        ("exemplars", True),
        ("images", "yes"),
        ("structures", "disc"),
        ("structures", [1]),
        ("calibrated", None),
        ("evaluation", [1]),
        ("sbom", "none"),
        ("another", "field"),
    ],
)
def test_who_is_trusted_can_err(
    library: Library,
    signer: SigningKey,
    trust: list[PublicKey],
    tmp_path: Path,
    field: str,
    value: object,
) -> None:
    described = library.release(tmp_path / "a.release", version="1.0.0", key=signer)
    stated = json.dumps({**described.to_json(), field: value}).encode()
    made = io.BytesIO()
    for name, content in (
        ("release.json", stated),
        ("release.json.sig", sign_document("release", stated, signer)),
    ):
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o600
        made.write(entry.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    (tmp_path / "a.release").write_bytes(made.getvalue() + bytes(1024))
    with pytest.raises(LibraryError, match=re.escape(str(tmp_path / "a.release"))):
        install(tmp_path / "a.release", tmp_path / "site", trust)
    assert not (tmp_path / "site" / "current").exists()


def test_only_trusted_keys_count(library: Library, signer: SigningKey, tmp_path: Path) -> None:
    create_key(tmp_path / "other")
    library.release(
        tmp_path / "a.release", version="1.0.0", key=SigningKey.read(tmp_path / "other")
    )
    with pytest.raises(SignatureError, match=r"not trusted"):
        install(tmp_path / "a.release", tmp_path / "site", [signer.public])


def test_releases_stand_side_by_side_and_one_can_go_back(
    library: Library, signer: SigningKey, trust: list[PublicKey], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    library.release(tmp_path / "1", version="1.9.0", key=signer)
    add(library, 9, key="case 9")
    library.release(tmp_path / "2", version="1.10.0", key=signer)
    with pytest.raises(LibraryError, match=r"none to go back to"):
        roll_back(site)
    install(tmp_path / "1", site, trust)
    with opened(site / "current") as used:
        install(tmp_path / "2", site, trust)
        assert len(used) == 4  # who has it open goes on
        with opened(site / "current") as newer:
            found = compare(used, newer)
    assert (found.added, found.removed, dict(found.changed)) == (("case 9",), (), {})
    with pytest.raises(InputError, match=r"older than 1.10.0"):
        install(tmp_path / "1", site, trust)
    assert roll_back(site).version == "1.9.0"
    used_now = installed(site)
    assert used_now is not None
    assert used_now.version == "1.9.0"
    assert os.readlink(site / "previous") == "1.10.0"
    assert roll_back(site).version == "1.10.0"


def test_what_is_in_use_and_cannot_be_read_is_not_taken_for_nothing(
    library: Library,
    signer: SigningKey,
    trust: list[PublicKey],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older release would take the place of the one in use."""
    site = tmp_path / "site"
    library.release(tmp_path / "1", version="1.0.0", key=signer)
    add(library, 9)
    library.release(tmp_path / "2", version="2.0.0", key=signer)
    install(tmp_path / "2", site, trust)

    def readlink(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as failing:
        failing.setattr(os, "readlink", readlink)
        for act in (lambda: install(tmp_path / "1", site, trust), lambda: installed(site)):
            with pytest.raises(LibraryError, match=r"current cannot be read: Input/output error"):
                act()
    assert os.readlink(site / "current") == "2.0.0"


def test_another_release_of_the_same_version_is_refused(
    library: Library, signer: SigningKey, trust: list[PublicKey], tmp_path: Path
) -> None:
    library.release(tmp_path / "1", version="1.0.0", key=signer)
    install(tmp_path / "1", tmp_path / "site", trust)
    install(tmp_path / "1", tmp_path / "site", trust)  # again: nothing to do
    add(library, 9)
    library.release(tmp_path / "2", version="1.0.0", key=signer)
    with pytest.raises(InputError, match=r"another release 1.0.0"):
        install(tmp_path / "2", tmp_path / "site", trust)
    with pytest.raises(InputError, match=r"three numbers"):
        library.release(tmp_path / "3", version="v1", key=signer)
    assert not (tmp_path / "3").exists()


def test_what_changed_between_two_libraries(library: Library, tmp_path: Path) -> None:
    library.backup(tmp_path / "before")
    library.remove("case 0")
    library.replace_mask("case 1", "nucleus", draw(50)[1])
    library.retag("case 2", {"view": "coronal"})
    with opened(tmp_path / "before") as before:
        found = compare(before, library)
    assert found.removed == ("case 0",)
    assert dict(found.changed) == {"case 1": ("masks",), "case 2": ("tags",)}
    assert compare(library, library).to_json()["changed"] == {}
    assert found
    assert not compare(library, library)


def test_what_is_only_out_of_use_or_of_another_name_is_not_gone(
    library: Library, tmp_path: Path
) -> None:
    library.retire("case 0")
    library.backup(tmp_path / "before")
    library.reinstate("case 0")
    library.retire("case 1")
    library.rename_structure("nucleus", "cell")
    with opened(tmp_path / "before") as before:
        found = compare(before, library)
        back = compare(library, before)
    assert (found.added, found.removed) == ((), ())
    assert (found.retired, found.reinstated) == (("case 1",), ("case 0",))
    assert (back.retired, back.reinstated) == (("case 0",), ("case 1",))
    assert {*found.changed.values()} == {("structures",)}
    assert (found.structures_added, found.structures_removed) == (("cell",), ("nucleus",))
    check_written(found.to_json())


def test_the_same_images_under_other_keys_are_the_same(library: Library, tmp_path: Path) -> None:
    other = create(tmp_path / "other", memory_format="int8", intensity=Intensity("window", 0, 99))
    for exemplar in library:
        image, masks = library.source(exemplar.key)
        key = f"other {exemplar.key}"
        other.add(image, masks, key=key, tags=exemplar.tags, absent=exemplar.absent)
    other.add(draw(77)[0], {"nucleus": draw(77)[1]}, key="new")
    other.store_calibrations("ab" * 32, {"nucleus": {}}, "new")
    found = compare(library, other)
    assert dict(found.renamed) == {one.key: f"other {one.key}" for one in library}
    assert (found.added, found.removed, dict(found.changed)) == (("new",), (), {})
    assert found.settings["memories"] == ("fp16", "int8")
    assert found.settings["calibrated"] == ("none", f"nucleus (recipe {'ab' * 6})")
    assert {*found.settings} == {"memories", "intensity", "calibrated"}
    check_written(found.to_json())
    other.close()


def test_why_dice_is_not_compared_is_said(library: Library) -> None:
    dice = {"nucleus": {"cases": 2, "mean": 0.9}}
    one = {"k": 4, "cases": "ab", "dice": dice, "provenance": {"recipe": {"digest": "ef" * 32}}}
    for both, told in (
        ((None, None), "neither was evaluated"),
        ((one, None), "B was not evaluated"),
        ((None, one), "A was not evaluated"),
        ((one, {**one, "cases": "cd"}), "other cases"),
        ((one, {**one, "dice": {}}), "no structure in common"),
        ((one, one), ""),
    ):
        found = compare(library, library, both)
        assert told in found.uncompared
        assert bool(found.uncompared) is bool(told)
        assert bool(found.dice) is not bool(told)
        check_written(found.to_json())
    found = compare(library, library, (one, {**one, "k": 8}))
    assert found.settings["evaluated"] == (
        f"k = 4, recipe {'ef' * 6}",
        f"k = 8, recipe {'ef' * 6}",
    )


def test_an_evaluation_of_another_state_is_not_released(
    library: Library, signer: SigningKey, tmp_path: Path
) -> None:
    evaluation = {"k": 4, "cases": "ab", "dice": {}}
    measured = {**evaluation, "provenance": {"library_digest": library.digest}}
    file = tmp_path / "a.release"
    library.release(file, version="1.0.0", key=signer, evaluation=measured)
    library.release(file, version="1.0.0", key=signer, evaluation=evaluation)
    add(library, 9, key="since then")
    with pytest.raises(LibraryError, match="of another state of the library"):
        library.release(tmp_path / "b.release", version="1.1.0", key=signer, evaluation=measured)
    assert [path.name for path in tmp_path.glob("*b.release*")] == []


def test_a_release_that_nobody_could_read_is_not_written(
    library: Library, signer: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, copied = tmp_path / "a.release", []
    real = releases.backups.backup
    monkeypatch.setattr(
        releases.backups, "backup", lambda *a, **k: (copied.append(1), real(*a, **k))[1]
    )
    for most, copies in ((4 * 119, 0), (4 * 121, 1)):
        monkeypatch.setattr(releases, "_MOST_MANIFEST", most)
        with pytest.raises(LibraryError, match="Release it without images"):
            library.release(path, version="1.2.0", key=signer, images=True)
        assert len(copied) == copies
    assert not path.exists()
    assert {item.name for item in tmp_path.iterdir()} == {"livers"}
