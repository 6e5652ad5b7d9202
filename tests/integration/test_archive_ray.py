"""An archive on Ray: actors on several machines, of which one is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import pytest
from support.pictures import disc

from recallseg import Bundle, Library
from recallseg.engines.errors import EngineUnavailableError
from recallseg.engines.imports import import_ray
from recallseg.runtime.services.archive import segment_archive

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
# Not one that Ray keeps in the user's home. A process reads it once, whatever clusters it meets.
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
ASKING: dict[str, Any] = {"engine": "fake", "k": 1, "threads": 1}
SLOW = """
import os, time
try:
    from recallseg.runtime.services.archive import worker
except ImportError:  # Ray's own processes, that look for no other path
    worker = None
if worker is not None:
    real = worker.segment_item
    def segment_item(segmenter, item, *rest, **more):
        if item.name == "poison.png":
            os.kill(os.getpid(), 9)
        time.sleep(0.2)
        return real(segmenter, item, *rest, **more)
    worker.segment_item = segment_item
"""


@pytest.fixture(scope="module")
def library(fake_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "library"
    with Library.create(folder, fake_bundle, engine="fake") as made:
        made.add(disc(0.0).image, disc(0.0).masks)
    return folder


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that take a while, and die of one picture."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def cluster(slow: None) -> Iterator[Any]:
    import_ray()
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for n in range(count):
        cv2.imwrite(str(folder / f"{n:03}.png"), disc(n / count).image)


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_nothing_but_time(
    library: Path, cluster: Any, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_pictures(folder, 40)
    cv2.imwrite(str(folder / "poison.png"), disc(0.5).image)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    seen: list[int] = []

    def lose() -> None:
        while len([*out.glob("*.json")]) < 8:
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    done = segment_archive(
        *(library, [folder], out),
        ray=cluster.address,
        attempts=2,
        progress=lambda told: seen.append(told.workers),
        **ASKING,
    )
    thread.join()
    assert max(seen) == 2
    assert (done.progress.done, done.progress.set_aside) == (40, 1)
    assert "it ended the actor that segmented it (2 attempts)" in done.set_aside.values()
    assert len([*out.glob("*.json")]) == len([*out.glob("*.mask.png")]) == 40
    rows = [r for r in pq.read_table(done.summary).to_pylist() if r["outcome"] == "done"]
    assert len({row["record"] for row in rows}) == len(rows) == 40
    for row in rows:
        record = json.loads((out / row["record"]).read_text())
        assert record["provenance"]["digest"] == row["provenance"] == done.provenance


@pytest.mark.slow
def test_ray_on_this_machine_gives_what_processes_give(library: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 4)
    there = segment_archive(
        library, [tmp_path / "in"], tmp_path / "ray", ray="local", workers=1, **ASKING
    )
    here = segment_archive(library, [tmp_path / "in"], tmp_path / "here", workers=1, **ASKING)
    assert there.provenance == here.provenance
    for mask in (tmp_path / "here").glob("*.png"):
        assert (tmp_path / "ray" / mask.name).read_bytes() == mask.read_bytes()
    assert there.progress.done == here.progress.done == 4


def test_there_is_no_cluster(library: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(EngineUnavailableError, match="no cluster of Ray at"):
        segment_archive(library, [tmp_path / "in"], tmp_path / "o", ray="127.0.0.1:1", **ASKING)
