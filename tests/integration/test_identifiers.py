"""No exemplar's identity in anything of another patient, nor in the library beside its table.

One patient's study has recognisable identifiers everywhere. It is imported, another patient is
segmented, watched and evaluated, and every file is searched for the first one's.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid
from support.dicom_series import write_series
from support.former_tags import in_the_clear
from support.leaks import leaks
from support.pictures import LABELS, write_pairs
from typer.testing import CliRunner

from recallseg import Library, cli
from recallseg.engines.bundle import Bundle
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_seg import Algorithm, write_dicom_seg
from recallseg.runtime.library.identifiers_file import IDENTIFIERS

MARK = "Zqxv"  # stands in every name and text that identifies the exemplars' patient
ROOT = "1.2.826.0.1.3680043.8.498.7766554433."  # and this begins each of his UIDs
OTHER = "1.2.826.0.1.3680043.8.498.1122334455."  # and this the other patient's
SHAPE = (6, 64, 48)
FAKE = ("--engine", "fake")
PRIVATE = 0x00091010


def call(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done.output


def write_study(folder: Path, mark: str, root: str) -> str:
    """Write a series with ``mark`` and ``root`` in all that may identify; return its UID."""
    array = np.full(SHAPE, 300, np.uint16)
    array[1:5, 0:32, 12:36] = 2000
    array += (np.arange(SHAPE[0]) * len(mark)).astype(np.uint16)[:, None, None]
    texts = (
        *("PatientName", "PatientID", "AccessionNumber", "StudyID", "SeriesDescription"),
        *("StudyDescription", "ProtocolName", "ReferringPhysicianName", "OperatorsName"),
        *("InstitutionName", "StationName", "PatientComments", "ImageComments"),
        *("RequestingPhysician", "OtherPatientNames", "PatientAddress", "DeviceSerialNumber"),
    )
    paths = write_series(folder, array, **{name: f"{mark}{i}" for i, name in enumerate(texts)})
    study, series, frame = (root + generate_uid().rpartition(".")[2][:20] for _ in range(3))
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = frame
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{root}9.{number}"
        block = dataset.private_block(0x0009, f"{mark} PRIVATE", create=True)
        block.add_new(0x10, "LO", f"{mark} private")
        path.unlink()
        dataset.save_as(path.with_name(f"{mark}-{path.name}"))
    return series


def drawn(folder: Path) -> None:
    """Lay a SEG beside a series."""
    volume = read_dicom(folder)
    mask = np.moveaxis(np.zeros(SHAPE, bool), 0, 0)
    mask[1:5, 0:32, 12:36] = True
    if mask.shape != volume.shape:
        mask = mask.transpose([SHAPE.index(size) for size in volume.shape])
    target = folder.with_name(f"{folder.name}.seg.dcm")
    write_dicom_seg(target, {"bar": mask}, volume, Algorithm("1", {}))


def write_exemplars(folder: Path) -> list[str]:
    """Write one patient's study in every format; return what must not be found."""
    series = write_study(folder / f"{MARK} Anna" / "series", f"{MARK}", ROOT)
    drawn(folder / f"{MARK} Anna" / "series")
    write_pairs(folder / "pictures" / f"{MARK}-folder", [0.1, 0.6])
    for path in (folder / "pictures" / f"{MARK}-folder").iterdir():
        path.rename(path.with_name(f"{MARK}-{path.name}"))
    array = np.zeros((48, 64, 4), np.int16)
    array[12:36, 0:32, 1:3] = 900
    affine = np.diag([-0.9, -0.8, 3.0, 1.0])
    for name, values in ((".nii.gz", array), (".mask.nii.gz", (array > 0).astype(np.uint8))):
        image = nibabel.Nifti1Image(values, affine)
        image.header["descrip"], image.header["db_name"] = f"{MARK} Anna", MARK
        (folder / "nifti").mkdir(exist_ok=True)
        nibabel.save(image, folder / "nifti" / f"{MARK}-scan{name}")
    return [MARK, ROOT, series]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECALLSEG_STATE", str(tmp_path / "out" / "state"))
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path / "out" / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_nothing_of_an_exemplar_s_patient_is_found(fake_bundle: Bundle, home: Path) -> None:
    wanted = write_exemplars(home / "in")
    library, out, told = home / "lib", home / "out", []
    call("library", "create", library, "--bundle", fake_bundle.path)
    tag = ("--tag", f"PatientID={MARK}0", "--tag", "site=a")
    labels = ("--labels", "1=bar")
    call("library", "import", library, home / "in" / f"{MARK} Anna", *tag, *FAKE)
    call("library", "import", library, home / "in" / "nifti", *labels, *tag, *FAKE)
    call("library", "import", library, home / "in" / "pictures", "--labels", LABELS, *tag, *FAKE)
    told.append(call("library", "list", library))
    told.append(call("library", "list", library, "--json"))
    told.append(call("library", "calibrate", library, "--k", 2, "--structures", "bar", *FAKE))

    series = write_study(home / "query" / "series", "Other", OTHER)
    write_pairs(home / "query" / "pictures", [0.3])
    (home / "query" / "pictures" / "disc-0.30.mask.png").unlink()
    asked = ("--structures", "bar,disc", "--k", 4, "--tag", f"PatientID={MARK}0", *FAKE)
    audit = ("--audit", out / "audit.jsonl")
    told.append(
        call(
            *("segment", library, home / "query", "--output", out / "segmented", "--preview"),
            *("--json", *asked, *audit),
        )
    )
    told.append(
        call(
            *("watch", home / "query", "--library", library, "--output", out / "watched"),
            *("--once", "--settle", 0, *asked, *audit),
        )
    )
    drawn(home / "query" / "series")
    told.append(
        call("evaluate", library, home / "query", *labels, "--output", out / "evaluated", *FAKE)
    )
    told.append(call("library", "verify", library))
    told.append(
        call(
            *("archive", library, home / "query", "--output", out / "archived", "--workers", 1),
            *("--summary", out / "all.csv", *asked),
        )
    )
    told.append(call("library", "history", library, "--json"))
    told.append(call("library", "next", library, home / "query", "--json", *asked))
    told.append(call("library", "backup", library, out / "backup", "--json"))
    call("sign", "key", home / "maker.key")
    signed = ("--version", "1.0.0", "--key", home / "maker.key", "--images")
    told.append(call("library", "release", library, *signed, "--output", out / "release"))
    trusted = ("--trust", home / "maker.key.pub")
    told.append(call("library", "install", out / "release", "--into", out / "site", *trusted))
    other = home / "other"
    call("library", "create", other, "--bundle", fake_bundle.path)
    told.append(call("library", "merge", other, library, "--json", *FAKE))
    shutil.copytree(other, out / "merged", ignore=shutil.ignore_patterns(IDENTIFIERS))
    (out / "told.txt").write_text("\n".join(told))

    table = library / IDENTIFIERS
    records = [path for path in files(out) if path.suffix in (".json", ".jsonl", ".html", ".dcm")]
    assert len(records) > 8  # so there is something to search
    assert leaks([*files(out), *(p for p in files(library) if p != table)], wanted) == []
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    with Library.open(library) as opened:
        known = [opened.whois(exemplar.key) for exemplar in opened]
    assert all(MARK in each.name and each.tags == {"PatientID": f"{MARK}0"} for each in known)
    assert any(wanted[2] in each.name for each in known)

    # The query's own identity: its outputs may bear its name, its UIDs stand in the SEG alone, but
    # for the digest of its series that tells its files from others'.
    journal = out / "archived" / ".recallseg-archive.sqlite"  # private state, among the outputs
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    shown = [path for path in files(out) if path != journal]
    own = [line for line in leaks(shown, [OTHER, series]) if "its SHA-256" not in line]
    assert any(".seg.dcm" in line for line in own)
    assert [line for line in own if ".seg.dcm" not in line] == []


@pytest.fixture
def of_one_patient(fake_bundle: Bundle, home: Path) -> tuple[Path, list[str]]:
    """A library of one patient's study, and what must not be found."""
    wanted = write_exemplars(home / "in")
    library, tag = home / "lib", ("--tag", f"PatientID={MARK}0")
    call("library", "create", library, "--bundle", fake_bundle.path)
    call("library", "import", library, home / "in" / f"{MARK} Anna", *tag, *FAKE)
    labels = ("--labels", "1=bar")
    call("library", "import", library, home / "in" / "nifti", *labels, *tag, *FAKE)
    return library, wanted


def ended(service: subprocess.Popen[str], said: list[str]) -> str:
    """Stop a service; return all that it said."""
    service.send_signal(signal.SIGTERM)
    rest, _ = service.communicate(timeout=120)
    assert service.returncode == 0, rest
    return "".join([*said, rest])


def begun(*command: object, until: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a service; return it, and what it said until a line has ``until``."""
    service = subprocess.Popen(
        [sys.executable, "-m", "recallseg", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    assert service.stdout is not None
    while not said or until not in said[-1]:
        said.append(service.stdout.readline())
        assert said[-1], "".join(said)
    return service, said


def test_live_frames_say_nothing_of_an_exemplar_s_patient(
    of_one_patient: tuple[Path, list[str]], home: Path
) -> None:
    pytest.importorskip("pyigtl")
    from support.igtl import next_of, raw_client, sent

    from recallseg.runtime.services.igtl.wire import make

    library, wanted = of_one_patient
    out = home / "out"
    (home / "igtl.toml").write_text(
        f"""
        [log]
        level = "debug"
        [audit]
        log = "{out}/audit.jsonl"
        [igtl]
        port = 0
        message_s = 60
        deadline_ms = 60000
        [[rules]]
        name = "bars"
        library = "{library}"
        recipe = {{ k = 2, engine = "fake", tags = {{ PatientID = "{MARK}0" }} }}
        """
    )
    out.mkdir(exist_ok=True)
    service, said = begun("igtl", "--config", home / "igtl.toml", until="listening")
    try:
        port = json.loads(said[-1])["port"]
        frame = np.full((1, 64, 48), 30, np.uint16)
        frame[0, 0:32, 12:36] = 200
        with raw_client(port) as one:
            one.sendall(sent(frame, "Other").pack())
            answers = [next_of(one, "LBMETA").raw, next_of(one, "IMAGE", "Other-mask").raw]
            answers.append(next_of(one, "STATUS").raw)  # of that mask
            one.sendall(make("IMAGE", "Bad", b"no image").raw)
            answers.append(next_of(one, "STATUS").raw)
            one.sendall(b"what is no OpenIGTLink at all" * 9)
            answers.append(next_of(one, "STATUS").raw)
    finally:
        told = ended(service, said)
    (out / "told").write_bytes(told.encode() + b"".join(map(bytes, answers)))
    assert "cannot be followed" in told
    assert (out / "audit.jsonl").read_text().count('"segment') >= 1
    assert leaks(files(out), wanted) == []


def test_the_worklist_says_who_it_is_only_to_who_annotates(
    of_one_patient: tuple[Path, list[str]], home: Path
) -> None:
    """Images that wait bear names of their patients; a library that takes them does not.

    What is accepted is encoded by the engine that was asked for, or this bundle's would not be.
    """
    library, wanted = of_one_patient
    out, folder = home / "out", home / "waiting"
    for mark, root in ((MARK, ROOT), ("Other", OTHER)):
        write_study(folder / f"{mark} Anna", mark, root)
    write_pairs(folder / "pictures", [0.3])
    for path in (folder / "pictures").iterdir():
        path.rename(path.with_name(f"{MARK}-{path.name}"))
    (folder / f"{MARK}-broken.dcm").write_bytes(bytes(128) + b"DICM" + MARK.encode() * 9)
    audit = out / "audit.jsonl"
    out.mkdir(exist_ok=True)
    service, said = begun(
        *("serve", library, "--port", 0, "--folder", folder, "--user", "ada", "--audit", audit),
        *("--k", 2, *FAKE),
        until="#token=",
    )
    url, token = re.search(r"(http://[\d.:]+)/#token=(\S+)", said[-1]).groups()  # type: ignore[union-attr]
    shown: list[bytes] = []
    try:
        with httpx.Client(base_url=f"{url}/api", timeout=120) as one:
            one.headers["Authorization"] = f"Bearer {token}"
            images = one.get("/worklist").json()["images"]
            assert len(images) >= 3
            done = Counter[str]()
            for number, image in enumerate(images):
                opened = one.post("/drafts", json={"mark": image["mark"]})
                if opened.status_code != 201:
                    done["refused"] += 1
                    continue
                draft = opened.json()["draft"]
                assert one.post(f"/drafts/{draft}/propose").status_code == 200
                what = "reject" if number == 0 else "accept"
                body = {} if number == 0 else {"structures": ["bar"], "slices": "all"}
                answer = one.post(f"/drafts/{draft}/{what}", json=body)
                done[f"{what} {answer.status_code}"] += 1
                one.delete(f"/drafts/{draft}")
            assert done["accept 200"] >= 1, done
            assert one.get("/drafts/nothing").status_code >= 400
            shown += [one.get(f"/{path}").content for path in ("library", "history", "server")]
    finally:
        (out / "told").write_text(ended(service, said))
    (out / "shown").write_bytes(b"".join(shown))
    call("library", "verify", library)
    table = library / IDENTIFIERS
    held = [path for path in files(library) if path != table]
    assert leaks([*files(out), *held], wanted) == []
    assert leaks(held, [OTHER, "OtherAnna"]) == []


def test_measuring_says_nothing_of_a_patient(
    of_one_patient: tuple[Path, list[str]], fake_bundle: Bundle, home: Path
) -> None:
    library, wanted = of_one_patient
    out = home / "out"
    asked = ("--queries", 15, "--k", 2, "--threads", 1, "--query-size", 32, *FAKE)
    told = [call("bench", "soak", library, *asked, "--output", out / "soak")]
    data = home / f"{MARK} data"  # of the layout of ACDC, with names in every header
    for number in range(1, 4):
        name = f"patient{number:03d}"
        place = data / "training" / name
        place.mkdir(parents=True)
        (place / "Info.cfg").write_text(f"ED: 1\nES: 2\nGroup: {MARK}\nName: {MARK} Anna\n")
        for frame in (1, 2):
            array = np.zeros((48, 48, 2), np.int16)
            array[8 * number : 8 * number + 12, 8:20] = 900 + 40 * frame
            array += np.arange(2, dtype=np.int16)  # no two slices alike
            for ending, values in (("", array), ("_gt", (array > 9).astype(np.uint8) * 3)):
                image = nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 10, 1]))
                image.header["descrip"] = f"{MARK} Anna"
                nibabel.save(image, place / f"{name}_frame{frame:02d}{ending}.nii.gz")
    command = ("reproduce", "--data", data, "--bundle", fake_bundle.path, "--queries", 2)
    told += [call(*command, "--draws", 1, *FAKE, *more) for more in ((), ("--json",))]
    (data / "training" / "patient001" / "patient001_frame01_gt.nii.gz").write_bytes(b"damaged")
    failed = call(*command, *FAKE, status=1)
    assert f"{MARK} data" in " ".join(failed.split())  # whoever named it has to find the file
    (out / "told").write_text("\n".join(told))
    assert leaks(files(out), [*wanted, f"{MARK}"]) == []


def test_anonymising_leaves_nothing(fake_bundle: Bundle, home: Path) -> None:
    """A library as an earlier version made it: keys from files, tags in the clear."""
    write_pairs(home / "pairs", [0.1, 0.3, 0.5, 0.7, 0.9])
    for path in (home / "pairs").iterdir():
        path.rename(path.with_name(f"{MARK}-{path.name}"))
    library = home / "lib"
    call("library", "create", library, "--bundle", fake_bundle.path)
    call(
        *("library", "import", library, home / "pairs", "--labels", LABELS, "--key", "{name}"),
        *("--tag", "patient=PLAIN", "--tag", "view=axial", *FAKE),
    )
    (library / IDENTIFIERS).unlink()
    in_the_clear(library, f"{MARK}-patient")
    with Library.open(library) as opened:
        keys, before = [exemplar.key for exemplar in opened], opened.digest
    asked = ("--k", 2, "--structures", "disc", *FAKE)
    call("library", "calibrate", library, *asked)
    assert leaks(files(library), [MARK])
    filtered = ("--tag", f"patient={MARK}-patient")
    refused = call("library", "calibrate", library, *asked, *filtered, status=1)
    assert "in the clear" in " ".join(refused.split())

    said = json.loads(call("library", "anonymise", library, "--json"))
    assert (said["exemplars"], said["keys"], said["tags"]) == (5, 5, {"patient": 5})
    assert said["digest_before"] == before != said["digest"]
    assert leaks([p for p in files(library) if p.name != IDENTIFIERS], [MARK]) == []
    call("library", "verify", library)
    call("library", "calibrate", library, *asked, *filtered)  # the filter is hashed alike
    with Library.open(library) as opened:
        assert opened.digest == said["digest"]
        known = [opened.whois(key) for key in keys]  # by their former names
        assert [each.name for each in known] == keys
        assert {each.tags["patient"] for each in known} == {f"{MARK}-patient"}
        assert all(each.key in opened for each in known)
        assert len(opened.calibrations) == 2
        assert all(one.current for one in opened.calibrations)
        recipe = opened.calibrations[0].recipe
        [learnt] = opened.learnt([recipe], ["disc"], {}).values()
        assert learnt.made_with == 5
    again = json.loads(call("library", "anonymise", library, "--json"))
    assert (again["keys"], again["tags"]) == (0, {})
    assert again["digest"] == said["digest"]
    shown = call("library", "whois", library, keys[0])
    assert keys[0] in shown
    assert f"patient={MARK}-patient" in shown


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    text = f"of {MARK} Anna"
    picture = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    inner = io.BytesIO()
    np.savez_compressed(inner, names=np.array(json.dumps([text])))
    database = sqlite3.connect(tmp_path / "sql")
    database.execute("CREATE TABLE t (v)")
    database.execute("INSERT INTO t VALUES (?)", (gzip.compress(text.encode()),))
    database.commit()
    database.close()
    hidden = {
        "plain": text.upper().encode(),
        "wide": text.encode("utf-16-be"),
        "gzip": gzip.compress(text.encode()),
        "npz": inner.getvalue(),
        "page": b"<img src='data:x;base64," + base64.b64encode(gzip.compress(text.encode())),
        "picture": picture + text.encode(),
    }
    for name, data in hidden.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / f"{MARK}-file").write_bytes(b"")
    found = leaks(files(tmp_path), [MARK])
    for name in (*hidden, "sql", f"{MARK}-file"):
        assert any(f"/{name} " in line for line in found), name
