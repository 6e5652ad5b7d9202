"""nnInteractive's own client drives the server through its whole API."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from nnInteractive.inference.remote import (
    ServerAtCapacityError,
    SessionExpiredError,
    nnInteractiveRemoteInferenceSession,
)
from support.annotating import OTHER, TOKEN, Served, ball, disc, http, serving

from recallseg.engines.verification import mask_dice
from recallseg.runtime.services.http.limits import Limits


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), limits=Limits(sessions=3)) as one:
        yield one


@pytest.fixture
def client(served: Served) -> Iterator[nnInteractiveRemoteInferenceSession]:
    with nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) as session:
        yield session


def opened(session, image):  # type: ignore[no-untyped-def]
    """Open a picture or a volume and its buffer, as a viewer does."""
    volume = image if image.ndim == 3 else image[None]
    session.set_image(volume[None], {"spacing": [3.0, 1.0, 1.0]})
    buffer = np.zeros(volume.shape, np.uint8)
    session.set_target_buffer(buffer)
    return buffer


def test_predict_without_a_prompt_proposes_from_the_library(client) -> None:  # type: ignore[no-untyped-def]
    image, mask = disc(55, 66, 22, 9)
    buffer = opened(client, image)
    (zs, ys, xs) = client._predict()
    assert mask_dice(buffer[0] > 0, mask) > 0.95
    assert zs == [0, 1]
    assert (buffer[0] > 0)[slice(*ys), slice(*xs)].sum() == (buffer > 0).sum()
    client.reset_interactions()
    assert not buffer.any()


def test_a_volume_is_proposed_whole(client) -> None:  # type: ignore[no-untyped-def]
    volume, masks = ball()
    buffer = opened(client, volume)
    assert client._predict() is not None
    assert mask_dice(buffer[1:-1] > 0, masks[1:-1]) > 0.9


def test_liveness_and_lease(client) -> None:  # type: ignore[no-untyped-def]
    assert client.ping()
    assert 590 < client.heartbeat() <= 600
    assert client.lease_status()["idle_timeout_seconds"] == 600
    client.set_do_autozoom(False)
    assert client.supports_undo
    assert client.supports_initial_label


def test_a_mask_that_is_given_is_kept_and_undone(client) -> None:  # type: ignore[no-untyped-def]
    image, mask = disc()
    buffer = opened(client, image)
    client.add_initial_seg_interaction(mask[None].astype(np.uint8))
    assert (buffer[0] > 0).sum() == mask.sum()
    assert client.undo()
    assert not buffer.any()
    assert not client.undo()


def test_what_a_session_holds_ends_with_it(served: Served) -> None:
    session = nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN)
    lease = session._lease_token
    opened(session, disc()[0])
    session.close()
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Lease-Token": lease or ""}
    answer = http("post", f"{served.url}/predict", headers=headers, json={})
    assert answer.status_code == 410


# The client leaves its connection open where the claim fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_more_sessions_than_there_are_wait(served: Served) -> None:
    held = [nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) for _ in range(3)]
    with pytest.raises(ServerAtCapacityError, match="3 sessions"):
        nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN)
    for session in held:
        session.close()
    nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN).close()
    gc.collect()


def test_the_session_of_another_is_not_ones_own(client, served: Served) -> None:  # type: ignore[no-untyped-def]
    client._http.headers["Authorization"] = f"Bearer {OTHER}"
    with pytest.raises(SessionExpiredError):
        client.lease_status()
    client._http.headers["Authorization"] = f"Bearer {TOKEN}"
    assert client.lease_status()


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/add_point_interaction", {"coordinates": [0, 400, 3]}, "outside the image"),
        ("/add_point_interaction", {"coordinates": [-1, 4, 3]}, "outside the image"),
        ("/add_point_interaction", {"coordinates": [1e300, 4, 3]}, "coordinates"),
        ("/add_bbox_interaction", {"bbox_coords": [[0, 1], [5, 500], [0, 9]]}, "outside the image"),
        ("/add_bbox_interaction", {"bbox_coords": [[0, 1], [5, 5], [0, 9]]}, "no voxel"),
        ("/predict", [], "predict|valid"),
        ("/set_target_buffer", {"shape": [1, 2, 3], "dtype": "uint8"}, "shape"),
        ("/set_target_buffer", {"shape": [1, 120, 140], "dtype": "object"}, "dtype"),
    ],
)
def test_what_cannot_be_done_is_said_and_kills_nothing(client, path, body, said) -> None:  # type: ignore[no-untyped-def]
    opened(client, disc()[0])
    if isinstance(body, dict):
        body = {"include_interaction": True, **body}
    headers = {"Content-Type": "application/json"}
    answer = client._http.post(path, content=json.dumps(body), headers=headers)
    assert 400 <= answer.status_code < 500
    assert re.search(said, answer.text), answer.text
    assert client._predict() is not None


def test_steps_in_another_order_are_refused(served: Served) -> None:
    with nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) as session:
        for path in ("/predict", "/undo"):
            assert session._http.post(path, json={}).status_code == 409
        assert session._http.post("/reset_interactions", json={}).status_code == 200


def test_what_is_accepted_is_an_exemplar_and_stands_in_the_audit_log(tmp_path: Path) -> None:
    image, mask = disc(70, 50, 20, 5)
    with (
        serving(tmp_path, exemplars=0) as served,
        nnInteractiveRemoteInferenceSession(served.url, api_key=TOKEN) as session,
    ):
        buffer = opened(session, image)
        refused = session._http.post("/predict", json={})
        assert (refused.status_code, "no structure was named" in refused.text) == (409, True)
        named = session._http.post("/recallseg/target", json={"structure": "lesion"})
        assert named.json() == {"target": "lesion", "known": False}
        session.add_initial_seg_interaction(mask[None].astype(np.uint8))
        assert len(served.desk.library) == 0, "nothing before it is accepted"
        accepted = session._http.post("/recallseg/accept", json={"tags": {"view": "axial"}})
        (key,) = accepted.json()["exemplars"]
        pixels, masks = served.desk.library.source(key)
        assert (pixels == image).all()
        assert (masks["lesion"] == mask).all()
        assert served.desk.library[key].tags == {"view": "axial", "spacing_mm": "1x1"}
        session.reset_interactions()
        assert session._predict() is not None  # the library knows it now
        assert mask_dice(buffer[0] > 0, mask) > 0.9
        (entry,) = [json.loads(line) for line in served.audit.read_text().splitlines()]
        assert entry["event"] == "accept"
        assert entry["who"] == "ada"
        assert entry["exemplars"] == [key]
        assert entry["corrections"] == {"lesion": {"mask": 1}}
        assert entry["proposal"] is None
