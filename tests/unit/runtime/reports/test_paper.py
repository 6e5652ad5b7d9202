"""The paper's experiment on made folders of the layouts of ACDC and CHAOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from support.dicom_series import write_series
from support.pictures import disc
from support.ungiven import ungiven
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.reports.challenges import find_challenge
from recallseg.runtime.reports.paper import PAPER_DICE, Protocol, reproduce


def heart(seed: float) -> tuple[np.ndarray, np.ndarray]:
    """A stack of three slices (x, y, z) and its labels 1, 2, 3."""
    images, labels = [], []
    for z in range(3):
        shown = disc((seed + z * 0.07) % 1, 48)
        ring, core = shown.masks["disc"], shown.masks["core"]
        images.append(shown.image.T + seed)
        labels.append((2 * ring + 3 * core + np.roll(core, 16, 0)).clip(0, 3).T)
    return np.stack(images, axis=2).astype(np.int16), np.stack(labels, axis=2).astype(np.uint8)


def write_acdc(root: Path, patients: int, frames: tuple[int, int] = (1, 12)) -> None:
    for number in range(1, patients + 1):
        name = f"patient{number:03d}"
        folder = root / "training" / name
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text(
            f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nHeight: 180.0\nNbFrame: 30\n"
        )
        for frame in frames:
            image, label = heart(number * 0.13 + frame * 0.011)
            for array, ending in ((image, ""), (label, "_gt")):
                path = folder / f"{name}_frame{frame:02d}{ending}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 10, 1])), path)


def write_chaos(root: Path, patients: int) -> None:
    for number in range(1, patients + 1):
        for sequence, inner in (("T1DUAL", "DICOM_anon/InPhase"), ("T2SPIR", "DICOM_anon")):
            case = root / "Train_Sets" / "MR" / str(number) / sequence
            (case / "Ground").mkdir(parents=True)
            shown = [disc((number * 0.17 + z * 0.1) % 1, 48) for z in range(3)]
            write_series(
                case / inner, np.stack([s.image.astype(np.uint16) + number for s in shown])
            )
            files = sorted((case / inner).glob("*.dcm"))
            assert len(files) == 3
            order = sorted(files, key=_position)
            for file, picture in zip(order, shown, strict=True):
                core, ring = picture.masks["core"], picture.masks["disc"]
                values = 63 * ring + 126 * core + 189 * np.roll(core, 16, 0)
                values = np.where(values > 189, 126, values) + 252 * np.roll(core, -16, 0)
                values = np.where(values > 252, 252, values)
                cv2.imwrite(str(case / "Ground" / f"{file.stem}.png"), values.astype(np.uint8))


def _position(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


def test_acdc_is_read_as_its_makers_give_it(tmp_path: Path) -> None:
    write_acdc(tmp_path, 2)
    (found,) = find_challenge(tmp_path)
    assert found.structures == ("RV", "Myo", "LV")
    assert [s.name for s in found.sources][:2] == ["patient001_frame01", "patient001_frame12"]
    assert {s.group for s in found.sources} == {"patient001", "patient002"}
    images = found.sources[0].read()
    assert len(images.annotated) == 3
    assert images.across == 10.0
    assert images.acquisition.spacing == (1.5, 1.5)
    _, label = heart(0.13 + 0.011)
    sizes = [sum(int(a.masks[n].sum()) for a in images.annotated if n in a.masks)
             for n in found.structures]  # fmt: skip
    assert sizes == [int((label == value).sum()) for value in (1, 2, 3)]


def test_chaos_is_read_as_its_makers_give_it(tmp_path: Path) -> None:
    write_chaos(tmp_path, 2)
    first, second = find_challenge(tmp_path)
    assert (first.name, second.name) == ("CHAOS T1DUAL", "CHAOS T2SPIR")
    assert first.structures == ("liver", "right kidney", "left kidney", "spleen")
    assert len(first.sources) == 6
    for one in first.sources:
        (annotated,) = one.read().annotated
        liver = annotated.masks["liver"]
        # The disc is brighter than what lies around it: the mask lies on it, not on its mirror.
        assert annotated.image[liver].mean() > annotated.image[~liver].mean() + 20


def test_what_is_not_complete_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither ACDC"):
        find_challenge(tmp_path)
    write_acdc(tmp_path / "a", 2)
    image = tmp_path / "a" / "training" / "patient001" / "patient001_frame01.nii.gz"
    image.rename(image.with_name("away.nii.gz"))
    with pytest.raises(InputError, match=r"patient001_frame01\.nii\.gz is missing"):
        find_challenge(tmp_path / "a")
    write_acdc(tmp_path / "b", 1)
    info = tmp_path / "b" / "training" / "patient001" / "Info.cfg"
    info.write_text("ED: 1\nES: 9\n")
    with pytest.raises(InputError, match=r"names frames \[1, 9\]"):
        find_challenge(tmp_path / "b")
    write_chaos(tmp_path / "c", 1)
    ground = tmp_path / "c" / "Train_Sets" / "MR" / "1" / "T2SPIR" / "Ground"
    next(iter(sorted(ground.glob("*.png")))).unlink()
    with pytest.raises(InputError, match="do not have the same names"):
        find_challenge(tmp_path / "c")


@pytest.mark.parametrize("write", [write_acdc, write_chaos])
def test_what_is_measured_of_a_part_is_another_number(tmp_path: Path, write: Any) -> None:
    """A patient whose folder cannot be listed is not left out."""
    write(tmp_path, 2)
    (lost, *_) = sorted(p for p in tmp_path.rglob("*") if p.is_dir() and not p.name[-1].isalpha())
    assert find_challenge(tmp_path)
    with ungiven(lost), pytest.raises(InputError, match=f"{lost}: cannot be looked at"):
        find_challenge(tmp_path)


def test_one_patient_is_not_enough(tmp_path: Path, fake_bundle: Bundle) -> None:
    write_acdc(tmp_path / "in", 1)
    with pytest.raises(InputError, match="1 patient here"):
        reproduce(find_challenge(tmp_path / "in")[0], fake_bundle, tmp_path / "lib", engine="fake")


def test_each_switch_turns_its_deviation_off(fake_bundle: Bundle) -> None:
    usual = Protocol().deviations(fake_bundle)
    paper = Protocol.as_the_paper().deviations(fake_bundle)
    off = [before.switch for before, after in zip(usual, paper, strict=True)
           if before.active and not after.active]  # fmt: skip
    assert off == ["--exact-memories", "--every-distance", "--no-presence", "--whole-range"]


def test_the_switches_change_what_is_asked(tmp_path: Path, fake_bundle: Bundle) -> None:
    write_acdc(tmp_path / "in", 5)
    (challenge,) = find_challenge(tmp_path / "in")
    how = {"engine": "fake", "budgets": (4,), "draws": 2, "queries": 4}
    usual = reproduce(challenge, fake_bundle, tmp_path / "a", **how)
    paper = reproduce(
        challenge, fake_bundle, tmp_path / "b", protocol=Protocol.as_the_paper(), **how
    )
    assert (usual.queries, usual.patients) == (4, (4, 1))
    assert usual.exemplars == 4 * 2 * 3
    recipes = [one.evaluation.provenance[2].recipe for one in (usual, paper)]
    assert [recipe.reach for recipe in recipes] == [3.0, np.inf]
    assert recipes[1].intensity["high"] == 100.0
    assert all(
        len(c.recalled) == c.k for c in paper.evaluation.cases if not c.annotated and c.k < 24
    )
    assert any("budgets" in text or "slices to segment" in text for text in usual.notes) is False
    table = usual.to_json()
    assert table["paper_dice"]["LV"]["32"] == PAPER_DICE["ACDC", "LV"][32] == 0.86
    assert set(table["dice"]["LV"]) == {"2", "4", "8", "16", "32"}


def test_slices_may_be_equal(tmp_path: Path, fake_bundle: Bundle) -> None:
    write_acdc(tmp_path / "in", 2)
    folder = tmp_path / "in" / "training" / "patient001"
    for ending in (".nii.gz", "_gt.nii.gz"):
        first = folder / f"patient001_frame01{ending}"
        (folder / f"patient001_frame12{ending}").write_bytes(first.read_bytes())
    (challenge,) = find_challenge(tmp_path / "in")
    how = {"engine": "fake", "budgets": (), "queries": 2}
    assert reproduce(challenge, fake_bundle, tmp_path / "a", **how).exemplars == 2 * 3


def test_exact_memories_are_those_that_were_made(tmp_path: Path) -> None:
    from recallseg.engines.bundle import Bundle
    from recallseg.runtime.model.model import Model
    from recallseg.runtime.model.preprocess import Intensity
    from recallseg.runtime.reports.paper import _ExactLibrary

    bundle = Bundle.open("demo")
    shown = disc(0.4, 64)
    with Model.open(bundle, threads=1) as model:
        made = model.memorize(shown.image, shown.masks, Intensity())
        library = _ExactLibrary.recording(tmp_path / "lib", bundle, Intensity(), model)
        with library:
            key = library.add(shown.image, shown.masks)
            stored = library.memories([key], "core")
            tokens = np.zeros((1, *made.memories["core"].shape), np.float32)
            pointers = np.zeros((1, *made.pointers["core"].shape), np.float32)
            library.gather(stored, tokens, pointers)
    np.testing.assert_array_equal(tokens[0], made.memories["core"])
    assert (tokens[0] != tokens[0].astype(np.float16)).any()


def test_command(tmp_path: Path, fake_bundle: Bundle) -> None:
    write_acdc(tmp_path / "in", 3)
    write_chaos(tmp_path / "in", 2)
    arguments = ["reproduce", "--data", str(tmp_path / "in"), "--bundle", str(fake_bundle.path)]
    arguments += ["--engine", "fake", "--queries", "3", "--budgets", "2", "--draws", "2"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    for text in ("ACDC", "CHAOS T1DUAL", "CHAOS T2SPIR", "paper", "0.86", "515", "--no-presence"):
        assert text in told.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--as-the-paper", "--json"]).stdout)
    assert [one["data"] for one in found] == ["ACDC", "CHAOS T1DUAL", "CHAOS T2SPIR"]
    assert not any(d["active"] for d in found[0]["deviations"] if d["switch"].startswith("--"))
