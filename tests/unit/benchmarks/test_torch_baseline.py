"""The PyTorch baselines compute what the runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# ruff: noqa: E402
from support.fake_bundle import make_fake_bundle
from torch import Tensor, nn

from recallseg.benchmarks.subjects import RuntimeChoice, RuntimeSubject, open_segmenter
from recallseg.benchmarks.torch_baseline import TorchBaseline
from recallseg.benchmarks.workload import fill_library, query_images, structure_names
from recallseg.engines.fake import FakeEngine
from recallseg.engines.specs import GraphSpec
from recallseg.runtime.library import Library


class FakeModule(nn.Module):
    """A graph of the fake engine behind PyTorch's calling convention."""

    def __init__(self, spec: GraphSpec) -> None:
        super().__init__()
        self.engine = FakeEngine(spec)
        self.calls = 0

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.calls += 1
        spec = self.engine.spec
        given = {t.name: x.numpy() for t, x in zip(spec.inputs, inputs, strict=True)}
        n = next((len(given[t.name]) for t in spec.inputs if t.shape[0] == "n"), 1)
        outputs = self.engine.allocate_outputs(n=n)
        self.engine.run(given, outputs)
        found = tuple(torch.from_numpy(outputs[t.name]) for t in spec.outputs)
        return found if len(found) > 1 else found[0]


@pytest.mark.parametrize("name", ["torch-cached", "torch-paper"])
@pytest.mark.parametrize("pointers", [True, False])
def test_baseline_agrees_with_the_runtime(name: str, pointers: bool, tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", object_pointers=pointers)
    names, k = structure_names(2), 3
    fill_library(
        tmp_path / "library", bundle, exemplars=6, structures=2, side=48,
        engine="fake", precision="fp32", threads=1,
    )  # fmt: skip
    choice = RuntimeChoice("fake", "fp32", 1)
    own = RuntimeSubject(
        choice, open_segmenter(tmp_path / "library", bundle, choice, k=k, structures=names)
    )
    modules = {graph: FakeModule(spec) for graph, spec in bundle.specs.items()}
    before = torch.get_num_threads()
    try:
        with Library.open(tmp_path / "library", bundle) as library:
            other = TorchBaseline(name, modules, library, k=k, structures=names, threads=1)
        for image in query_images(2, 48):
            expected, stages = own.run(image), other.run(image)
            np.testing.assert_allclose(other.logits, own.logits, atol=0.02)  # memories are fp16
            extra = {"memorize"} if name == "torch-paper" else set()
            assert set(stages) == set(expected) | extra
    finally:
        torch.set_num_threads(before)
    # The paper's way encodes the query and each recalled exemplar, for every query.
    assert modules["encode"].calls == (2 if name == "torch-cached" else 2 * (1 + k))
    assert modules["memorize"].calls == (0 if name == "torch-cached" else 2 * k)


def test_what_cannot_be_compiled_runs_eagerly_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from recallseg.benchmarks import torch_baseline

    def refuse(module: object, **options: object) -> object:
        def call(*inputs: object) -> object:
            raise RuntimeError("no compiler\nat all")

        return call

    monkeypatch.setattr(torch_baseline.torch, "compile", refuse)
    remarks: list[str] = []
    compiled = torch_baseline._Compiled("encode", nn.Identity(), remarks, mode=None)
    given = torch.ones(2)
    assert compiled(given) is given
    assert compiled(given) is given
    assert remarks == ["encode runs eagerly, torch.compile failed: RuntimeError: no compiler"]
