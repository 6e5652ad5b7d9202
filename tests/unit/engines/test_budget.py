from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.budget import PRESETS, largest_k, memory_budget
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.precisions import PRECISIONS
from recallseg.engines.specs import GRAPHS
from recallseg.runtime.model.model import Model

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
    assert lines["buffers of the graphs"].size == Model.required_bytes(demo, n=2, k=4, masks=2)
    graphs = [demo.graph_file(graph, ("portable",), "fp32")[0] for graph in GRAPHS]
    constants = [tensor for path in graphs for tensor in onnx.load(path).graph.initializer]
    weights = sum(numpy_helper.to_array(tensor).nbytes for tensor in constants)
    assert lines["weights"].size == weights
    assert {line.kind for line in budget.lines} == {"counted", "estimated", "assumed"}
    assert budget.total == sum(line.size for line in budget.lines)


LIBRARIES = 62 * MIB
"""Pages of programs' files; how many more the system maps beside those that are used (62 to 88 MiB
in all, the same programs) is up to how they came to lie in its cache."""

MEASURE = """
import math, sys, tempfile
import numpy as np
from recallseg import Library, Segmenter
from recallseg.engines.budget import memory_budget

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

precision, n, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = np.random.default_rng(0)
structures = [str(i) for i in range(n)]
with tempfile.TemporaryDirectory() as folder:
    library = Library.create(f"{folder}/library", "demo", threads=1, precision=precision)
    for _ in range(k):
        images = [draw.integers(0, 1000, (256, 256)).astype(np.uint16) for _ in range(n + 1)]
        library.add(images[0], {s: i > 500 for s, i in zip(structures, images[1:], strict=True)})
    for _ in range(2):
        Segmenter(library, k=k, structures=structures, reach=math.inf).segment(images[0])
    one = resident()
    other = Segmenter(
        f"{folder}/library", k=k, structures=structures, reach=math.inf, threads=1,
        precision=precision,
    )
    other.segment(images[0])
    budget = memory_budget(library.bundle, k=k, n=n, precision=precision, engine="onnxruntime-cpu")
    print(one, resident() - one, other.model.nbytes, budget.total)
"""


@pytest.mark.parametrize(("precision", "n", "k"), [("fp32", 1, 4), ("fp32", 4, 8), ("int8", 2, 4)])
def test_a_cpus_budget_is_what_a_process_takes(precision: str, n: int, k: int) -> None:
    """And a second model of the same bundle takes its buffers, not the weights again."""
    command = [sys.executable, "-c", MEASURE, precision, str(n), str(k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, more, buffers, budget = map(int, done.stdout.split())
    assert budget == pytest.approx(taken + LIBRARIES, rel=0.1)
    assert more < buffers + 8 * MIB


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
    # The demo model is small; SAM 2.1 base+ and DINOv2-B have 170 million weights, and layers
    # 448 wide at stride 4, of which four live at once.
    weights = 170_000_000 * 2
    layers = 4 * (preset.image_size // 4) ** 2 * 448 * 2
    assert budget.worst + weights + layers <= preset.memory


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
