"""The DICOM node against programs that we did not write."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from support.dicom_peers import DCMTK, ORTHANC, dcmjs, dcmtk, free_port, orthanc
from support.dicom_series import write_series
from support.nodes import QUIET_S, configured, running
from support.services import half_library, half_volume, wait_until

from recallseg import Bundle
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg_reading import read_segmentation
from recallseg.runtime.services.audit import verify_audit_log
from recallseg.runtime.services.logs import configure_logs

pytestmark = [DCMTK, ORTHANC]
SECRETS = ("Doe", "Jane", "secret-77", "19700101")


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    return half_library(tmp_path / "library", fake_bundle)


def test_a_series_is_answered_by_dimse_and_dicomweb_without_a_word_of_the_patient(
    tmp_path: Path, library: Path
) -> None:
    logs = io.StringIO()
    configure_logs("json", "debug", logs)
    series = tmp_path / "series"
    write_series(series, half_volume(4), SeriesDescription="ax T2 tse")
    uids = [pydicom.dcmread(f).SOPInstanceUID for f in series.iterdir()]
    with orthanc(tmp_path / "one") as pacs, orthanc(tmp_path / "two") as web:
        configuration = configured(
            tmp_path,
            library,
            rule={
                "when": {"modality": "mr", "series_description": "*t2*", "sender": "STORE*"},
                "preview": True,
                "report": True,
            },
            audit={"log": tmp_path / "audit.jsonl"},
            destinations={
                "pacs": {
                    "type": "dicom",
                    "host": "127.0.0.1",
                    "port": pacs.dicom_port,
                    "ae_title": "ORTHANC",
                },
                "web": {
                    "type": "stow-rs",
                    "url": f"http://127.0.0.1:{web.http_port}/dicom-web",
                },
            },
        )
        with running(configuration) as node:
            assert dcmtk("echoscu", node.port).startswith("0")
            assert dcmtk("storescu", node.port, "+sd", series).startswith("0")
            for peer in (pacs, web):
                wait_until(lambda peer=peer: len(peer.get("/instances")) == 3)
            text = node.metrics.text().decode()
        (found,) = web.instances("SEG")
        (other,) = pacs.instances("SEG")
        assert found["MainDicomTags"]["SOPInstanceUID"] == other["MainDicomTags"]["SOPInstanceUID"]
        # by DICOMweb, as a viewer asks for it
        tags = pacs.get("/dicom-web/instances?Modality=SEG&includefield=00080016")
        assert tags[0]["00080016"]["Value"] == ["1.2.840.10008.5.1.4.1.1.66.4"]
        (report,) = pacs.instances("SR")
        told = pacs.get(f"/instances/{report['ID']}/simplified-tags")
        lines = [item["TextValue"] for item in told["ContentSequence"]]
        assert lines[0].startswith("half: ")
        assert lines[0].endswith(" ml")
        assert len(pacs.instances("OT")) == 1
        answer = next((tmp_path / "state" / "answers").rglob("*.seg.dcm"))
        volume = read_dicom(series)
        drawn = read_segmentation(answer, volume)
        assert (drawn.masks[1] == (volume.array > 100)).mean() > 0.9
        sent = pacs.get(f"/instances/{other['ID']}/simplified-tags")
        assert sent["SOPInstanceUID"] == pydicom.dcmread(answer).SOPInstanceUID
    assert verify_audit_log(tmp_path / "audit.jsonl").entries == 1
    audit = (tmp_path / "audit.jsonl").read_text()
    assert '"event": "segmented"' in logs.getvalue()
    for word in (*SECRETS, *uids, volume.origin.header.SeriesInstanceUID):
        assert word not in logs.getvalue() + text + audit
    assert "recallseg_stage_seconds_count" in text


def test_late_objects_make_the_series_anew_with_a_new_instance(
    tmp_path: Path, library: Path
) -> None:
    files = write_series(tmp_path / "series", half_volume(5), shuffle=False)
    with orthanc(tmp_path / "pacs") as pacs:
        there = {"type": "dicom", "host": "127.0.0.1", "port": pacs.dicom_port, "ae_title": "A"}
        with running(configured(tmp_path, library, destinations={"pacs": there})) as node:
            dcmtk("storescu", node.port, *files[:4])
            wait_until(lambda: len(pacs.instances()) == 1)
            dcmtk("storescu", node.port, files[0])  # the same again changes nothing
            time.sleep(3 * QUIET_S)
            assert len(pacs.instances()) == 1
            dcmtk("storescu", node.port, files[4])
            wait_until(lambda: len(pacs.instances()) == 2)
        frames = sorted(
            len(pydicom.dcmread(f).PerFrameFunctionalGroupsSequence)
            for f in (tmp_path / "state" / "answers").rglob("*.seg.dcm")
        )
        assert frames == [4, 5]


def test_an_archive_commits_to_what_it_was_sent(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "series", half_volume(3))
    port = free_port()
    with orthanc(tmp_path / "pacs", node_port=port) as pacs:
        there = {
            "type": "dicom",
            "host": "127.0.0.1",
            "port": pacs.dicom_port,
            "ae_title": "ORTHANC",
            "commitment": True,
        }
        configuration = configured(tmp_path, library, port=port, destinations={"pacs": there})
        with running(configuration) as node:
            dcmtk("storescu", node.port, "+sd", tmp_path / "series")
            wait_until(lambda: node.counts()["deliveries"] == {"done": 1})


def test_a_sender_is_promised_what_is_here_and_told_what_is_not(
    tmp_path: Path, library: Path
) -> None:
    files = write_series(tmp_path / "series", half_volume(3))
    port = free_port()
    with orthanc(tmp_path / "sender", node_port=port) as sender:
        configuration = configured(
            tmp_path,
            library,
            port=port,
            senders=[{"ae_title": "ORTHANC", "host": "127.0.0.1", "port": sender.dicom_port}],
            commitment={"keep_days": 1},
        )
        with running(configuration):
            ids = [sender.post("/instances", f.read_bytes())["ID"] for f in files]
            sender.post("/modalities/node/store", {"Resources": ids, "Synchronous": True})
            missing = str(pydicom.uid.generate_uid())
            known = str(pydicom.dcmread(files[0]).SOPInstanceUID)
            kind = "1.2.840.10008.5.1.4.1.1.4"
            asked = sender.post(
                "/modalities/node/storage-commitment",
                {"DicomInstances": [[kind, known], [kind, missing]]},
            )
            wait_until(lambda: sender.get(asked["Path"])["Status"] != "Pending")
            report = sender.get(asked["Path"])
    assert report["Status"] == "Failure"
    assert [each["SOPInstanceUID"] for each in report["Success"]] == [known]
    assert [each["SOPInstanceUID"] for each in report["Failures"]] == [missing]


def test_dcmjs_sends_is_promised_and_takes_the_answer(tmp_path: Path, library: Path) -> None:
    files = write_series(tmp_path / "series", half_volume(3))
    sent = {str(pydicom.dcmread(file).SOPInstanceUID) for file in files}
    port, own = free_port(), free_port()
    there = {"type": "dicom", "host": "127.0.0.1", "port": own, "ae_title": "DCMJS"}
    configuration = configured(
        tmp_path,
        library,
        port=port,
        senders=[{"ae_title": "DCMJS", "host": "127.0.0.1", "port": own}],
        commitment={"keep_days": 1},
        destinations={"pacs": there},
        rule={"report": True, "preview": True},
    )
    with running(configuration) as node, dcmjs(tmp_path / "pacs", own, port, files) as told:
        first = [next(told) for _ in range(5)]
        assert first == [{"echo": 0}, *[{"store": 0}] * 3, {"action": 0}]
        rest = [next(told) for _ in range(4)]
        (report,) = [each for each in rest if "committed" in each]
        assert set(report["committed"]) == sent
        assert report["failed"] == []
        wait_until(lambda: node.counts()["deliveries"] == {"done": 3}, 60)
    theirs = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, (tmp_path / "pacs").iterdir())}
    ours = [pydicom.dcmread(f) for f in (tmp_path / "state" / "answers").rglob("*.dcm")]
    assert {each["received"] for each in rest if "received" in each} == set(theirs)
    assert len(ours) == 3
    for one in ours:
        assert one.SeriesDate  # by which archives order a study's series
        other = theirs[str(one.SOPInstanceUID)]
        assert other.get("PixelData") == one.get("PixelData")
        assert [e.tag for e in other] == [e.tag for e in one]


def test_voxels_come_back_where_they_were(tmp_path: Path, library: Path) -> None:
    image = half_volume(4)
    write_series(tmp_path / "series", image, orientation=(0, 1, 0, 0, 0, -1))
    with running(configured(tmp_path, library)) as node:
        dcmtk("storescu", node.port, "+sd", tmp_path / "series")
        wait_until(lambda: list((tmp_path / "state" / "answers").rglob("*.seg.dcm")))
    answer = next((tmp_path / "state" / "answers").rglob("*.seg.dcm"))
    volume = read_dicom(tmp_path / "series")
    mask = read_segmentation(answer, volume).masks[1]
    assert np.mean(mask == (volume.array > 100)) > 0.9
