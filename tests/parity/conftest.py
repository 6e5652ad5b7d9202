from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.making import exported_once

from recallseg.engines.bundle import Bundle
from recallseg.export.bundling import VARIANTS, export_bundle
from recallseg.export.checkpoints import Loaded, load_dinov2, load_sam2

# Threads that wait for each other crawl on a machine that others use too; small tensors need none.
torch.set_num_threads(1)

IMAGE_SIZE = 256


@pytest.fixture(scope="session")
def models() -> tuple[Loaded, Loaded]:
    """Random weights on the demo model's architecture: small, and with every part of the large."""
    return load_sam2("random:demo", image_size=IMAGE_SIZE), load_dinov2("random:demo")


@pytest.fixture(scope="session")
def exported(models: tuple[Loaded, Loaded], pytestconfig: pytest.Config) -> Bundle:
    """The bundle of these models in every variant, through the whole gate; do not change it."""

    def make(folder: Path) -> None:
        export_bundle(*models, folder / "bundle", variants=VARIANTS, pooled=True)

    return Bundle.open(exported_once(pytestconfig, "exported", make, __file__) / "bundle")
