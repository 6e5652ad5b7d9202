"""Corrections on a GPU: the same as on the CPU, nothing unproven, other types than fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.fake_onnxruntime import install
from support.fake_tensorrt import HostGpu

from recallseg import Bundle, GpuOptions, Library, Segmenter
from recallseg.engines.digest import digest_file
from recallseg.engines.errors import VerificationError
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import verify_engines
from recallseg.runtime.segmenting.corrections import Corrections

NAME = "onnxruntime-cuda"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("demo")


def unproven(source: Bundle, folder: Path) -> Bundle:
    """Copy a bundle without the golden tensors of ``correct``."""
    shutil.copytree(source.path, folder)
    golden = Bundle.open(folder).golden_file
    with np.load(golden) as held:
        others = {name: held[name] for name in held.files if "corrected" not in name}
    np.savez(golden, **others)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["golden"]["sha256"] = digest_file(golden)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is noted which graphs were proven on the stand-in GPU: once is enough here."""
    return tmp_path_factory.mktemp("proven")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, proven: Path) -> GpuOptions:
    install(monkeypatch, proven)
    return GpuOptions(HostGpu.open(deferred=True))


def test_corrections_on_a_gpu_are_those_of_the_cpu(
    tmp_path: Path, bundle: Bundle, gpu: GpuOptions
) -> None:
    image = np.random.default_rng(0).normal(100, 20, (120, 150))
    mask = np.zeros(image.shape, bool)
    mask[20:80, 30:90] = True
    image[mask] += 90
    with Library.create(tmp_path / "library", bundle, threads=1) as library:
        library.add(image, {"square": mask})
        here = Segmenter(library, k=1, threads=1).correct(image)
        there = Segmenter(library, k=1, engine=NAME, gpu=gpu).correct(image)
        for session in (here, there):
            assert session._model.device is (None if session is here else gpu.device)
        for act in (
            lambda s: s.click("square", 40, 30),
            lambda s: s.scribble("square", [(10, 10), (90, 20)], inside=False),
            lambda s: s.lasso("new", [(10, 10), (100, 10), (60, 100)]),
            lambda s: s.click("new", 3, 3, inside=False),
        ):
            one, two = act(here), act(there)
            for name in one.masks:
                assert np.array_equal(one.masks[name], two.masks[name])
            assert one.scores["square"].iou == pytest.approx(two.scores["square"].iou, rel=1e-4)
        other = Segmenter(library, k=1, engine=NAME, gpu=gpu).correct(image[::-1])
        other.click("square", 5, 5)
        again = there.click("square", 60, 60)  # its image is put back
        assert np.array_equal(again.masks["square"], here.click("square", 60, 60).masks["square"])
        assert there.accept(key="corrected") == "corrected"
        assert "corrected" in library
        empty = Corrections(library, image, model=there._model)
        assert empty.lasso("x", [(10, 10), (100, 10), (60, 100)]).masks["x"].any()


def test_the_optional_graph_is_proven_with_the_others(
    bundle: Bundle, gpu: GpuOptions, tmp_path: Path
) -> None:
    graphs = bundle.graphs_for(("portable",), "fp32")
    assert graphs[-1] == "correct"
    engines = load_engines(bundle, NAME, graphs=graphs)
    found = verify_engines(bundle, engines, "fp32")
    assert "corrected_logits" in {check.tensor for check in found.checks}
    without = unproven(bundle, tmp_path / "unproven")
    with pytest.raises(VerificationError, match=r"no golden tensors.*'correct'.*nothing unproven"):
        load_engines(without, NAME, graphs=("correct",))
