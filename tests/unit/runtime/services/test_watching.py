from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from support.dicom_series import write_series
from support.inside import HereDecoder
from support.ungiven import ungiven

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.errors import InputError
from recallseg.runtime.services import decoding, patience, watching
from recallseg.runtime.services.audit import AuditLog, verify_audit_log
from recallseg.runtime.services.decoding import DecodingLimits, IsolatedDecoder
from recallseg.runtime.services.watching import Arrival, Watcher
from recallseg.runtime.volumes.outputs import VolumeSettings


@pytest.fixture(autouse=True)
def decoder_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads takes longer to start than a watch here: only limits want one."""
    monkeypatch.setattr(
        watching,
        "IsolatedDecoder",
        lambda limits: HereDecoder() if limits is None else IsolatedDecoder(limits),
    )


@pytest.fixture
def segmenter(tmp_path: Path, fake_bundle: Bundle) -> Segmenter:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    library.add(picture(0), {"half": picture(0) > 100})
    return Segmenter(library, k=1, engine="fake")


def picture(value: int) -> np.ndarray:
    image = np.full((64, 64), 30 + value, np.uint8)
    image[:32] = 200
    return image


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "ward 7").mkdir(parents=True)
    cv2.imwrite(str(folder / "a.png"), picture(1))
    cv2.imwrite(str(folder / "ward 7" / "b.png"), picture(2))
    return folder


def watch(segmenter: Segmenter, inbox: Path, **settings: object) -> list[Arrival]:
    with Watcher(
        segmenter,
        inbox,
        inbox.parent / "out",
        **{"settle_s": 0.0, **settings},  # type: ignore[arg-type]
    ) as watcher:
        return list(watcher.run(Event(), once=True, poll_s=0.01))


def test_each_image_is_segmented_once(segmenter: Segmenter, inbox: Path, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    arrivals = watch(segmenter, inbox, audit=log)
    assert [arrival.path.name for arrival in arrivals] == ["a.png", "b.png"]
    out = tmp_path / "out"
    assert json.loads((out / "ward 7" / "b.json").read_text())["image"] == "b.png"
    mask = cv2.imread(str(out / "a.mask.png"), cv2.IMREAD_UNCHANGED)
    assert (mask[:30] == 1).all()
    assert watch(segmenter, inbox, audit=log) == []
    assert verify_audit_log(log.path).entries == 2


def test_a_file_that_is_still_written_is_waited_for(segmenter: Segmenter, inbox: Path) -> None:
    whole = (inbox / "a.png").read_bytes()
    (inbox / "c.png").write_bytes(whole[:40])
    stop = Event()
    with Watcher(segmenter, inbox, inbox.parent / "out", settle_s=0.3) as watcher:
        seen = []
        for arrival in watcher.run(stop, once=True, poll_s=0.02):
            seen.append(arrival)
            if len(seen) == 1:
                with (inbox / "c.png").open("ab") as file:
                    file.write(whole[40:])
    assert sorted(arrival.path.name for arrival in seen if arrival.record) == [
        "a.png",
        "b.png",
        "c.png",
    ]


def test_what_cannot_be_read_is_reported_once_and_tried_again_when_it_changes(
    segmenter: Segmenter, inbox: Path
) -> None:
    (inbox / "broken.png").write_bytes(b"not a picture")
    failures = [a for a in watch(segmenter, inbox) if a.record is None]
    assert [a.path.name for a in failures] == ["broken.png"]
    report = inbox.parent / "out" / "broken.png.error.json"
    assert "broken.png" in json.loads(report.read_text())["error"]
    assert watch(segmenter, inbox) == []
    cv2.imwrite(str(inbox / "broken.png"), picture(3))
    assert [a.record is not None for a in watch(segmenter, inbox)] == [True]
    assert not report.exists()


def test_pixels_that_come_after_their_header_are_waited_for(
    segmenter: Segmenter, inbox: Path
) -> None:
    watch(segmenter, inbox)
    image = SimpleITK.GetImageFromArray(np.stack([picture(n) for n in range(3)]))
    SimpleITK.WriteImage(image, str(inbox / "c.mhd"))
    pixels = (inbox / "c.raw").rename(inbox.parent / "c.raw")
    (alone,) = watch(segmenter, inbox)
    assert "c.raw, which cannot be opened beside it" in str(alone.error)
    assert watch(segmenter, inbox) == []
    pixels.rename(inbox / "c.raw")
    (arrival,) = watch(segmenter, inbox)
    assert arrival.record is not None
    assert arrival.record["mask"] == "c.mask.mha"
    assert watch(segmenter, inbox) == []
    image[0, 0, 0] = 1
    SimpleITK.WriteImage(image, str(inbox / "c.mhd"))  # of which only the pixels are others
    assert [each.name for each in watch(segmenter, inbox)] == ["c.mhd"]


def test_another_image_under_a_name_is_segmented_anew(segmenter: Segmenter, inbox: Path) -> None:
    """Else the mask of the former one, of another patient perhaps, would stay beside it."""
    watch(segmenter, inbox)
    turned = cv2.imread(str(inbox / "a.png"), cv2.IMREAD_UNCHANGED)[::-1]
    cv2.imwrite(str(inbox / "a.png"), turned)
    assert [a.name for a in watch(segmenter, inbox)] == ["a.png"]
    mask = cv2.imread(str(inbox.parent / "out" / "a.mask.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask, segmenter.segment(turned).label_map)
    assert watch(segmenter, inbox) == []
    record = inbox.parent / "out" / "a.json"
    earlier = json.loads(record.read_text())
    del earlier["signature"]  # as RecallSeg wrote them before
    record.write_text(json.dumps(earlier))
    assert watch(segmenter, inbox) == []


def test_a_slice_that_changed_makes_the_series_anew(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    paths = send(inbox, 3)
    watch(segmenter, inbox)
    dataset = pydicom.dcmread(paths[1])
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(paths[1])
    assert [a.record["files"] for a in watch(segmenter, inbox) if a.record] == [3]
    assert watch(segmenter, inbox) == []


def test_what_the_disk_did_not_give_is_asked_for_again(
    segmenter: Segmenter, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk says nothing of the image, which would be set aside for good."""
    given, asked = decoding._answer, Counter[str]()

    def answer(question: Any) -> Any:
        name = question.item.path.name
        asked[name] += 1
        if name == "a.png" and asked[name] < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return given(question)

    monkeypatch.setattr(decoding, "_answer", answer)
    found = {a.name: a for a in watch(segmenter, inbox)}
    assert "Input/output error" in str(found["a.png"].error)
    assert found["b.png"].record is not None
    assert not list((inbox.parent / "out").rglob("*.error.json"))
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)  # the next watch tries it, and so does this one
    assert [a.record is not None for a in watch(segmenter, inbox)] == [False, True]
    assert asked["a.png"] == 3


def test_two_images_of_one_name_do_not_replace_each_other(
    segmenter: Segmenter, inbox: Path
) -> None:
    cv2.imwrite(str(inbox / "a.bmp"), picture(4))
    arrivals = {a.path.name: a for a in watch(segmenter, inbox)}
    assert sum(a.record is not None for a in arrivals.values()) == 2
    failed = next(a for a in arrivals.values() if a.record is None)
    assert "Rename one" in str(failed.error)


def test_results_hidden_files_and_masks_are_passed_over(segmenter: Segmenter, inbox: Path) -> None:
    for name in (".hidden.png", "a.mask.png", "notes.txt"):
        (inbox / name).write_bytes(b"x")
    assert len(watch(segmenter, inbox)) == 2


def test_wrong_folders_are_refused(segmenter: Segmenter, inbox: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        Watcher(segmenter, inbox / "none", inbox.parent / "out")
    with pytest.raises(InputError, match="apart"):
        Watcher(segmenter, inbox, inbox / "out")
    with pytest.raises(InputError, match="settle"):
        Watcher(segmenter, inbox, inbox.parent / "out", settle_s=-1)
    with (
        Watcher(segmenter, inbox, inbox.parent / "out"),
        pytest.raises(InputError, match="another process"),
    ):
        Watcher(segmenter, inbox, inbox.parent / "out")


def test_a_stopped_watch_ends(segmenter: Segmenter, inbox: Path) -> None:
    stop = Event()
    with Watcher(segmenter, inbox, inbox.parent / "out", settle_s=0.0) as watcher:
        for _ in watcher.run(stop, poll_s=0.01):
            stop.set()
    assert len(list((inbox.parent / "out").rglob("*.mask.png"))) == 1


def send(folder: Path, count: int, **attributes: object) -> list[Path]:
    """A series as a receiver stores it: files without a suffix, beside whatever else there is."""
    array = np.stack([picture(i).astype(np.uint16) for i in range(count)])
    made = write_series(folder.parent / "made", array, **attributes)
    folder.mkdir(exist_ok=True)
    return [
        path.rename(folder / f"{attributes.get('SeriesNumber', 1)}.{path.stem}") for path in made
    ]


def test_a_series_is_one_item(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    send(inbox, 3, SeriesNumber=4)
    send(inbox, 2, SeriesNumber=5)
    log = AuditLog(tmp_path / "audit.jsonl")
    arrivals = watch(segmenter, inbox, audit=log)
    assert [a.name[:5] for a in arrivals] == ["MR-4-", "MR-5-"]
    assert [a.record["files"] for a in arrivals if a.record] == [3, 2]
    assert len(list((tmp_path / "out").glob("MR-*.seg.dcm"))) == 2
    assert watch(segmenter, inbox, audit=log) == []
    assert verify_audit_log(log.path).entries == 2


def test_slices_that_come_late_make_the_series_anew(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    held = [path.rename(tmp_path / path.name) for path in send(inbox, 4)[2:]]
    assert [a.record["files"] for a in watch(segmenter, inbox) if a.record] == [2]
    for path in held:
        path.rename(inbox / path.name)
    assert [a.record["shape"][0] for a in watch(segmenter, inbox) if a.record] == [4]
    assert watch(segmenter, inbox) == []
    held[0] = (inbox / held[0].name).rename(held[0])  # a cleaner takes files away: nothing to do
    assert watch(segmenter, inbox) == []


def test_a_broken_slice_is_reported_for_its_series(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    whole = send(inbox, 3)[1].read_bytes()
    slice_1 = sorted(inbox.iterdir())[1]
    slice_1.write_bytes(whole[:-50])
    (inbox / "torn.dcm").write_bytes(b"half a head")
    failed = watch(segmenter, inbox)
    assert {a.record for a in failed} == {None}
    assert watch(segmenter, inbox) == []
    slice_1.write_bytes(whole)
    assert [a.record["files"] for a in watch(segmenter, inbox) if a.record] == [3]
    assert [p.name for p in (tmp_path / "out").glob("*.error.json")] == ["torn.dcm.error.json"]


def test_volumes_and_segmentations(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    volume = np.stack([picture(i) for i in range(3)], axis=-1)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1.0])), inbox / "scan.nii.gz")
    settings = VolumeSettings(largest=True, preview=True)
    (arrival,) = watch(segmenter, inbox, volumes=settings)
    assert arrival.record is not None
    assert arrival.record["mask"] == "scan.mask.nii.gz"
    assert "half" in arrival.record["cleaned"]
    assert (tmp_path / "out" / "scan.preview.html").is_file()
    (tmp_path / "out" / "scan.mask.nii.gz").rename(inbox / "scan.mask.nii.gz")
    assert watch(segmenter, inbox) == []


def test_an_exemplar_that_goes_while_its_picture_is_drawn_stops_no_watch(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    volume = np.stack([picture(i) for i in range(2)], axis=-1)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1.0])), inbox / "scan.nii.gz")
    library, read = segmenter.library, Library.source
    library.add(picture(9), {"half": picture(9) > 100})

    def source(self: Library, key: str) -> object:
        if key in self:
            self.remove(key)
        return read(self, key)

    monkeypatch.setattr(Library, "source", source)
    (arrival,) = watch(segmenter, inbox, volumes=VolumeSettings(preview=True))
    assert arrival.error is None
    assert len(library) == 1
    assert (tmp_path / "out" / "scan.preview.html").is_file()


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_no_header_leads_out_of_the_output(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    send(inbox, 2, Modality="../../OUT")
    assert [a.record is not None for a in watch(segmenter, inbox)] == [True]
    written = {path.resolve() for path in tmp_path.rglob("*.seg.dcm")}
    assert len(written) == 1
    assert all(path.is_relative_to((tmp_path / "out").resolve()) for path in written)
    assert not list(tmp_path.parent.glob("OUT*"))


def test_series_that_share_32_bits_of_a_digest_do_not_replace_each_other(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    first: dict[bytes, str] = {}
    for number in range(500_000):
        uid = f"1.2.{number}"
        start = hashlib.sha256(uid.encode()).digest()[:4]
        if start in first:
            break
        first[start] = uid
    else:
        pytest.fail("no two of them")
    inbox = tmp_path / "in"
    for each in (uid, first[start]):
        for path in send(tmp_path / "sent", 2):
            dataset = pydicom.dcmread(path)
            dataset.SeriesInstanceUID = each
            inbox.mkdir(exist_ok=True)
            dataset.save_as(inbox / f"{each}.{path.name}")
            path.unlink()
    arrivals = watch(segmenter, inbox)
    assert [a.record is not None for a in arrivals] == [True, True]
    assert len(list((tmp_path / "out").glob("*.seg.dcm"))) == 2
    assert len({a.name for a in arrivals}) == 2


def test_temporary_files_of_a_killed_watch_are_taken_away(
    segmenter: Segmenter, inbox: Path
) -> None:
    left = inbox.parent / "out" / "ward 7" / ".b.json.4711.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    mine = left.with_name(".mine.tmp")
    mine.write_bytes(b"kept")
    watch(segmenter, inbox)
    assert not left.exists()
    assert mine.exists()


def test_an_exemplar_removed_meanwhile_is_no_fault_of_the_image(
    segmenter: Segmenter, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process changes the library between recall and reading: the item is asked again."""
    whole, seen = segmenter.segment, []

    def segment(image: np.ndarray) -> object:
        seen.append(image)
        if len(seen) == 1:
            segmenter.library.add(picture(9), {"half": picture(9) > 100})
            raise InputError("there is no exemplar 'x'")
        return whole(image)

    monkeypatch.setattr(segmenter, "segment", segment)
    arrivals = watch(segmenter, inbox)
    assert [a.record is not None for a in arrivals] == [True, True]
    assert len(seen) == 3
    assert not list((inbox.parent / "out").rglob("*.error.json"))


def test_outputs_keep_out_of_the_way_of_folders(segmenter: Segmenter, tmp_path: Path) -> None:
    """A folder that is named like an output, and paths that are longer than outputs may be."""
    inbox = tmp_path / "in"
    names = ["x.json/a.png", "x.png", "x.mask.png/b.png", "/".join(["d" * 150] * 12) + "/c.png"]
    for number, name in enumerate(names):
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "one.png"), picture(number))
        (tmp_path / "one.png").rename(inbox / name)
    arrivals = watch(segmenter, inbox)
    assert [a.error for a in arrivals] == [None] * 4
    assert len(list((tmp_path / "out").rglob("*.mask.png"))) == 4


def test_what_took_too_long_is_set_aside_and_not_met_again(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    (inbox / "zeros.dcm").write_bytes(bytes(128) + b"DICM")
    os.truncate(inbox / "zeros.dcm", 10**10)
    cv2.imwrite(str(inbox / "a.png"), picture(1))
    limits = DecodingLimits(header_seconds=0.5)
    arrivals = {a.name: a for a in watch(segmenter, inbox, limits=limits)}
    assert "not read within" in str(arrivals["zeros.dcm"].error)
    assert arrivals["a.png"].record is not None
    monkeypatch.setattr(IsolatedDecoder, "read_header", None)  # nothing is read at a second start
    assert watch(segmenter, inbox, limits=limits) == []


def test_limits_of_memory_and_size(segmenter: Segmenter, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    large = np.zeros((9000, 9000, 3), np.uint8)
    cv2.imwrite(str(inbox / "large.png"), large, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    cv2.imwrite(str(inbox / "z.png"), picture(1))
    arrivals = {a.name: a for a in watch(segmenter, inbox, limits=DecodingLimits(file_bytes=5000))}
    assert "at most 5000 are read" in str(arrivals["large.png"].error)
    (inbox / "large.png").touch()
    limits = DecodingLimits(memory_bytes=700 * 2**20)
    (arrival,) = watch(segmenter, inbox, limits=limits)
    assert "memory" in str(arrival.error).lower()


def test_a_watch_that_could_not_begin_keeps_no_other_out(segmenter: Segmenter, inbox: Path) -> None:
    out = inbox.parent / "out"
    out.mkdir()
    (out / "ward 7").mkdir()
    with ungiven(out / "ward 7"), pytest.raises(OSError, match="ward 7"):
        Watcher(segmenter, inbox, out)
    assert len(watch(segmenter, inbox)) == 2


def test_a_folder_that_is_not_given_is_told_as_that(segmenter: Segmenter, inbox: Path) -> None:
    with Watcher(segmenter, inbox, inbox.parent / "out", settle_s=0.0) as watcher:
        with ungiven(inbox / "ward 7" / "b.png"):
            done = list(watcher.run(Event(), once=True, poll_s=0.01))
        assert [each.name for each in done] == ["a.png"]
        assert [each.path.name for each in watcher.not_given] == ["b.png"]


@pytest.mark.parametrize(
    "other", [{"files": None}, {"files": ["x"]}, {"volumes": "3", "files": "1"}]
)
def test_a_record_that_something_else_wrote_ends_no_watch(
    segmenter: Segmenter, inbox: Path, other: dict[str, Any]
) -> None:
    out = inbox.parent / "out"
    out.mkdir()
    (out / "a.json").write_text(json.dumps({"image": "a.png", **other}))
    (out / "a.time1.json").write_text(json.dumps({"image": "a.png", **other}))
    (out / "a.png.error.json").write_text(json.dumps({"files": 5, "error": 3}))
    arrivals = watch(segmenter, inbox, volumes=VolumeSettings(time="all"))
    assert sorted(one.name for one in arrivals) == ["a.png", "b.png"]
    assert all(one.record for one in arrivals)
