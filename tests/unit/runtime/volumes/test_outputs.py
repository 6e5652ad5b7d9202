"""What is written of a volume: structures that overlap, and what is known before the work."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
from support.dicom_series import write_series
from support.multi_frame import items, write_multi_frame
from typer.testing import CliRunner

from recallseg import Bundle, Library, cli
from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.reports.pictures import colour
from recallseg.runtime.reports.volume_page import _masks, contact_sheet, render_volume_page
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.volumes import outputs
from recallseg.runtime.volumes.outputs import VolumeSettings, segment_to_files, write_volume_result
from recallseg.runtime.volumes.slices import VolumeResult, clean_up, segment_volume

SHAPE = (4, 32, 24)
ARRAY = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Path:
    mask = np.zeros(SHAPE[1:], bool)
    mask[4:20, 4:16] = True
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as made:
        made.add(ARRAY[0], {"liver": mask, "tumour": np.roll(mask, 4, 0)})
        made.add(ARRAY[1], {"liver": mask, "tumour": np.roll(mask, 2, 1)})
    return tmp_path / "lib"


def overlapping(library: Path, path: Path) -> tuple[VolumeResult, dict[str, np.ndarray]]:
    """A result whose two structures overlap, and their masks."""
    volume = read_volume(path)
    with Library.open(library) as opened:
        result = segment_volume(Segmenter(opened, k=1, engine="fake"), volume)
    liver, tumour = np.zeros((2, *volume.shape), bool)
    liver[..., 2:20, 2:20], tumour[1:3, 10:25, 10:22] = True, True
    label_map = liver * np.uint8(result.labels["liver"])
    label_map[tumour & ~liver] = result.labels["tumour"]
    shared = {"tumour": np.flatnonzero(tumour & liver)}
    return replace(result, label_map=label_map, shared=shared), {"liver": liver, "tumour": tumour}


@pytest.mark.parametrize("kind", ["dicom", "nrrd"])
def test_structures_that_overlap_survive(tmp_path: Path, library: Path, kind: str) -> None:
    write_series(tmp_path / "s", ARRAY)
    result, masks = overlapping(library, tmp_path / "s")
    for name, mask in masks.items():
        assert np.array_equal(result.masks[name], mask)
    volume = read_volume(tmp_path / "s")
    record = write_volume_result(tmp_path / "x", volume, kind, result, "s")
    assert record["voxels"] == {name: int(mask.sum()) for name, mask in masks.items()}
    _, found = read_annotated_volume(tmp_path / "s", tmp_path / record["mask"], None)
    for name, mask in masks.items():
        assert np.array_equal(found[name], mask)
    assert "no code" not in " ".join(record["notes"])


def test_a_label_map_says_what_it_cannot_hold(tmp_path: Path, library: Path) -> None:
    image = nibabel.Nifti1Image(ARRAY, np.diag([-1.0, -1.0, 3.0, 1.0]))
    nibabel.save(image, tmp_path / "s.nii")
    result, masks = overlapping(library, tmp_path / "s.nii")
    volume = read_volume(tmp_path / "s.nii")
    record = write_volume_result(tmp_path / "x", volume, "nifti", result, "s.nii")
    both = int((masks["liver"] & masks["tumour"]).sum())
    assert both > 0
    assert f"overlap in {both} voxels" in " ".join(record["notes"])
    assert record["voxels"]["tumour"] == masks["tumour"].sum()


def test_segmenting_keeps_what_overlaps(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "s", ARRAY)
    volume = read_volume(tmp_path / "s")
    planes = []
    with Library.open(library) as opened:
        result = segment_volume(
            Segmenter(opened, k=1, engine="fake"), volume,
            on_slice=lambda image, found: planes.append(found.masks),
        )  # fmt: skip
    for name in result.labels:
        assert np.array_equal(result.mask(name), np.stack([masks[name] for masks in planes]))


def test_how_an_array_lies_in_memory_changes_nothing(library: Path) -> None:
    lying = np.asfortranarray(ARRAY), ARRAY.transpose(2, 0, 1).copy().transpose(1, 2, 0), ARRAY
    with Library.open(library) as opened:
        segmenter = Segmenter(opened, k=1, engine="fake")
        found = [segment_volume(segmenter, Volume(each, np.eye(4), "LPS")) for each in lying]
    cleaned = [clean_up(each, largest=True, fill_holes=True) for each in found]
    assert found[2].shared
    for one, clean, array in zip(found, cleaned, lying, strict=True):
        assert one == found[2]
        assert one.label_map.strides == np.zeros_like(array, np.uint8).strides
        for name in one.labels:
            assert np.array_equal(clean.mask(name), cleaned[2].mask(name))


def test_clean_up_of_what_overlaps(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "s", ARRAY)
    result, masks = overlapping(library, tmp_path / "s")
    stray = result.label_map.copy()
    stray[0, 0, 0] = result.labels["tumour"]
    shared = {"tumour": np.append(result.shared["tumour"], np.ravel_multi_index((3, 3, 3), SHAPE))}
    cleaned = clean_up(replace(result, label_map=stray, shared=shared), largest=True)
    assert cleaned.cleaned["tumour"].voxels_removed == 2
    for name, mask in masks.items():
        assert np.array_equal(cleaned.mask(name), mask)


def test_a_hole_that_two_structures_enclose_is_filled_in_both(
    tmp_path: Path, library: Path
) -> None:
    write_series(tmp_path / "s", ARRAY)
    result, _ = overlapping(library, tmp_path / "s")
    block, ring = np.zeros((2, *SHAPE), bool)
    block[:, 4:20, 4:20] = True
    ring[:] = block
    ring[1:3, 10:12, 10:12] = False
    label_map = ring * np.uint8(result.labels["liver"])
    label_map[0, 30, 22] = result.labels["tumour"]  # to be taken away
    shared = {"tumour": np.flatnonzero(ring)}
    cleaned = clean_up(
        replace(result, label_map=label_map, shared=shared), largest=True, fill_holes=True
    )
    for name in ("liver", "tumour"):
        assert cleaned.cleaned[name].voxels_filled == 8
        assert np.array_equal(cleaned.mask(name), block)
        assert [one.pixels[name] for one in cleaned.slices] == [256] * 4
    record = cleaned.to_json(read_volume(tmp_path / "s"))
    assert record["voxels"] == {"liver": 1024, "tumour": 1024}


def count_segmentations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(outputs, "segment_volume", lambda *_, **__: calls.append(1))
    return calls


def test_a_result_that_fails_leaves_no_half(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(write_series(tmp_path / "s", ARRAY)[0].parent)
    base, shown = tmp_path / "o" / "x", VolumeSettings(preview=True)
    monkeypatch.setattr(outputs, "json_text", lambda record: 1 / 0)  # the record, which is last
    with Library.open(library) as opened:
        segmenter = Segmenter(opened, k=1, engine="fake")
        with pytest.raises(ZeroDivisionError):
            segment_to_files(segmenter, volume, base, shown, kind="nrrd", source="s")
    assert os.listdir(base.parent) == []  # so that it can be asked for again


def test_a_preview_shows_what_overlaps_and_how_large_it_is(tmp_path: Path, library: Path) -> None:
    """As the masks and the record have it, also where slices lie askew."""
    affine = np.array([[0, 0, 0.9, 0], [2.0, 0.8, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    volume = Volume(ARRAY, affine, "LPS")
    with Library.open(library) as opened:
        found = segment_volume(Segmenter(opened, k=1, engine="fake"), volume)
        assert found.slicing.axis == 0
        label_map = np.zeros(SHAPE, np.uint8)
        label_map[:, 2:28, 2:22] = found.labels["liver"]
        inside = np.zeros(SHAPE, bool)
        inside[1:3, 8:18, 6:16] = True
        shared = {"tumour": np.flatnonzero(inside)}
        result = replace(found, label_map=label_map, shared=shared)
        page = render_volume_page(volume, result, opened.intensity, lambda key: None, "x")
        sheets = [
            cv2.imdecode(np.frombuffer(contact_sheet(volume, one, opened.intensity), np.uint8), 1)
            for one in (result, replace(result, shared={}))
        ]
    record = result.to_json(volume)
    for name in ("liver", "tumour"):
        told = f"{record['voxels'][name]} voxels, {record['millilitres'][name]:.1f} ml"
        assert f"<th>{name}</th><td>{told}" in page
    assert record["voxels"]["tumour"] == 200
    for index in range(4):
        masks = [*_masks(result, index)]
        for name, mask in zip(result.labels, masks, strict=True):
            expected = result.slicing.view(result.mask(name), index)
            assert np.array_equal(mask, expected)
    second = colour([*result.labels].index("tumour"))
    assert page.count(f"--c:{second}") >= 2, "drawn in both slices that show it"
    assert page.count("<article>") == 4
    changed = (sheets[0] != sheets[1])[:224].any((0, 2)).reshape(4, 224).any(1)
    assert changed.tolist() == [False, True, True, False]


def test_no_preview_of_an_earlier_result_stays(tmp_path: Path, library: Path) -> None:
    volume = read_volume(write_series(tmp_path / "s", ARRAY)[0].parent)
    base = tmp_path / "o" / "x"
    with Library.open(library) as opened:
        segmenter = Segmenter(opened, k=1, engine="fake")
        for preview in (True, False):
            shown = VolumeSettings(preview=preview)
            segment_to_files(segmenter, volume, base, shown, kind="nrrd", source="s")
            assert (base.parent / "x.preview.html").exists() is preview
    assert sorted(os.listdir(base.parent)) == ["x.json", "x.seg.nrrd"]


def test_an_output_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_segmentations(monkeypatch)
    paths = write_series(tmp_path / "s", ARRAY)
    for path in paths:
        dataset = pydicom.dcmread(path)
        del dataset.StudyInstanceUID
        dataset.save_as(path)
    good = write_series(tmp_path / "g", ARRAY)[0].parent
    (tmp_path / "file").write_text("in the way")
    with Library.open(library) as opened:
        segmenter = Segmenter(opened, k=1, engine="fake")

        def attempt(path: Path, base: Path) -> None:
            volume = read_volume(path)
            segment_to_files(segmenter, volume, base, VolumeSettings(), kind="dicom", source="s")

        with pytest.raises(InputError, match="no StudyInstanceUID"):
            attempt(tmp_path / "s", tmp_path / "o" / "x")
        with pytest.raises(OutputError, match="cannot be written"):
            attempt(good, tmp_path / "file" / "x")
        usage = os.statvfs(tmp_path)
        full = type("Usage", (), {"free": 1000, "total": usage.f_blocks, "used": 0})
        monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: full)
        with pytest.raises(OutputError, match="MB left"):
            attempt(good, tmp_path / "o" / "x")
    assert not calls


def test_each_time_point_is_segmented(tmp_path: Path, library: Path) -> None:
    def each(index: int, group: pydicom.Dataset) -> None:
        group.PlanePositionSequence = items(ImagePositionPatient=[0.0, 0.0, index % 2 * 3.0])
        group.FrameContentSequence = items(StackID="1", TemporalPositionIndex=index // 2 + 1)

    write_multi_frame(tmp_path / "d.dcm", ARRAY, [3, 1, 0, 2], each=each)
    options = ["--output", str(tmp_path / "o"), "--k", "1", "--engine", "fake", "--json"]
    arguments = ["segment", str(library), str(tmp_path / "d.dcm"), *options]
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 1
    assert "2 volumes" in refused.stderr
    done = CliRunner().invoke(cli.app, [*arguments, "--time", "all"])
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["results"]) == 2
    for time in (1, 2):
        record = json.loads((tmp_path / "o" / f"d.time{time}.json").read_text())
        assert f"volume {time} of 2" in record["notes"][0]
        _, masks = read_annotated_volume(
            tmp_path / "d.dcm", tmp_path / "o" / record["mask"], None, time=time
        )
        assert {n: int(m.sum()) for n, m in masks.items()} == {
            n: count for n, count in record["voxels"].items() if count
        }
    assert CliRunner().invoke(cli.app, [*arguments, "--time", "x"]).exit_code == 2


def test_several_segmentations_beside_a_series_are_asked_for(tmp_path: Path, library: Path) -> None:
    write_series(tmp_path / "s", ARRAY)
    result, _ = overlapping(library, tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    for name in ("a", "b"):
        write_volume_result(tmp_path / "s" / name, volume, "dicom", result, "s")
        (tmp_path / "s" / f"{name}.json").unlink()
    arguments = ["library", "import", str(library), str(tmp_path / "s"), "--engine", "fake"]
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 1
    for part in ("a.seg.dcm", "b.seg.dcm", "--mask"):
        assert part in str(refused.exception) + refused.stderr


@pytest.mark.parametrize("colours", [(), (3,)])
def test_a_disk_that_is_too_full_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colours: tuple[int, ...]
) -> None:
    """A bit for each voxel and structure: 2 MiB for these two, beside headers."""
    volume = Volume(np.zeros((128, 256, 256, *colours), np.uint8), np.eye(4), "RAS")

    def check(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(outputs.shutil, "disk_usage", lambda folder: usage)
        outputs.check_output(tmp_path / "found", volume, "nifti", ("liver", "tumour"))

    check(4 << 20)
    with pytest.raises(OutputError, match=r"has 2 MB left; the segmentation may take 3 MB\. Make"):
        check(2 << 20)
    assert not [*tmp_path.iterdir()]


def test_what_cleans_up_is_there_before_the_work(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    volume = Volume(ARRAY, np.eye(4), "RAS")
    with Library.open(library) as opened:
        segmenter = Segmenter(opened, k=1, engine="fake")
        monkeypatch.setattr(
            segmenter, "segment", lambda *_, **__: pytest.fail("worked for nothing")
        )
        for wanted in ({"largest": True}, {"fill_holes": True}):
            with pytest.raises(ModuleNotFoundError):
                segment_volume(segmenter, volume, **wanted)
