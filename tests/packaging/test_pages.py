"""What pages say is there: links, anchors, citations, commands, options; every block parses.

Blocks that are marked ``<!-- run -->`` are run, by test_pages_run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT, anchors, blocks, pages

pytest.importorskip("mkdocs", reason="the extra 'docs'")
sys.path.append(str(ROOT / "scripts" / "docs"))

from options import commands
from schemas import generated

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINK = re.compile(r"\]\(([^)#\s<>]*)(#[^)\s]*)?\)")
CITED = re.compile(r"\bdocs/[\w./-]+?\.(?:md|json)\b")
PITFALL = re.compile(r"\bpitfalls? (\d+)(?: (?:to|and) (\d+))?")
NO_DOCS = ("tests/fixtures/", "CHANGELOG.md")  # former headers, and what former versions changed
HEARSAY = {"docs/operators.md"}  # of onnx-tensorrt


@pytest.fixture(params=pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link, anchor in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / link if link else page
        if page == ROOT / "docs" / "index.md" and link.startswith("reference/"):
            continue  # made with the site, which is built strictly
        assert target.exists(), f"{link} of {page.name}"
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{link}{anchor} of {page.name}"


def test_blocks_can_be_read(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
        elif block.language == "python":
            compile(block.text, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        else:
            assert block.language in ("", "text", "c", "cmake", "css"), block.language


def test_shell_blocks_call_commands_that_there_are(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("sh", "bash"):
            assert "\nrecallseg " not in f"\n{block.text}" or block.language == "text", "say 'sh'"
            continue
        for line in block.text.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True)
            if "recallseg" in words[:2]:
                check_call(words[words.index("recallseg") + 1 :], line)


def check_call(words: list[str], line: str) -> None:
    name, known = "recallseg", dict(known_options())
    while words and words[0].startswith("--"):
        assert words[0] in known[name], line
        words = words[2:] if words[0] == "--trust" else words[1:]
    while words and f"{name} {words[0]}" in known:
        name, words = f"{name} {words[0]}", words[1:]
    assert name != "recallseg" or not words, f"there is no such command: {line}"
    for word in words:
        if word in (";", "|", "||", "&&", ">"):
            break
        if word.startswith("--") and len(word) > 2:
            assert word.split("=")[0] in known[name], f"{name} has no {word}: {line}"


@cache
def known_options() -> dict[str, set[str]]:
    return {
        name: {"--help"}.union(*(set(each.opts + each.secondary_opts) for each in command.params))
        for name, command in commands()
    }


def test_inline_commands_are_there(page: Path) -> None:
    known = known_options()
    for said in re.findall(
        r"`recallseg ([a-z][a-z-]*(?: [a-z][a-z-]*)?)", page.read_text(encoding="utf-8")
    ):
        words = said.split()
        first = f"recallseg {words[0]}"
        assert first in known, said
        if len(words) > 1 and any(name.startswith(f"{first} ") for name in known):
            assert f"{first} {words[1]}" in known, said


def test_citations_in_the_source_lead_somewhere() -> None:
    listed = subprocess.run(
        ["git", "grep", "-InE", r"docs/[a-z]|\b[Pp]itfalls? [0-9]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    numbers = {
        int(n)
        for n in re.findall(
            r"^\*\*(\d+)\. ", (ROOT / "docs/contribute/pitfalls.md").read_text(), re.MULTILINE
        )
    }
    found = 0
    for line in listed.stdout.splitlines():
        name, _, said = line.partition(":")
        if name.startswith(NO_DOCS) or name == "tests/packaging/test_pages.py":
            continue
        for cited in CITED.findall(said):
            assert cited in HEARSAY or (ROOT / cited).is_file(), line
            found += 1
        for first, last in PITFALL.findall(said):
            assert set(range(int(first), int(last or first) + 1)) <= numbers, line
            found += 1
    assert found > 40
    gone = ["git", "grep", "-nwE", "PITFALLS|INTERFACES|ECOSYSTEM|DESIGN", "--", ":!CHANGELOG.md"]
    listed = subprocess.run(gone, cwd=ROOT, capture_output=True, text=True)
    assert [line for line in listed.stdout.splitlines() if "test_pages.py" not in line] == []


WHEN = re.compile(r"\d{1,2}(?: \(Zen \d\))?(?: and \d{1,2})? November 2026|2026-11-\d\d")
WHERE = re.compile(r"EPYC|Zen|H100|\bmachine (?:was|and command were) not\b")
HOW = re.compile(
    r"`(?:PYTHONPATH=\S+ )?(?:recallseg|python|pytest) [^`]*`|`(?:scripts|tests)/[^`]*`"
    r"|command\s+was\s+not\s+recorded|machine and command were not"
)
TIMES = re.compile(r"\d+(?:\.\d+)? (?:ms|MB/s|GB/s|GFLOP/s|frames/s)\b|\bmilliseconds\b|\bDice\b")
TIMED = re.compile(
    r"\b\d+\.\d+ (?:ms|s)\b|\b(?:median|percentile|p50|p95|p99|took)\b[^.]*?\d (?:ms|s|seconds)\b",
    re.DOTALL,
)
"""Durations in prose that somebody measured."""
COUNTED = {  # sizes and versions, figures of others, definitions
    ("jetson.md", "What the system gives, what pip gives"),
    ("networks.md", "Which networks there are"),
    ("pitfalls.md", "Exporting"),
    ("pitfalls.md", "Precision and engines"),
    ("architecture.md", "Decisions"),
    ("c.md", "Threads"),
    ("status.md", "Not run on a GPU yet"),  # predicted
}


def test_figures_say_when_where_and_how_they_were_measured() -> None:
    checked, wrong = 0, []
    for page in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for section in re.split(r"^(?=##+ )", text, flags=re.MULTILINE):
            title = section.split("\n")[0].lstrip("# ")
            numbers = re.findall(r"^\|.*\d+\.\d+", section, re.MULTILINE)
            table = len(numbers) >= 3 and TIMES.search(section)
            if (page.name, title) in COUNTED or not (table or TIMED.search(section)):
                continue
            wrong += [
                f"{page.name}, {title}: {what.pattern}"
                for what in (WHEN, WHERE, HOW)
                if not what.search(section)
            ]
            checked += 1
    assert not wrong
    assert checked > 25


def test_schemas_that_are_made_from_the_source_are_published() -> None:
    """By their fields: how a type is put differs between versions of pydantic."""

    def fields(schema: dict[str, Any]) -> dict[str, Any]:
        return {
            name: (sorted(each.get("properties", {})), sorted(each.get("required", ())))
            for name, each in [("", schema), *schema.get("$defs", {}).items()]
        }

    for name, schema in generated().items():
        published = json.loads((ROOT / "docs" / "schemas" / name).read_text(encoding="utf-8"))
        assert fields(schema) == fields(published), "run scripts/docs/schemas.py"


def test_examples_of_a_configuration_follow_its_schema() -> None:
    from jsonschema_rs import Draft202012Validator, meta

    from recallseg.runtime.services.settings import EXAMPLES

    schema = json.loads((ROOT / "docs/schemas/configuration.json").read_text(encoding="utf-8"))
    meta.validate(schema)
    checked = Draft202012Validator(schema)
    for path in EXAMPLES.glob("*.toml"):
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        checked.validate(given)
        given["nod"] = {}
        assert not checked.is_valid(given)


def test_every_extra_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/use/install.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert told == set(project["optional-dependencies"])


def test_interfaces_names_what_there_is() -> None:
    from recallseg.engines import bundle
    from recallseg.engines.precisions import PRECISIONS
    from recallseg.engines.registry import ENGINES
    from recallseg.engines.specs import GRAPHS
    from recallseg.runtime.library import database

    text = (ROOT / "docs/contribute/interfaces.md").read_text(encoding="utf-8")
    named = {
        row: set(re.findall(r"`([\w-]+)`", said))
        for row, said in re.findall(
            r"^\| (graphs|precisions|engines|operators of our own) \| (.+) \|$", text, re.M
        )
    }
    assert named["precisions"] == set(PRECISIONS)
    assert named["engines"] == set(ENGINES)
    assert named["graphs"] == {*GRAPHS, "correct"}
    sources = [*(ROOT / "engines/native/operators").glob("*.cpp")]
    registered = re.findall(r'kName = "(\w+)"', "".join(file.read_text() for file in sources))
    assert named["operators of our own"] - {"recallseg"} == set(registered)
    formats = dict(re.findall(r"^\| format of (\w+) \| (\d+);", text, re.M))
    assert formats == {
        "catalogs": str(database.FORMAT_VERSION),
        "bundles": str(bundle.FORMAT_VERSION),
    }


def test_the_site_is_built_and_its_reference_is_whole(tmp_path: Path) -> None:
    """As users build it: strict about links and anchors, nothing fetched."""
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "scripts" / "build-docs"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    check_commands(tmp_path)
    check_sources(tmp_path)


def check_commands(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r'<h[23] id="([\w-]+)">', text)[1:])] * 2, strict=True))
    counted = 0
    for name, command in commands():
        section = sections[name.removeprefix("recallseg ").replace(" ", "-")]
        for each in command.params:
            for option in each.opts + each.secondary_opts:
                if option.startswith("--") and option != "--help" and not each.hidden:
                    assert re.search(rf"{option}[ <,]", section), f"{name} {option}"
                    counted += 1
    assert counted > 250


def check_sources(site: Path) -> None:
    reference = site / "reference"
    metrics = (reference / "metrics.html").read_text(encoding="utf-8")
    from recallseg.runtime.services.metrics import Metrics

    exposed = re.findall(r"^# TYPE (\w+) ", Metrics("x").text().decode(), re.MULTILINE)
    assert len(exposed) >= 5
    for name in exposed:
        assert f"<code>{name}</code>" in metrics
    configuration = (reference / "configuration.html").read_text(encoding="utf-8")
    for name in settings():
        assert f"<code>{name}</code>" in configuration, name
    header = ROOT / "engines" / "native" / "capi" / "include" / "recallseg.h"
    names = re.findall(r"RECALLSEG_API[^;(]*?(recallseg_\w+)\(", header.read_text())
    c = re.sub(r"<[^>]+>", "", (reference / "c.html").read_text(encoding="utf-8"))
    assert len(names) > 40
    for name in names:
        assert c.count(name) >= 2, name
    import recallseg

    shown = "".join(p.read_text(encoding="utf-8") for p in (reference / "python").glob("*.html"))
    for name in set(recallseg.__all__) - {"__version__", "errors"}:
        assert re.search(rf'<h[12] id="[\w.]+\.{name}"', shown), name
    for number, _ in re.findall(
        r"(\d+) (done|could not|called wrongly|interrupted)", recallseg_help()
    ):
        assert f"<td>{number}</td>" in (reference / "status.html").read_text(encoding="utf-8")


def settings() -> set[str]:
    """Every key of the examples that are shipped, which are not what the page is made from."""
    from recallseg.runtime.services.settings import EXAMPLES

    def keys(table: Any) -> set[str]:
        if isinstance(table, list):
            return set().union(*map(keys, table))
        if not isinstance(table, dict):
            return set()
        inner = {name: value for name, value in table.items() if name not in ("destinations",)}
        return {k for k, v in inner.items() if not isinstance(v, (dict, list))}.union(
            *map(keys, inner.values())
        )

    found = set()
    for path in EXAMPLES.glob("*.toml"):
        found |= keys(tomllib.loads(path.read_text(encoding="utf-8")))
    assert {"quiet_s", "deadline_ms", "state"} <= found
    return found


def recallseg_help() -> str:
    from recallseg import cli

    return cli.__doc__ or ""
