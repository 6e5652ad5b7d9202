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


def test_memories_may_have_other_tokens_than_the_map_has_places() -> None:
    """EdgeTAM keeps 512 tokens of any image: 256 without a place, 256 on a grid of 16 x 16."""
    geometry = Geometry(1024, 224, 384, 256, 64, 32, 64, 64, tokens=512, memory_grid=(16, 16))
    assert graph_specs(geometry)["memorize"].outputs[0].shape == ("n", 512, 64)
    assert graph_specs(geometry)["attend"].inputs[1].shape == ("n", "k", 512, 64)
    assert geometry.places == 4096
    assert geometry.at(512).tokens == 512
    assert geometry.at(512).feature_size == 32
    sam2 = Geometry(1024, 224, 384, 256, 64, 32, 64, 64)
    assert (sam2.tokens, sam2.memory_grid, sam2.memory_is_a_map) == (4096, (64, 64), True)
    assert sam2.at(512) == Geometry(512, 224, 384, 256, 32, 32, 64, 64)
    assert Geometry.from_json(geometry.to_json()) == geometry


def test_a_manifest_of_format_1_says_nothing_of_tokens() -> None:
    data = fake_geometry().to_json()
    del data["tokens"], data["memory_grid"]
    assert Geometry.from_json(data) == fake_geometry()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"memory_grid": [4, 5]},
        {"memory_grid": [4]},
        {"memory_grid": [0, 4]},
        {"memory_grid": 4},
    ],
)
def test_impossible_memories_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"tokens|memory_grid|iterable"):
        Geometry.from_json({**fake_geometry().to_json(), **change})


def test_correct_is_there_where_it_is_asked_for() -> None:
    assert "correct" not in graph_specs(fake_geometry())
    spec = graph_specs(fake_geometry(), optional=("correct",))["correct"]
    decode = graph_specs(fake_geometry())["decode"]
    shapes = {t.name: (t.dtype, t.resolve(p=3)) for t in (*spec.inputs, *spec.outputs)}
    for tensor in (*decode.inputs, *decode.outputs):
        assert shapes[tensor.name] == ("float32", tensor.resolve(n=1))
    assert shapes["points"] == ("float32", (1, 3, 2))
    assert shapes["point_labels"] == ("int32", (1, 3))
    assert shapes["prior"] == ("float32", (1, 1, 16, 16))
    assert shapes["has_prior"] == ("bool", (1,))
