from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.provenance import made_up
from typer.testing import CliRunner

from recallseg import Bundle
from recallseg.benchmarks import volumes as module
from recallseg.benchmarks.commands import bench
from recallseg.benchmarks.volume_cases import VolumeCase, load_cases
from recallseg.benchmarks.volumes import judge
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.volumes.slices import VolumeResult


def make_case() -> VolumeCase:
    array = np.full((8, 64, 64), 50, np.uint8)
    array += np.arange(8, dtype=np.uint8)[:, None, None]
    mask = np.zeros(array.shape, bool)
    mask[2:6, 16:48, 16:48] = True
    array[mask] += 150
    volume = Volume(array, np.diag([3.0, 1.0, 1.0, 1.0]), "LPS")
    return VolumeCase("made", "MR", volume, {"box": mask}, (0, 3, 7), Intensity(), "ours", "here")


def make_result(case: VolumeCase, label_map: np.ndarray) -> VolumeResult:
    slices = tuple(range(8))
    slicing = Slicing.of(case.volume)
    return VolumeResult(
        label_map,
        {"box": 1},
        slicing,
        slices,
        0,
        {},
        1500.0,
        made_up(k=2),
        {},
        "",
        "",  # type: ignore[arg-type]
    )


def test_a_perfect_result_is_perfect() -> None:
    case = make_case()
    (found,) = judge(case, make_result(case, case.masks["box"].astype(np.uint8)))
    assert (found.dice, found.slice_dice, found.least_slice_dice, found.unevenness) == (1, 1, 1, 0)
    assert (found.empty_slices, found.false_slices, found.false_voxels) == (2, 0, 0)
    assert (found.seconds, found.slices) == (1.5, 8)


def test_annotated_slices_do_not_count_and_false_ones_do() -> None:
    case = make_case()
    label_map = case.masks["box"].astype(np.uint8)
    label_map[3] = 0  # annotated
    label_map[4] = 0  # missed
    label_map[1, :32, :32] = 1  # nothing is there
    (found,) = judge(case, make_result(case, label_map))
    assert found.least_slice_dice == 0
    assert found.slice_dice == pytest.approx(2 / 3, abs=1e-4)
    assert found.dice == pytest.approx(2 * 2 / (3 + 3), abs=1e-4)
    assert (found.false_slices, found.false_voxels) == (1, 0.25)
    assert found.unevenness > 0.1


def test_the_command_leaves_figures_and_pictures(
    tmp_path: Path, fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_cases", lambda names, data: ([make_case()], {}))
    done = CliRunner().invoke(
        bench,
        [
            "volumes",
            "--bundle",
            str(fake_bundle.path),
            "--output",
            str(tmp_path),
            "--engine",
            "fake",
            "--memories",
            "1",
            "--k",
            "4",
        ],
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "volumes.json").read_text())
    assert record["schema"] == "recallseg-bench-volumes/1"  # and is held to it
    assert [o["memories"] for o in record["outcomes"]] == [0, 1]
    assert {o["k"] for o in record["outcomes"]} == {4}  # though one slice only shows it
    assert record["outcomes"][0]["slice_dice"] > 0.9
    assert len(list(tmp_path.glob("made-memories-*.preview.png"))) == 2


def test_unknown_and_missing_volumes() -> None:
    with pytest.raises(InputError, match="deep-grey"):
        load_cases(["liver"], None)


@pytest.mark.parametrize("name", ["mni"])
def test_annotations_are_few(name: str) -> None:
    (case,), missing = load_cases([name], None)
    assert not missing
    assert len(case.annotated) == 16
    assert all(mask.shape == case.volume.shape for mask in case.masks.values())
