"""``bench gpu`` from end to end on stand-ins: pieces, what is left empty, goals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.fake_onnxruntime import FakeSession, install
from support.fake_tensorrt import HostGpu
from typer.testing import CliRunner

from recallseg.benchmarks import latency
from recallseg.benchmarks.commands import bench
from recallseg.benchmarks.gpu import adding, apart, graphs, kernels, pieces, running
from recallseg.benchmarks.gpu.device_tests import files_of, run_tests
from recallseg.benchmarks.gpu.goals import judge
from recallseg.benchmarks.gpu.pieces import GpuPlan, Piece
from recallseg.benchmarks.gpu.running import Outcome, here, run_pieces
from recallseg.benchmarks.schema import VERSION, Report
from recallseg.engines import onnxruntime_gpu
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import (
    DeviceLostError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
)
from recallseg.runtime.model import device as device_query

RUNTIME = "onnxruntime-cuda fp32 graphs"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeSession]:
    made = install(monkeypatch, tmp_path / "cache")
    for module in (graphs, kernels, pieces, device_query, onnxruntime_gpu):
        monkeypatch.setattr(module, "open_device", lambda *_: HostGpu.open())
    # A process of its own would have no stand-in.
    monkeypatch.setattr(latency, "probe", lambda *args, **kwargs: None)
    monkeypatch.setattr(apart, "in_a_process", lambda plan: here)
    monkeypatch.setattr(adding, "ROUNDS", 1)
    monkeypatch.setattr(adding, "EXEMPLARS", 2)
    return made


def run(output: Path, *options: str, bundle: Bundle) -> Any:
    arguments = ["gpu", str(bundle.path), "--output", str(output), *options]
    return CliRunner().invoke(bench, arguments)


def contents(output: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_bytes()) for file in sorted(output.glob("*.json"))}


def test_everything_in_one_command(
    session: type[FakeSession], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = (
        *("--engine", "onnxruntime-cuda,tensorrt-rtx", "--precision", "fp32,fp16", "--k", "1,2"),
        *("--structures", "1", "--queries", "2"),
    )
    done = run(output, *options, bundle=tiny_bundle)
    assert done.exit_code == 0, done.output
    found = contents(output)
    states = {name: piece["state"] for name, piece in found.items() if name != "goals"}
    graph = "tiny-onnxruntime-cuda-fp32"
    assert {name for name, state in states.items() if state == "measured"} == {
        "machine", f"graphs-{graph}", f"graphs-{graph}-graphs", f"queries-{graph}-k1",
        f"queries-{graph}-k2", f"queries-{graph}-graphs-k1", f"queries-{graph}-graphs-k2",
        f"flights-{graph}", f"flights-{graph}-graphs", "adding-tiny",
    }  # fmt: skip
    # Neither fp16 graphs nor plans nor kernels are here: said, not invented.
    assert set(states.values()) == {"measured", "empty"}
    assert "not built" in found["kernels"]["reason"]
    report = Report.from_json(found[f"queries-{graph}-graphs-k2"]["found"])
    (only,) = report.runs
    assert (only.cuda_graph, only.k, only.device) == (True, 2, str(HostGpu.facts))
    assert only.device_use is not None
    assert only.device_use.allocations == 0
    assert only.quality.golden_error is not None
    assert only.quality.golden_error < 1e-4
    measured = found[f"graphs-{graph}"]["found"]["runs"]
    assert [(r["graph"], r["k"]) for r in measured] == [
        ("embed", None), ("encode", None), ("attend", 1), ("decode", 1), ("attend", 2),
        ("decode", 2),
    ]  # fmt: skip
    flown = found[f"flights-{graph}-graphs"]["found"]["runs"]
    assert [(run["n"], run["in_flight"]) for run in flown] == [(1, 1), (1, 2), (1, 4)]
    for flight in flown:
        assert (flight["differing"], flight["allocations"]) == (0, 0)
        assert flight["frames_per_second"] > 0
    assert {goal["met"] for goal in found["goals"]["goals"]} == {None}  # it has neither size

    session.made.clear()
    again = run(output, *options, bundle=tiny_bundle)
    assert again.exit_code == 0
    assert not session.made  # nothing is measured twice


def test_a_call_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    made = [Piece(name, lambda step: {"figure": 1}) for name in "abc"]
    # The first one is begun in any case: a call always gets on.
    assert [o.piece for o in run_pieces(made, tmp_path, minutes=0.5, step=print)] == ["a"]
    assert [o.piece for o in run_pieces(made, tmp_path, minutes=0.5, step=print)] == ["a", "b"]
    assert [o.piece for o in run_pieces(made, tmp_path, minutes=1.0, step=print)] == ["a", "b", "c"]


def test_failures_are_told_from_what_cannot_run(tmp_path: Path) -> None:
    def failing(error: Exception) -> Any:
        def measure(*_: Any) -> Any:
            raise error

        return measure

    outcomes = run_pieces(
        [
            Piece("a", failing(EngineUnavailableError("no TensorRT"))),
            Piece("b", failing(EngineRunError("wrong"))),
            Piece("c", failing(DeviceLostError("gone"))),
            Piece("d", lambda step: 1, check=failing(EngineUnavailableError("no fp16"))),
        ],
        tmp_path, minutes=10.0, step=print,
    )  # fmt: skip
    assert [(o.piece, o.state, o.reason) for o in outcomes] == [
        ("a", "empty", "no TensorRT"), ("b", "failed", "wrong"), ("c", "failed", "gone"),
        ("d", "empty", "no fp16"),
    ]  # fmt: skip


def test_what_nobody_foresaw_and_what_killed_the_process(tmp_path: Path) -> None:
    def failing(error: BaseException) -> Any:
        def measure(step: Any) -> Any:
            raise error

        return measure

    class OutOfMemoryError(RuntimeError):
        pass

    made = [Piece("torch", failing(OutOfMemoryError("at k = 16"))), Piece("next", lambda step: 1)]
    outcomes = run_pieces(made, tmp_path, minutes=10.0, step=print)
    assert [o.state for o in outcomes] == ["failed", "measured"]
    assert outcomes[0].reason == "OutOfMemoryError: at k = 16"

    with pytest.raises(KeyboardInterrupt):
        run_pieces([Piece("mine", failing(KeyboardInterrupt()))], tmp_path, minutes=1.0, step=print)
    assert not (tmp_path / "mine.json").exists()

    def killed(step: Any) -> Any:  # what such a call leaves, before it can say anything
        return json.loads((tmp_path / "killed.json").read_bytes())

    (left,) = run_pieces([Piece("killed", killed)], tmp_path, minutes=1.0, step=print)
    assert left.found["state"] == "failed"
    assert "remove killed.json" in left.found["reason"]


def test_every_piece_takes_less_than_ten_minutes_and_the_goals_come_first() -> None:
    plan = GpuPlan(
        bundles=(Path("tiny1024"), Path("tiny512")),
        engines=("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"),
        precisions=("fp16-native", "fp16", "fp32", "mixed"),
        baselines=("torch-cached", "torch-compile", "torch-cached-fp16", "torch-graphs-fp16"),
        tests=Path(__file__).parents[2],
    )
    made = list(pieces.pieces_of(plan))
    assert max(piece.minutes for piece in made) < 10.0
    names = [piece.name for piece in made]
    tests = [name for name in names if name.startswith("tests-")]
    assert tests[:2] == [
        "tests-integration-test_device_queries", "tests-integration-test_device_providers",
    ]  # fmt: skip
    plans = [name for name in names if name.startswith("plans-")]
    assert len(plans) == 2 * 2 * 4
    own = 3 + len(plans) + len(tests)
    assert len(set(names)) == len(names) == own + 3 * 2 * (3 * 4 * 2) + 3 * 2 * 4 * 2 + 4 * 24
    # The best one is asked for in the first minutes, and whether the process survives.
    first = "onnxruntime-cuda-fp16-native"
    assert names[0] == "machine"
    assert names[1] == "adding-tiny512"
    queries = [name for name in names if name.startswith("queries-")]
    assert queries[:2] == [f"queries-tiny{size}-{first}-graphs-k4" for size in (1024, 512)]
    # Plans are there when they are asked.
    for name in plans:
        kind = name.removeprefix("plans-")
        assert names.index(name) < names.index(f"queries-{kind}-graphs-k4")
    assert GpuPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


STAND_IN = Path(__file__).parents[2] / "support" / "stand_in"


def test_a_piece_that_dies_or_hangs_is_lost_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Whole, in processes, as on a GPU: a dry run."""
    monkeypatch.syspath_prepend(STAND_IN)
    install(monkeypatch, tmp_path / "cache")  # here, where what needs no GPU is asked
    names = ["machine", "adding-tiny", "kernels"]
    names.append("graphs-tiny-onnxruntime-cuda-fp32")
    monkeypatch.setenv("STAND_IN_DIES", names[1])
    monkeypatch.setenv("STAND_IN_HANGS", names[2])
    monkeypatch.setattr(running, "LEAST_SECONDS", 3.0)
    plan = GpuPlan((tiny_bundle.path,), ("onnxruntime-cuda",), ("fp32",), (1,), (1,), 1, 0.1)
    made = {piece.name: piece for piece in pieces.pieces_of(plan)}
    object.__setattr__(made["kernels"], "minutes", 0.05)
    outcomes = run_pieces(
        [made[name] for name in names], tmp_path, minutes=10.0, step=print,
        run=apart.in_a_process(plan),
    )  # fmt: skip
    assert [outcome.state for outcome in outcomes] == ["measured", "failed", "failed", "measured"]
    assert "SIGSEGV (logs/adding-tiny.log: " in outcomes[1].reason
    assert outcomes[2].reason == "it did not end within 3 s, and was stopped."
    assert outcomes[3].found["device"] == str(HostGpu.facts)


def test_what_a_call_has_no_time_for_any_more_is_left(tmp_path: Path) -> None:
    def slow(piece: Piece, file: Path, seconds: float, step: Any) -> str:
        time.sleep(seconds)
        return "it did not end"

    made = [Piece(name, lambda step: 1, minutes=1.0) for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "LEAST_SECONDS", 0.01)
        assert not run_pieces(made, tmp_path, minutes=0.005, step=print, run=slow)
        assert not [*tmp_path.iterdir()]
        short = [Piece("a", lambda step: 1, minutes=0.001)]
        (lost,) = run_pieces(short, tmp_path, minutes=1.0, step=print, run=slow)
    assert (lost.state, lost.reason) == ("failed", "it did not end.")


def test_baselines_run_beside_the_first_engine_that_is_here(
    session: type[FakeSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, pieces_of = tmp_path / "out", pieces.pieces_of
    wanted = ("baseline-demo-torch-cached-k1-n1", "queries-demo-onnxruntime-cuda-int8-k1")
    monkeypatch.setattr(
        pieces, "pieces_of", lambda plan: (p for p in pieces_of(plan) if p.name in wanted)
    )
    options = (
        *("--engine", "tensorrt-rtx,onnxruntime-cuda", "--precision", "int8,fp32", "--k", "1"),
        *("--structures", "1", "--queries", "4", "--baselines", "torch-cached"),
        *("--torch-device", "cpu", "--seconds", "0"),
    )
    done = run(output, *options, bundle=Bundle.open("demo"))
    assert done.exit_code == 0, done.output
    found = contents(output)
    report = Report.from_json(found[wanted[0]]["found"])
    assert [run.subject for run in report.runs] == [RUNTIME, "torch-cached"]
    assert report.runs[1].quality.logit_difference is not None
    assert report.runs[1].quality.logit_difference < 1e-2
    refused = found[wanted[1]]
    assert (refused["state"], "offers fp32" in refused["reason"]) == ("empty", True)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"format": "else"}')
    with pytest.raises(InputError, match="Remove it to measure it again"):
        run_pieces([Piece("a", print)], tmp_path, minutes=1.0, step=print)


def test_tests_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (folder / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark."
        "gpu\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('no GPU')\n"
    )
    assert files_of(folder) == [folder / "test_it.py"]
    found = run_tests(folder / "test_it.py", folder, 60)
    assert [len(found[state]) for state in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert "no GPU" in found["skipped"][0]
    assert found["status"] == 1


def report_of(size: int, k: int, subject: str, p50: float, dice: float = 1.0) -> dict[str, Any]:
    role, engine = "runtime", "onnxruntime-cuda"
    if subject.startswith("torch"):
        role, engine = "baseline", "torch"
    time = dict.fromkeys(("p90", "p95", "mean", "least", "most"), p50)
    total = {**time, "p50": p50, "p99": 1.1 * p50, "samples": [p50]}
    run = {
        "subject": subject, "role": role, "engine": engine, "precision": "fp16",
        "variant": "ort-cuda", "device": "GPU", "cuda_graph": False, "threads": 1, "k": k, "n": 1,
        "image_size": size, "rounds": [0], "stages": {"total": total}, "throughput": 1.0,
        "memory": None, "cold_start": None, "device_use": None, "energy": None, "remarks": [],
        "quality": {
            "parity_error": None, "golden_error": 1e-3, "golden_dice": dice,
            "logit_difference": None, "dice": None,
        },
    }  # fmt: skip
    bundle = dict.fromkeys(("name", "identity", "sam2", "dinov2", "source", "notice"), "x")
    return {
        "format": "recallseg-bench", "version": VERSION, "kind": "latency", "created": "",
        "machine": {},
        "conditions": {}, "versions": {}, "settings": {},
        "bundle": {**bundle, "image_size": size, "embed_size": 126}, "runs": [run],
        "ratios": [], "retrieval": [], "soak": [], "remarks": [],
    }  # fmt: skip


def test_goals_take_the_best_precision_that_is_exact_enough() -> None:
    outcomes = [
        Outcome(f"queries-{k}-{subject}", "measured", "", report_of(1024, k, subject, p50, dice))
        for k, subject, p50, dice in (
            (1, "good", 5.0, 0.999), (4, "good", 5.6, 0.999), (16, "good", 14.0, 0.999),
            (4, "wrong", 1.0, 0.9),
        )
    ]  # fmt: skip
    outcomes += [
        Outcome(f"baseline-{subject}", "measured", "", report_of(1024, 4, subject, p50, dice))
        for subject, p50, dice in (
            ("torch-cached", 22.4, 1.0), ("torch-cached-fp16", 15.0, 1.0),
            ("good", 70.0, 1.0),  # the runtime beside them does not count twice
        )
    ]  # fmt: skip
    goals = {goal.name: goal for goal in judge(outcomes)}
    assert goals["1024 px, p50 in ms (good)"].met is True
    assert goals["1024 px, k = 16 over k = 1 (good)"].found == pytest.approx(2.8)
    assert goals["1024 px, k = 16 over k = 1 (good)"].met is False
    assert goals["1024 px, times as fast as torch-cached (good)"].found == pytest.approx(4.0)
    assert goals["1024 px, times as fast as torch-compile (good)"].met is None
    assert goals["512 px, p50 in ms"].met is None
    assert str(goals["512 px, p50 in ms"]).startswith("not measured")
