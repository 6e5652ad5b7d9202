"""What can be exported is listed, and fine-tuned files are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.checkpoints import recipe
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.export.checkpoints import load_segmenter
from recallseg.export.families.listing import networks
from recallseg.export.families.timing import time_side_by_side

LAYOUTS = Path(__file__).resolve().parents[2] / "fixtures" / "checkpoints" / "meta_layouts.json"


def test_medsam2_is_named_and_runs_at_the_size_it_was_trained_at(tmp_path: Path) -> None:
    name = "MedSAM2_latest.pt"
    layout = recipe.unfold(json.loads(LAYOUTS.read_text())["sam2.1-hiera-tiny"]["tensors"])
    weights = {n: torch.from_numpy(np.asarray(recipe.weight(n, s))) for n, s in layout.items()}
    torch.save({"model": weights}, tmp_path / name)
    loaded = load_segmenter(str(tmp_path / name))
    assert loaded.architecture == "sam2.1-hiera-tiny-medsam2"
    assert "wanglab/MedSAM2" in loaded.licence
    assert loaded.model.config.image_size == 512
    assert load_segmenter(str(tmp_path / name), image_size=256).model.config.image_size == 256
    (tmp_path / name).rename(tmp_path / "medsam2_CTLesion.pt")
    again = load_segmenter(str(tmp_path / "medsam2_CTLesion.pt"))
    assert again.architecture == loaded.architecture
    (tmp_path / "medsam2_CTLesion.pt").rename(tmp_path / "mine.pt")
    other = load_segmenter(str(tmp_path / "mine.pt"))
    assert (other.architecture, other.model.config.image_size) == ("sam2.1-hiera-tiny", 1024)
    assert other.digest == loaded.digest


def test_export_list_needs_nothing_else() -> None:
    shown = CliRunner().invoke(app, ["export", "--list"])
    assert shown.exit_code == 0, shown.output
    for name in ("edgetam", "sam2.1-hiera-tiny", "dinov2-small", "dinov3-convnext-tiny"):
        assert name in shown.output
    assert "DINOv3 License, gated" in shown.output
    listed = json.loads(CliRunner().invoke(app, ["export", "--list", "--json"]).output)
    assert listed == networks()


def test_export_without_networks_says_what_is_missing() -> None:
    found = CliRunner().invoke(app, ["export", "--output", "x"])
    assert found.exit_code == 2
    assert "--segmenter" in found.output


def test_memories_of_edgetam_are_eight_times_smaller() -> None:
    found = {e["name"]: e for e in networks() if e["kind"] == "segmenter"}
    one, other = (found[n]["sizes"]["1024"] for n in ("edgetam", "sam2.1-hiera-tiny"))
    assert other["tokens"] == 8 * one["tokens"]
    assert one["graphs"]["attend"]["gflop"] < other["graphs"]["attend"]["gflop"] / 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_edgetam_is_faster_than_sam_2_1_tiny() -> None:
    found = time_side_by_side("edgetam", "tiny", image_size=512, rounds=3)
    least = {name: times["least"] for name, times in found.items()}
    assert least["tiny encode"] > 2 * least["edgetam encode"]
    assert least["tiny attend k=4"] > 1.5 * least["edgetam attend k=4"]
    for graph in ("encode", "attend k=4", "decode"):
        assert least[f"edgetam in PyTorch {graph}"] > least[f"edgetam {graph}"]
