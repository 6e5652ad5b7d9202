"""A person at napari, with its plugin napari-nninteractive, works on our server.

napari and a Qt are no dependencies of ours: ``RECALLSEG_NAPARI`` names a Python that has them and
napari-nninteractive (``pip install napari PyQt5 napari-nninteractive``). Xvfb is the screen; of
Debian's packages: xvfb xauth libgl1 libegl1 libxcb-icccm4 libxcb-keysyms1 libxcb-xinerama0.
Screenshots are left where ``RECALLSEG_NAPARI_SHOWN`` says.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession

from recallseg import Library, Segmenter
from recallseg.engines.verification import mask_dice
from recallseg.runtime.reports.demo import DemoSlices, fill_library, load_slices
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.serving import Access, open_server

PYTHON, XVFB = os.environ.get("RECALLSEG_NAPARI"), shutil.which("xvfb-run")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON and XVFB), reason="needs Xvfb, and RECALLSEG_NAPARI: a Python that has napari"
    ),
]
SCRIPT = Path(__file__).parents[1] / "support" / "napari_person.py"
TOKEN = "a token that is long enough"
TARGET = "white matter"


@pytest.fixture(scope="module")
def slices() -> DemoSlices:
    return load_slices()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, slices: DemoSlices) -> Iterator[Library]:
    with Library.create(tmp_path_factory.mktemp("napari") / "library", "demo") as made:
        fill_library(made, slices)
        yield made


@pytest.fixture
def url(tmp_path: Path, library: Library) -> Iterator[str]:
    log = AuditLog(tmp_path / "audit.jsonl")
    with open_server(library, log, Access.of(["ada"], TOKEN), port=0, target=TARGET) as server:
        yield server.url


def at_napari(tmp_path: Path, url: str, **task: Any) -> dict[str, Any]:
    """Let a person work; return what napari showed, by step."""
    shown = Path(os.environ.get("RECALLSEG_NAPARI_SHOWN", tmp_path))
    shown.mkdir(parents=True, exist_ok=True)
    np.savez(tmp_path / "task.npz", **task)
    own = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "QT_QPA_PLATFORM": "xcb"}
    done = subprocess.run(
        [
            *(str(XVFB), "-a", "-s", "-screen 0 1400x900x24", str(PYTHON), str(SCRIPT)),
            *(url, TOKEN, str(tmp_path / "task.npz"), str(shown)),
        ],
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **own},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    sys.stderr.write(done.stderr)
    said = pickle.loads((shown / "said.pickle").read_bytes())
    return {**np.load(shown / "found.npz"), "said": said}


def by_client(url: str, volume: Any, spacing: list[float], found: dict[str, Any]) -> dict[str, Any]:
    """Say the same with nnInteractive's client as the plugin did."""
    again: dict[str, Any] = {}
    with nnInteractiveRemoteInferenceSession(url, api_key=TOKEN) as session:
        session.set_image(volume[None], {"spacing": spacing})
        buffer = np.zeros(volume.shape, np.uint8)
        session.set_target_buffer(buffer)
        for number, (name, given, more) in enumerate(found["said"]):
            getattr(session, name)(*given, **more)
            again[f"mask{number}"] = buffer.copy()
        session.undo()
        again["undone"] = buffer.copy()
        session.reset_interactions()
        session._predict()
        again["proposed"] = buffer.copy()
    return again


def test_a_picture_is_clicked_at_and_shows_what_we_answer(
    tmp_path: Path, url: str, slices: DemoSlices, library: Library
) -> None:
    query = slices.queries[7]
    image = (query.image / query.image.max() * 255).astype(np.uint8)
    wanted = query.masks[TARGET]
    ys, xs = np.nonzero(wanted)
    middle = len(ys) // 2
    clicks = [[1, 0, ys[middle], xs[middle]], [0, 0, 8, 8]]
    found = at_napari(
        tmp_path, url, image=image, spacing=[1.0, 1.0], clicks=np.asarray(clicks, float)
    )
    for number, (_, *voxel) in enumerate(clicks):
        assert np.abs(found[f"point{number}"] - voxel).max() < 1.5, "the mouse meets the pixel"
    assert mask_dice(found["mask0"][0] > 0, wanted) > 0.7
    session = Segmenter(library).correct(image)
    z, y, x = (round(float(value)) for value in found["point0"])
    assert np.array_equal(session.click(TARGET, x, y).masks[TARGET], found["mask0"][z] > 0)
    again = by_client(url, image[None], [1.0, 1.0, 1.0], found)
    for name, mask in again.items():
        assert np.array_equal(mask > 0, found[name] > 0), name
    assert np.array_equal(found["undone"], found["mask0"])
    assert not found["reset"].any()
    assert np.array_equal(Segmenter(library).segment(image).masks[TARGET], found["proposed"][0] > 0)


def test_a_volume_is_clicked_at_in_one_slice_and_masks_are_in_its_neighbours(
    tmp_path: Path, url: str, slices: DemoSlices
) -> None:
    chosen = slices.queries[4:11]
    most = max(one.image.max() for one in chosen)
    volume = np.stack([one.image / most * 255 for one in chosen]).astype(np.uint8)
    wanted = np.stack([one.masks[TARGET] for one in chosen])
    ys, xs = np.nonzero(wanted[3])
    clicks = np.asarray([[1, 3, ys[len(ys) // 2], xs[len(ys) // 2]]], float)
    spacing = [slices.gap, 1.0, 1.0]
    found = at_napari(tmp_path, url, image=volume, spacing=spacing, clicks=clicks)
    assert all(found["mask0"][index].any() for index in range(len(volume)))
    assert mask_dice(found["mask0"] > 0, wanted) > 0.7
    again = by_client(url, volume, spacing, found)
    for name, mask in again.items():
        assert np.array_equal(mask > 0, found[name] > 0), name
    assert not found["undone"].any()


def test_boxes_scribbles_and_lassos_are_drawn_and_answered(
    tmp_path: Path, url: str, slices: DemoSlices
) -> None:
    query = slices.queries[7]
    image = (query.image / query.image.max() * 255).astype(np.uint8)
    ys, xs = np.nonzero(query.masks[TARGET])
    angles = np.linspace(np.pi, 2.5 * np.pi, 60)  # three quarters of a circle
    path = np.stack(
        [0 * angles, ys.mean() + 40 * np.sin(angles), xs.mean() + 40 * np.cos(angles)], 1
    )
    found = at_napari(
        tmp_path, url, image=image, spacing=[1.0, 1.0], clicks=np.zeros((0, 4)), drags=path
    )
    kinds = ("bbox", "scribble", "lasso")
    assert [name for name, *_ in found["said"]] == [f"add_{kind}_interaction" for kind in kinds]
    for number in range(3):
        assert found[f"mask{number}"].any()
    again = by_client(url, image[None], [1.0, 1.0, 1.0], found)
    for name, mask in again.items():
        assert np.array_equal(mask > 0, found[name] > 0), name
