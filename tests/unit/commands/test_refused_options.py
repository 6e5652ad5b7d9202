"""Options that contradict each other, or that mean nothing, are refused before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recallseg.cli import app

EVALUATE = ("evaluate", "library", "annotated", "--output", "out")
GROUPED = ("--group-by", "folder")
SPLIT = ("--split-by", "patient")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("library", "create", "x", "--bundle", "demo", "--intensity", "range:0:4095"),
         "range is that of the pixels' type; of these ends, window:0:4095"),
        (("library", "create", "x", "--bundle", "demo", "--intensity", "window"),
         "a window needs its ends"),
        ((*EVALUATE, "--spacing", "0.7"), "positive numbers like 0.7,0.7, got '0.7'"),
        ((*EVALUATE, "--spacing", "nan,1"), "two positive numbers like 0.7,0.7"),
        ((*EVALUATE, "--folds", "3"), "--folds goes with --split-by"),
        ((*EVALUATE, *SPLIT, *GROUPED), "--group-by without it"),
        ((*EVALUATE, *SPLIT, *GROUPED, "--folds", "3"), "--group-by without it"),
        ((*EVALUATE, "--split-by", "name:(", "--folds", "3"), "no regular expression"),
        ((*EVALUATE, "--group-by", "age"), "patient, folder, file or name:REGEX"),
        ((*EVALUATE, "--k", "1,,4"), "has an empty entry"),
        ((*EVALUATE, "--k", "4,4"), "names something twice"),
        (("library", "import", "x", "y", "--tag", "modality"), "must read like modality=MR"),
        (("library", "install"), "give a FILE to install, or --rollback"),
        (("library", "import", "x", "y", "--labels", "70000=liver"), "label 70000 is too large"),
        (("node",), "name the configuration"),
        (("mrd",), "name the configuration"),
    ],
)  # fmt: skip
def test_what_is_said_of_it(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    told = re.sub(r"[\s│]+", " ", done.output)
    assert done.exit_code == 2, told
    assert said in told
    assert not [*tmp_path.iterdir()]
