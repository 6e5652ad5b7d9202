"""Every command answers a program too, and says what must be said of the weights once."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import typer
from support.fake_library import add, create
from typer.testing import CliRunner

from recallseg import cli
from recallseg.runtime.library import Library

WITHOUT_JSON = {
    "audit key": "writes a file, and prints its digest",
    "audit rotate": "prints one path",
    "config example": "prints a configuration, which is TOML",
    "export-triton": "writes a folder, whose files a program reads",
    "mrd": "serves until it is stopped; a program asks its protocol and metrics",
    "sbom": "writes a bill of materials, which is JSON",
    "serve": "serves until it is stopped; a program asks its interface and metrics",
    "igtl": "serves until it is stopped; a program asks its protocol and metrics",
    "sign bundle": "writes the signature that it was asked for; 'sign check --json' tells of it",
    "sign file": "writes the signature that it was asked for; 'sign check --json' tells of it",
    "sign key": "prints one line, which goes into a file of trusted keys as it is",
}
"""Why a command has no --json."""
MOUNTED = {
    "export": ("recallseg.export.commands", "export"),
    "convert": ("recallseg.export.commands", "convert"),
    "export-triton": ("recallseg.export.triton.commands", "export_triton_command"),
    "sbom": ("recallseg.commands.sbom", "sbom"),
}
"""Those that are imported when they are called; 'bench' writes its reports, all of them JSON."""


def commands() -> Iterator[tuple[str, Any]]:
    def walk(command: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, one in getattr(command, "commands", {}).items():
            yield from walk(one, (*names, name))
        if not hasattr(command, "commands"):
            yield " ".join(names), command

    for name, command in walk(typer.main.get_command(cli.app), ()):
        if name in MOUNTED:
            module, attribute = MOUNTED[name]
            real = typer.Typer(add_completion=False)
            real.command(name)(getattr(importlib.import_module(module), attribute))
            yield name, typer.main.get_command(real)
        elif name != "bench":
            yield name, command


def test_every_command_has_json_or_a_reason() -> None:
    pytest.importorskip("torch", reason="commands that export")
    without = {
        name
        for name, command in commands()
        if not any("--json" in option.opts for option in command.params)
    }
    assert without - WITHOUT_JSON.keys() == set()
    assert without >= WITHOUT_JSON.keys()


def answer(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1", "COLUMNS": "70"}])
def test_a_key_is_listed_whole_for_the_next_command(
    tmp_path: Path, terminal: dict[str, str]
) -> None:
    with create(tmp_path / "library") as made:
        for n in range(3):
            add(made, n, key=f"{n:032x}", tags={"site": "a hospital with a long name", "view": "4"})
    found = CliRunner().invoke(
        cli.app, ["library", "list", str(tmp_path / "library")], env=terminal
    )
    assert found.exit_code == 0, found.output
    for n in range(3):
        (line,) = [line for line in found.stdout.splitlines() if f"{n:032x}" in line]
        assert terminal or "view=4" in line  # elsewhere a line is an exemplar
    assert "…" not in found.stdout
    assert "view=4" in "".join(found.stdout.split())


def test_what_changes_a_library_answers_with_its_state(tmp_path: Path) -> None:
    path = tmp_path / "library"
    with create(path) as made:
        for n in range(4):
            add(made, n, key=f"case {n}")
    done = answer("library", "retire", path, "case 1", "case 2")
    assert done["retired"] == ["case 1", "case 2"]
    assert done["library"]["exemplars"] == 2
    assert done["library"]["retired"] == 2
    assert answer("library", "reinstate", path, "case 1")["reinstated"] == ["case 1"]
    assert answer("library", "rename", path, "nucleus", "cell")["renamed"] == {"nucleus": "cell"}
    removed = answer("library", "remove", path, "case 2", "--compact")
    assert removed["removed"] == ["case 2"]
    assert removed["freed_bytes"] > 0
    assert removed["library"]["structures"] == ["cell"]
    answer("library", "backup", path, tmp_path / "copy")
    reverted = answer("library", "revert", path, 1)
    assert reverted["retired"] == ["case 1", "case 3"]
    assert [change["what"] for change in reverted["kept"]] == ["rename_structure", "compact"]
    restored = answer("library", "restore", tmp_path / "copy", path, "--over-newer")["library"]
    with Library.open(path) as library:
        assert restored == {
            "path": str(path),
            "digest": library.digest,
            "bundle_identity": library.bundle_identity,
            "exemplars": 3,
            "retired": 0,
            "structures": ["cell"],
        }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture = np.random.default_rng(0).integers(0, 60, (64, 64), np.uint8)
    picture[20:40, 20:40] += 100
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), picture)
    cv2.imwrite(str(folder / "a.mask.png"), (picture > 99).astype(np.uint8))
    return folder / "a.png"


def banners(*arguments: object, status: int = 0) -> int:
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    assert "DEMO MODEL" not in result.stdout
    return result.stderr.count("DEMO MODEL")


def test_the_banner_comes_once_and_after_the_input_was_checked(tmp_path: Path, image: Path) -> None:
    library, nowhere = tmp_path / "library", tmp_path / "nowhere.png"
    labels = ("--labels", "1=square")
    assert banners("library", "create", library, "--bundle", "demo") == 1
    assert banners("library", "add", library, nowhere, *labels, status=1) == 0
    assert banners("library", "add", library, image, *labels) == 1
    assert banners("library", "import", library, image.parent, status=1) == 0  # no labels
    assert banners("library", "import", library, nowhere, *labels, status=1) == 0
    assert banners("library", "import", library, image.parent, *labels) == 1
    assert banners("segment", library, nowhere, "--output", tmp_path / "out", status=1) == 0
    unknown = ("--structures", "liver")
    out = ("--output", tmp_path / "out")
    assert banners("segment", library, image, *out, *unknown, status=1) == 0
    assert banners("segment", library, image, *out) == 1
    for command in (("library", "calibrate", library), ("library", "fit", library)):
        assert banners(*command, *unknown, status=1) == 0
    assert banners("library", "next", library, image.parent, *unknown, status=1) == 0
    assert banners("library", "next", library, image.parent, status=1) == 0  # all are in it
    new = tmp_path / "new"
    new.mkdir()
    cv2.imwrite(str(new / "b.png"), cv2.imread(str(image))[::-1])
    assert banners("library", "next", library, new, "--count", 1) == 1
    assert banners("evaluate", library, image.parent, *out, *labels, *unknown, status=2) == 0
    assert banners("library", "rebuild", library) == 1
    assert banners("verify", "demo", "--most-memory", "much", status=1) == 0
    target = ("--target", "nothing")
    assert banners("build", "demo", *target, status=2) == 0


def test_the_demo_says_it_once_and_first_checks_where_it_writes(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "mine.txt").write_text("not an earlier demo's")
    assert banners("demo", "--output", tmp_path, status=1) == 0


def test_a_repository_for_triton_says_it_as_all_commands_do(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="commands that export")
    command = ("export-triton", "demo", "--output", tmp_path / "triton", "--device", "cpu")
    assert banners(*command) == 1
