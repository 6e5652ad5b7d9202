"""The commands that keep a library in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fake_library import HashEncoder, add, create
from typer.testing import CliRunner

from recallseg import cli
from recallseg.runtime.library import Library
from recallseg.runtime.library.encoding import Origin


def call(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["library", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def answer(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, ["library", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    with create(tmp_path / "library") as made:
        for n in range(4):
            add(made, n, key=f"case {n}")
    return tmp_path / "library"


def test_out_of_use_and_back(library: Path) -> None:
    assert "2 retired; 2 in use, 2 retired" in call("retire", library, "case 1", "case 2")
    assert "retired: case 1, case 2" in call("list", library)
    listed = answer("list", library)
    assert [e["key"] for e in listed["exemplars"]] == ["case 0", "case 3"]
    assert [(e["key"], e["retired"]) for e in listed["retired"]] == [
        ("case 1", True),
        ("case 2", True),
    ]
    assert "'case 1' is retired already" in call("retire", library, "case 1", status=1)
    assert "1 reinstated; 3 in use" in call("reinstate", library, "case 2")
    changes = answer("history", library)
    assert [change["what"] for change in changes] == ["add"] * 4 + ["retire", "reinstate"]
    assert "retire 2 exemplars (case 1, case 2)" in call("history", library)


def test_another_name(library: Path) -> None:
    assert "'nucleus' is 'cell nucleus' now" in call("rename", library, "nucleus", "cell nucleus")
    assert Library.open(library).structures == ("cell nucleus",)
    assert "no exemplar is annotated" in call("rename", library, "nucleus", "x", status=1)
    assert "from: nucleus; to: cell nucleus; 4 exemplars" in call("history", library)


def test_another_library(library: Path, tmp_path: Path) -> None:
    origin = Origin("onnxruntime-cpu", "fp32", {"encode": "ab" * 32}, "0.1.0")
    for name, numbers in (("one", (0, 1)), ("two", (1, 2, 3))):
        with create(tmp_path / name, encoder=HashEncoder(origin=origin)) as made:
            for n in numbers:
                add(made, n, key=f"case {n}")
    with Library.open(tmp_path / "two", mode="write") as two:
        two.retire("case 3")
    result = CliRunner().invoke(
        cli.app, ["library", "merge", str(tmp_path / "one"), str(tmp_path / "two")]
    )
    assert result.stdout == "1 exemplars added\n"
    assert "passed over, LIB has them: case 1" in result.stderr
    assert "passed over, retired in OTHER: case 3" in result.stderr
    again = answer("merge", tmp_path / "one", tmp_path / "two")
    assert again == {
        "added": [],
        "equal": ["case 1", "case 2"],
        "retired": ["case 3"],
        "encoded": [],
        "apart": [],
        "same": [],
    }
    assert "there is no library" in call("merge", library, tmp_path / "no", status=1)


def test_a_copy_and_back(library: Path, tmp_path: Path) -> None:
    report = answer("backup", library, tmp_path / "copy")
    assert report["ok"]
    assert report["exemplars"] == 4
    call("remove", library, "case 0")
    told = call("restore", tmp_path / "copy", library, status=1)
    assert "is newer than the backup" in told
    assert "--over-newer" in told
    assert "4 exemplars" in call("restore", tmp_path / "copy", library, "--over-newer")
    assert len(Library.open(library)) == 4
    assert "is there already" in call("backup", library, tmp_path / "copy", status=1)
