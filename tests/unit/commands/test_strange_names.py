"""Files whose names would move the cursor, turn the text or begin a line of their own."""

from __future__ import annotations

import unicodedata
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer
from rich.console import Console
from support.inside import HereDecoder
from typer.testing import CliRunner

from recallseg import Bundle, Library, cli
from recallseg.commands import common
from recallseg.runtime.services import watching

NAMES = (
    *("\x1b[2J\x1b]0;owned\x07", "a\nrecallseg: all is well", "\u202egnp.live", "[red][link=x]"),
    *("=cmd|'C calc'!A0", "a\udcff", "\x9b31m", "--output", "a\rb"),
)


@pytest.fixture(autouse=True)
def decoder_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads takes longer to start than a watch here."""
    monkeypatch.setattr(watching, "IsolatedDecoder", HereDecoder)


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    picture = np.full((40, 40), 90, np.uint8)
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as made:
        made.add(picture, {"[red] half": picture > 0}, key="[/i] e1")
    return tmp_path / "library"


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    picture = np.zeros((40, 40), np.uint8)
    for number, name in enumerate(NAMES):
        done, data = cv2.imencode(".png", picture)
        assert done
        (folder / f"{name}.png").write_bytes(data.tobytes() if number % 2 else b"damaged")
        (folder / f"{name}.mask.png").write_bytes(data.tobytes())
        (folder / f"{name}.txt").write_text("no image")
    return folder


def shown(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    text = done.output
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]
    assert not bad, text
    assert not [line for line in text.splitlines() if line.startswith("recallseg: all is well")]
    return text


def test_no_command_repeats_what_a_terminal_obeys(
    library: Path, inbox: Path, tmp_path: Path
) -> None:
    fake = ("--engine", "fake")
    for more in ((), ("--json",)):
        out = tmp_path / f"out{len(more)}"
        asked = ("--structures", "[red] half", "--k", 1, *fake, *more)
        shown("segment", library, inbox, "--output", out / "s", *asked)
        shown("watch", inbox, "--library", library, "--output", out / "w", "--once",
              "--settle", 0, *asked)  # fmt: skip
        shown("evaluate", library, inbox, "--output", out / "e", "--labels", "1=[red] half",
              *fake, *more)  # fmt: skip
        shown("library", "import", library, inbox, "--labels", "1=[red] half", *fake, *more)
        shown("library", "list", library, *more)
        shown("library", "verify", library, *more)
        shown("library", "history", library, *more)
    for name in NAMES:
        shown("segment", library, "--output", tmp_path / "x", "--", inbox / name)
        shown("verify", "--", inbox / name)
        shown("library", "verify", "--", inbox / name)
        shown("segment", library, inbox / f"{name}.png", "--output", tmp_path / "single", *fake)


def test_square_brackets_are_no_markup_in_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Console] = []

    def console(**options: object) -> Console:
        made.append(Console(force_terminal=True, record=True, width=200, file=StringIO()))
        return made[-1]

    monkeypatch.setattr("rich.console.Console", console)
    with common.progress_bar("[/red] \x1b[2J", 3) as step:
        for name in NAMES:
            step(name)
    text = made[0].export_text()
    assert "[/red]" in text
    assert "owned\x07" not in text


def test_a_defect_is_told_without_what_a_terminal_obeys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise ValueError(NAMES[0])

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises((SystemExit, typer.Exit)):
        cli.main()
    assert "\x1b" not in capsys.readouterr().err
