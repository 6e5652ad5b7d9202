"""The tiny networks that other tests use: nothing of them is without effect."""

from __future__ import annotations

import numpy as np
import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.registry import load_engines


@pytest.mark.parametrize("graph", ["embed", "encode", "memorize", "attend", "decode", "correct"])
def test_each_input_shows_in_each_output_of_its_row(tiny_bundle: Bundle, graph: str) -> None:
    """And of another structure's in none."""
    engine = load_engines(tiny_bundle, "onnxruntime-cpu", graphs=(graph,))[graph]
    rng = np.random.default_rng(0)
    sizes = {"n": 3, "k": 2, "p": 2}

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        spec = engine.spec
        outputs = {t.name: np.full(t.resolve(**sizes), np.nan, np.float32) for t in spec.outputs}
        engine.run(inputs, outputs)
        return outputs

    inputs = {
        t.name: rng.normal(size=t.resolve(**sizes)).astype(t.dtype) for t in engine.spec.inputs
    }
    inputs = {name: (a | 1 if a.dtype == np.int32 else a) for name, a in inputs.items()}
    if "has_prior" in inputs:
        inputs["has_prior"][:] = True
    expected = run(inputs)
    for tensor in engine.spec.inputs:
        changed = {name: value.copy() for name, value in inputs.items()}
        per_structure = tensor.shape[0] == "n"
        where = changed[tensor.name][1:2] if per_structure else changed[tensor.name]
        where[...] = ~where if where.dtype == bool else where + 2
        for name, found in run(changed).items():
            differs = [not np.array_equal(a, b) for a, b in zip(found, expected[name], strict=True)]
            assert differs == ([False, True, False] if per_structure else [True] * len(differs)), (
                tensor.name,
                name,
            )
