"""A release that is installed while services run is what they ask from the next question on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pydicom
import pytest
from support import igtl as igtl_peers
from support import mrd as mrd_peers
from support import nodes
from support.dicom_peers import DCMTK, dcmtk
from support.dicom_series import write_series
from support.services import half_library, half_volume, wait_until

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.errors import LibraryError
from recallseg.engines.signing import SigningKey, create_key
from recallseg.runtime.library.installing import install, roll_back
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.serving import Access, open_server
from recallseg.runtime.services.watching import Watcher

pytest.importorskip("cryptography")
TOKEN = "a token that is long enough"


@pytest.fixture
def site(tmp_path: Path, fake_bundle: Bundle) -> tuple[Path, Callable[[], object]]:
    """A release in use, whose structure is ``half``, and what installs the next one: ``later``."""
    create_key(tmp_path / "maker")
    signer = SigningKey.read(tmp_path / "maker")
    library = half_library(tmp_path / "livers", fake_bundle)
    pixels = half_volume(1)[0]
    with Library.open(library, mode="write", engine="fake") as made:
        made.release(tmp_path / "1", version="1.0.0", key=signer)
        made.rename_structure("half", "later")
        made.add(pixels + 1, {"later": pixels > 100})
        made.release(tmp_path / "2", version="2.0.0", key=signer)
    folder = tmp_path / "site"
    install(tmp_path / "1", folder, [signer.public])
    return folder / "current", lambda: install(tmp_path / "2", folder, [signer.public])


def test_what_is_open_stays_whole_and_knows_that_it_was_replaced(
    site: tuple[Path, Callable[[], object]],
) -> None:
    current, next_release = site
    with Library.open(current) as library, Segmenter(library, k=1, engine="fake") as segmenter:
        assert not library.replaced
        next_release()
        assert library.replaced
        # Not even what had not been read so far is the other one's.
        assert segmenter.segment(half_volume(1)[0]).masks["half"].any()
        assert library.verify().ok
        roll_back(current.parent)
        assert not library.replaced
        library.path.rename(library.path.with_name("away"))
        assert library.replaced


@DCMTK
def test_a_node_answers_the_next_series_from_it(
    tmp_path: Path, site: tuple[Path, Callable[[], object]]
) -> None:
    current, next_release = site

    def found() -> set[str]:
        answers = (tmp_path / "state" / "answers").rglob("*.seg.dcm")
        segments = [pydicom.dcmread(each).SegmentSequence for each in answers]
        return {str(one.SegmentLabel) for each in segments for one in each}

    with nodes.running(nodes.configured(tmp_path, current)) as node:
        for number, expected in enumerate(({"half"}, {"half", "later"})):
            write_series(tmp_path / f"s{number}", half_volume(2, seed=number))
            dcmtk("storescu", node.port, "+sd", tmp_path / f"s{number}")
            wait_until(lambda n=number: node.counts()["jobs"] == {"made": n + 1})
            assert found() == expected
            next_release()


def test_mrd_answers_the_next_image_from_it(site: tuple[Path, Callable[[], object]]) -> None:
    current, next_release = site
    with mrd_peers.running(mrd_peers.configured(current)) as service:
        for expected in ("1 half", "1 later"):
            _, mask = mrd_peers.asked(service.port, [mrd_peers.image_of(half_volume(1)[0])])
            assert expected in mask.attribute_string
            assert mask.data[0, 0, :30].all()
            next_release()


def test_openigtlink_answers_further_frames_from_it(
    site: tuple[Path, Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recallseg.runtime.services.igtl.frames.LOOK_S", 0.0)
    current, next_release = site
    with (
        igtl_peers.running(current) as service,
        igtl_peers.raw_client(service.port) as one,
        igtl_peers.raw_client(service.port) as other,
    ):
        for expected in (b"half", b"later"):
            for link, device in ((one, "A"), (other, "B")):  # both of the same rule
                link.sendall(igtl_peers.sent(half_volume(1), device).pack())
                told = igtl_peers.next_of(link, "LBMETA", f"{device}-mask")
                assert expected in bytes(told.content)
                igtl_peers.next_of(link, "IMAGE", f"{device}-mask")
            next_release()


def test_a_watch_asks_it_of_the_next_file(
    tmp_path: Path, site: tuple[Path, Callable[[], object]]
) -> None:
    current, next_release = site
    (tmp_path / "in").mkdir()
    watch = subprocess.Popen(
        [
            *(sys.executable, "-m", "recallseg", "watch", str(current), str(tmp_path / "in")),
            *("--output", str(tmp_path / "out"), "--engine", "fake", "--k", "1", "--settle", "0"),
            "--json",
        ],
        stdout=subprocess.PIPE,
    )
    assert watch.stdout is not None
    end = threading.Timer(300, watch.kill)
    end.start()
    try:
        for number, expected in enumerate(({"half": 1}, {"later": 1})):
            cv2.imwrite(str(tmp_path / f"{number}.png"), half_volume(1, seed=number)[0])
            (tmp_path / f"{number}.png").rename(tmp_path / "in" / f"{number}.png")
            record = json.loads(watch.stdout.readline())
            assert record["labels"] == expected, record
            next_release()
        watch.terminate()
        assert watch.wait(300) == 0
    finally:
        end.cancel()
        watch.kill()
        watch.wait()
        watch.stdout.close()


def test_a_watch_that_cannot_open_it_ends(
    tmp_path: Path, site: tuple[Path, Callable[[], object]]
) -> None:
    current, next_release = site
    (tmp_path / "in").mkdir()
    with (
        Library.open(current) as library,
        Segmenter(library, k=1, engine="fake") as segmenter,
        Watcher(segmenter, tmp_path / "in", tmp_path / "out", settle_s=0.0) as watcher,
    ):
        next_release()
        cv2.imwrite(str(tmp_path / "in" / "a.png"), half_volume(1)[0])
        with pytest.raises(LibraryError, match="another library"):
            next(watcher.run(threading.Event(), poll_s=0.01))


def test_a_server_puts_nothing_into_the_former_one(
    tmp_path: Path, site: tuple[Path, Callable[[], object]]
) -> None:
    current, next_release = site

    def asked(path: str) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{server.url}/api{path}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    with Library.open(current, mode="write", engine="fake") as library:
        log = AuditLog(tmp_path / "audit.jsonl")
        server = open_server(library, log, Access.of(token=TOKEN), port=0)
        with server:
            assert asked("/library")[1]["structures"] == ["half"]
            next_release()
            status, told = asked("/library")
            assert status == 503
            assert "Restart the server" in json.dumps(told)
