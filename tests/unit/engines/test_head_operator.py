"""A head's graph as one native operator: what the portable graph gives, at every level and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnxruntime import InferenceSession, SessionOptions

from recallseg.engines.heads import HEADS, REFINE, REFINE_NATIVE, feature_count

Inputs = dict[str, np.ndarray]


def inputs(height: int, width: int, n: int = 3, units: tuple[int, int] = (32, 16)) -> Inputs:
    draw = np.random.default_rng(height * width + n)

    def normal(*shape: int) -> np.ndarray:
        return (0.3 * draw.standard_normal(shape)).astype(np.float32)

    u, v = units
    return {
        "image": draw.random((1, 3, height, width), np.float32),
        "logits": 10 * normal(1, n, height, width),
        "around": 10 * normal(1, 2 * n, height, width),
        "weights1": normal(u, feature_count(n), 1, 1),
        "biases1": normal(u),
        "weights2": normal(v, u, 1, 1),
        "biases2": normal(v),
        "weights3": normal(n, v, 1, 1),
        "biases3": normal(n),
        "mix": draw.random((1, n, 1, 1), np.float32),
    }


def run(graph: str, given: Inputs, library: Path | None = None, threads: int = 1) -> np.ndarray:
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = InferenceSession(str(HEADS / graph), options, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, given)
    assert isinstance(made, np.ndarray)
    return made


@pytest.mark.parametrize(
    ("height", "width", "n", "units"),
    [
        (1, 1, 1, (1, 1)),
        (5, 7, 2, (3, 4)),
        (16, 16, 1, (32, 16)),
        (33, 97, 3, (32, 16)),
        (203, 171, 4, (31, 17)),
        (40, 640, 6, (48, 24)),
    ],
)
def test_it_gives_what_the_portable_graph_gives(
    level: Path, height: int, width: int, n: int, units: tuple[int, int]
) -> None:
    given = inputs(height, width, n, units)
    expected, found = run(REFINE, given), run(REFINE_NATIVE, given, level)
    assert found.shape == expected.shape == (1, n, height, width)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_any_number_of_threads_gives_the_same_bits(operators_file: Path) -> None:
    given = inputs(100, 130)
    one = run(REFINE_NATIVE, given, operators_file)
    np.testing.assert_array_equal(run(REFINE_NATIVE, given, operators_file, 3), one)


def test_what_is_not_finite_stays_where_it_is(operators_file: Path) -> None:
    given = inputs(160, 160)
    given["image"][0, 0, 3, 3] = np.nan
    found = run(REFINE_NATIVE, given, operators_file)
    assert np.isnan(found[0, :, 3, 3]).all()
    assert np.isfinite(found[0, :, 100:, 100:]).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("image", (1, 3, 20, 21)),
        ("around", (1, 5, 20, 20)),
        ("weights2", (16, 31, 1, 1)),
        ("biases3", (2,)),
        ("mix", (1, 1, 1, 1)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    operators_file: Path, name: str, shape: tuple[int, ...]
) -> None:
    given = inputs(20, 20) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(Exception, match="expected image 1x3xHxW, logits 1xnxHxW"):
        run(REFINE_NATIVE, given, operators_file)
