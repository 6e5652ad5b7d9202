from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.engine import Engine, Tensor
from recallseg.engines.errors import BundleError, VerificationError
from recallseg.engines.golden import GoldenTensors, run_case
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import compare_with_golden, relative_error, verify_engines


class Wrong(Engine):
    """Another engine's result, spoilt."""

    name = "wrong"
    variants = ()

    def __init__(self, engine: Engine, spoil: str) -> None:
        super().__init__(engine.spec)
        self._engine, self._spoil = engine, spoil

    def _execute(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self._engine.run(inputs, outputs)
        for tensor in outputs.values():
            if self._spoil == "scaled":
                tensor *= 1.1
            elif self._spoil == "nan":
                tensor.flat[::7] = np.nan
            elif self._spoil == "transposed" and tensor.ndim == 4:
                tensor[:] = tensor.swapaxes(2, 3).copy()


def test_a_right_engine_passes_every_check(fake_bundle: Bundle) -> None:
    result = verify_engines(fake_bundle, load_engines(fake_bundle, "fake"), "fp32")
    assert result.passed
    assert {check.tensor for check in result.checks} >= {"embedding", "memories", "logits"}


@pytest.mark.parametrize("spoil", ["scaled", "nan", "transposed"])
@pytest.mark.parametrize("graph", ["encode", "attend"])
def test_a_wrong_engine_is_refused_and_the_tensor_named(
    fake_bundle: Bundle, graph: str, spoil: str
) -> None:
    engines = load_engines(fake_bundle, "fake")
    engines[graph] = Wrong(engines[graph], spoil)
    tensor = {"encode": "features", "attend": "conditioned"}[graph]
    with pytest.raises(VerificationError, match=f"'{tensor}'"):
        verify_engines(fake_bundle, engines, "fp32")


def test_without_strict_the_failure_is_reported(fake_bundle: Bundle) -> None:
    engines = load_engines(fake_bundle, "fake")
    engines["attend"] = Wrong(engines["attend"], "nan")
    result = verify_engines(fake_bundle, engines, "fp32", strict=False)
    assert not result.passed
    assert all(check.passed for check in result.checks if check.tensor == "features")


def test_relative_error_is_infinite_where_values_are_not_finite() -> None:
    assert relative_error(np.float32([1, np.nan]), np.float32([1, 1])) == float("inf")
    assert relative_error(np.float32([1, 2]), np.float32([1, 2])) == 0.0


def test_golden_tensors_survive_the_disk(fake_bundle: Bundle, tmp_path: Path) -> None:
    golden = GoldenTensors.load(fake_bundle.golden_file)
    golden.save(tmp_path / "copy.npz")
    copy = GoldenTensors.load(tmp_path / "copy.npz")
    assert golden.values.keys() == copy.values.keys()
    for name in golden.values:
        np.testing.assert_array_equal(golden.values[name], copy.values[name])
    np.testing.assert_array_equal(golden.masks, copy.masks)


def test_a_truncated_golden_file_is_refused(fake_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(fake_bundle.golden_file.read_bytes()[:1000])
    with pytest.raises(BundleError, match="cannot be read"):
        GoldenTensors.load(path)
    golden = GoldenTensors.load(fake_bundle.golden_file)
    values = {name: value[:1] for name, value in golden.values.items()}  # one for all, to NumPy
    replace(golden, values=values).save(path)
    with pytest.raises(BundleError, match="values and places of them differ in number"):
        GoldenTensors.load(path)


@pytest.mark.parametrize("change", ["name", "index", "masks"])
def test_golden_tensors_of_other_graphs_are_told(fake_bundle: Bundle, change: str) -> None:
    golden = GoldenTensors.load(fake_bundle.golden_file)
    values, index, masks = dict(golden.values), dict(golden.index), golden.masks
    if change == "name":
        values["other"], index["other"] = values["logits"], index["logits"]
    elif change == "index":
        index["logits"] = index["logits"] + 10**9
    else:
        masks = masks[:1]
    engines = load_engines(fake_bundle, "fake")
    found = run_case(
        golden.case,
        Composition(engines),
        fake_bundle.geometry,
        fake_bundle.normalisation,
        fake_bundle.memory,
    )
    other = GoldenTensors(golden.case, values, index, masks)
    with pytest.raises(BundleError, match=r"golden tensors of bundle .* are not of its graphs"):
        compare_with_golden(fake_bundle, other, found, "fake", "fp32")
