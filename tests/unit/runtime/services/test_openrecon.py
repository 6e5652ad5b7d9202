from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.services.mrd.openrecon import (
    LABEL,
    check_label,
    openrecon_label,
    write_openrecon,
)
from recallseg.runtime.services.settings import Configuration, example

RULES = [{"name": name, "library": "lib"} for name in ("spine", "knee")]


@pytest.fixture
def label() -> dict[str, Any]:
    return openrecon_label(Configuration(rules=RULES, mrd={"returned": {"roi": True}}))


def test_a_label_offers_the_rules_and_what_is_returned(label: dict[str, Any]) -> None:
    assert check_label(label) == []
    config = next(each for each in label["parameters"] if each["id"] == "config")
    assert [value["id"] for value in config["values"]] == ["rules", "spine", "knee"]
    assert next(each for each in label["parameters"] if each["id"] == "roi")["default"] is True
    assert not label["reconstruction"]["can_use_gpu"]
    engine = {"recipe": {"engine": "tensorrt"}}
    gpu = openrecon_label(Configuration(rules=[{**RULES[0], **engine}], mrd={}))
    assert gpu["reconstruction"]["min_count_required_gpus"] == 1


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda found: found.pop("general"), "no 'general'"),
        (lambda found: found["general"].update(version="1"), "three numbers"),
        (lambda found: found["general"]["regulatory_information"].pop("udi"), "udi"),
        (lambda found: found["reconstruction"].update(port=9003), "port"),
        (lambda found: found["reconstruction"].update(transfer_protocol={}), "ISMRMRD"),
        (lambda found: found["reconstruction"].update(can_use_gpu="no"), "can_use_gpu"),
        (lambda found: found["reconstruction"].update(min_required_memory=-1), "memory"),
        (lambda found: found["reconstruction"].update(min_count_required_gpus=1), "cannot use"),
        (lambda found: found["reconstruction"].update(content_qualification_type="X"), "RESEARCH"),
        (lambda found: found["parameters"].extend(found["parameters"] * 2), "14 may be"),
        (lambda found: found["parameters"].pop(0), "choice called 'config'"),
        (lambda found: found["parameters"][0].update(default="liver"), "does not allow"),
        (lambda found: found["parameters"][1].update(type="text"), "of a type"),
        (lambda found: found["parameters"][1].update(id="a b"), "letters"),
        (lambda found: found["parameters"][1].update(label="x"), "English"),
        (
            lambda found: found["parameters"][1].update(type="int", default=5, maximum=4),
            "does not allow",
        ),
    ],
)
def test_labels_that_break_a_rule_are_told(
    label: dict[str, Any], damage: Callable[[dict[str, Any]], object], told: str
) -> None:
    damaged = copy.deepcopy(label)
    damage(damaged)
    assert told in "; ".join(check_label(damaged))


def test_the_command_writes_all_that_an_image_is_built_from(tmp_path: Path) -> None:
    (tmp_path / "mrd.toml").write_text(example("mrd"))
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["mrd", "--config", str(tmp_path / "mrd.toml"), "--openrecon", str(out)]
    )
    assert done.exit_code == 0, done.output
    told = (out / "Containerfile").read_text()
    steps = [line.split()[0] for line in told.splitlines() if not line.startswith(" ")]
    assert steps[:2] == ["ARG", "FROM"]
    assert told.index("COPY --chown=recallseg conf") < told.index("USER recallseg")
    assert "ARG SERVICES=mrd" in told
    assert "EXPOSE 9002" in told
    # The command that joins them, with a builder that only tells what it was given.
    builder = tmp_path / "builder"
    builder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    builder.chmod(0o755)
    (out / "conf" / "mrd.toml").write_text("")
    (out / "recallseg-1.whl").touch()
    ran = subprocess.run(
        ["sh", str(out / "build.sh"), "recallseg:1"],
        env={**os.environ, "BUILDER": str(builder)},
        capture_output=True,
        text=True,
        check=True,
    )
    (given,) = (line for line in ran.stdout.splitlines() if line.startswith(LABEL))
    name, _, value = given.partition("=")
    assert name == LABEL
    label = json.loads(base64.b64decode(value))
    assert label == json.loads((out / "OpenReconLabel.json").read_text())
    assert check_label(label) == []


def test_nothing_is_written_over_and_a_rule_is_needed(tmp_path: Path) -> None:
    configuration = Configuration(rules=RULES, mrd={})
    (tmp_path / "there").touch()
    with pytest.raises(OutputError, match="not empty"):
        write_openrecon(configuration, tmp_path)
    with pytest.raises(InputError, match="a rule"):
        write_openrecon(Configuration(mrd={}), tmp_path / "new")
