from __future__ import annotations

import numpy as np
import pytest
from support.fake_bundle import fake_geometry

from recallseg.engines.errors import BundleError, EngineRunError
from recallseg.engines.specs import GRAPHS, Geometry, TensorSpec, graph_specs


def test_every_graph_has_a_spec_in_order() -> None:
    assert tuple(graph_specs(fake_geometry())) == GRAPHS


def test_shapes_follow_the_geometry() -> None:
    geometry = Geometry(512, 224, 384, 256, 32, 32, 64, 64)
    specs = graph_specs(geometry)
    shapes = {t.name: t.resolve(n=2, k=3) for s in specs.values() for t in s.inputs + s.outputs}
    assert shapes["features"] == (1, 256, 32, 32)
    assert shapes["skip0"] == (1, 32, 128, 128)
    assert shapes["memories"] == (2, 3, 1024, 64)
    assert shapes["logits"] == (2, 128, 128)


def test_without_object_pointers_attend_takes_none() -> None:
    specs = graph_specs(fake_geometry(), object_pointers=False)
    assert [t.name for t in specs["attend"].inputs] == ["features", "memories"]
    assert [t.name for t in specs["memorize"].outputs] == ["memories", "pointers"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.float64), "float32"),
        (np.zeros((2, 3, 1), np.float32), "shape"),
        (np.zeros((3, 3), np.float32), "n=2"),
        (np.zeros((2, 4), np.float32), "nx3"),
        (np.zeros((3, 2), np.float32).T, "contiguous"),
    ],
)
def test_a_wrong_tensor_is_named(array: np.ndarray, words: str) -> None:
    with pytest.raises(EngineRunError, match=words) as caught:
        TensorSpec("iou", "float32", ("n", 3)).bind(array, {"n": 2}, "decode")
    assert "'iou'" in str(caught.value)


def test_an_empty_axis_is_refused() -> None:
    with pytest.raises(EngineRunError, match="no empty axis"):
        TensorSpec("iou", "float32", ("n",)).bind(np.zeros(0, np.float32), {}, "decode")


@pytest.mark.parametrize("change", [{"channels": 0}, {"channels": 1.5}, {"channels": True}])
def test_a_geometry_with_impossible_sizes_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="channels"):
        Geometry.from_json({**fake_geometry().to_json(), **change})


def test_a_geometry_survives_json() -> None:
    assert Geometry.from_json(fake_geometry().to_json()) == fake_geometry()
