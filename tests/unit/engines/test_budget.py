from __future__ import annotations

import json
from math import prod

import pytest
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.budget import PRESETS, largest_k, memory_budget
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.precisions import PRECISIONS
from recallseg.engines.specs import GRAPHS

MIB = 1 << 20


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


def test_scores_are_those_of_the_method(demo: Bundle) -> None:
    """4096 queries on 16 x 4096 keys in fp32 are 1 GiB, and their softmax as much again."""
    budget = memory_budget(demo, k=16, n=1, precision="fp32", image_size=1024)
    assert budget.scores == pytest.approx(2 * 1024 * MIB, rel=1e-3)
    assert budget.exemplar == 4096 * 64 * 4


def test_counted_lines_are_exact(demo: Bundle) -> None:
    budget = memory_budget(demo, k=4, n=2, precision="fp32", shared=False)
    lines = {line.name: line for line in budget.lines}
    tensors = [
        prod(tensor.resolve(n=2, k=4)) * 4
        for spec in (demo.specs[graph] for graph in GRAPHS)
        for tensor in (*spec.inputs, *spec.outputs)
    ]
    assert lines["inputs and outputs of the engines"].size == sum(tensors)
    files = [demo.graph_file(graph, ("portable",), "fp32")[0] for graph in GRAPHS]
    files += [file for graph in GRAPHS for file in demo.weights_files(graph, "portable", "fp32")]
    assert lines["weights"].size == sum(file.stat().st_size for file in files)
    assert {line.kind for line in budget.lines} == {"counted", "estimated", "assumed"}
    assert budget.total == sum(line.size for line in budget.lines)


def test_more_needs_more(demo: Bundle) -> None:
    small = memory_budget(demo, k=4, n=1)
    for larger in (
        memory_budget(demo, k=16, n=1),
        memory_budget(demo, k=4, n=4),
        memory_budget(demo, k=4, n=1, image_size=1024),
        memory_budget(demo, k=4, n=1, precision="fp32"),
    ):
        assert larger.worst > small.worst
    assert memory_budget(demo, k=4, n=1, shared=False).total < small.total


def test_the_largest_k_fits_and_the_next_does_not(demo: Bundle) -> None:
    memory = 4 << 30
    k = largest_k(demo, memory, n=2, image_size=1024)
    assert 1 < k < demo.geometry.max_k
    assert memory_budget(demo, k=k, n=2, image_size=1024).worst <= memory
    assert memory_budget(demo, k=k + 1, n=2, image_size=1024).worst > memory
    assert largest_k(demo, 100 * MIB, n=1) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_even_if_attention_is_not_fused(demo: Bundle, name: str) -> None:
    preset = PRESETS[name]
    budget = memory_budget(
        demo, k=preset.k, n=preset.n, precision=preset.precision, image_size=preset.image_size
    )
    # The demo model is small; SAM 2.1 base+ and DINOv2-B have 170 million weights.
    weights = 170_000_000 * 2
    assert budget.worst + weights <= preset.memory


def test_what_cannot_be_is_refused(demo: Bundle) -> None:
    for wrong in ({"k": 0}, {"n": 0}, {"image_size": 100}, {"precision": "fp8"}):
        with pytest.raises(InputError):
            memory_budget(demo, **{"k": 1, "n": 1, **wrong})


def test_doctor_prints_it() -> None:
    done = CliRunner().invoke(app, ["doctor", "--budget", "--memory", "3"])
    assert done.exit_code == 0, done.output
    assert "not measured on a GPU" in done.stdout
    assert "fits if fused" in done.stdout
    assert "jetson-8gb" in done.stdout
    answer = json.loads(
        CliRunner().invoke(app, ["doctor", "--budget", "--memory", "3", "--json"]).stdout
    )
    assert answer["limit"] == 3 << 30
    assert answer["measured"] is False
    assert {b["image_size"] for b in answer["budgets"]} == {384, 512, 768, 1024}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_a_budget(demo: Bundle, precision: str) -> None:
    budget = memory_budget(demo, k=4, n=1, precision=precision)
    fp32 = memory_budget(demo, k=4, n=1, precision="fp32")
    assert budget.lines[0].size <= fp32.lines[0].size
    assert budget.scores <= fp32.scores
    if precision == "pooled":
        assert budget.scores < 0.3 * fp32.scores


def test_the_bundles_own_limit_is_not_told_as_the_memorys(demo: Bundle) -> None:
    plenty = CliRunner().invoke(app, ["doctor", "--budget", "--memory", "512"]).output
    assert f"n=1: {demo.geometry.max_k}*" in plenty
    assert f"* the bundle's own limit ({demo.geometry.max_k})" in plenty
    little = CliRunner().invoke(app, ["doctor", "--budget", "--memory", "0.5"]).output
    assert "*" not in little.split("largest k")[1]
