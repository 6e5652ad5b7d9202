"""Which segmentation belongs to which volume: by reference, by name, or as the only one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from support.dicom_series import write_object, write_series
from support.pictures import write_pairs
from support.ungiven import ungiven

from recallseg.engines.errors import InputError
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.formats.annotations import Annotations, find_annotations

PLANES = np.zeros((3, 8, 6), np.uint16)
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def series(folder: Path, **fields: object) -> str:
    (first, *_) = write_series(folder, PLANES, **fields)
    return str(pydicom.dcmread(first, stop_before_pixels=True).SeriesInstanceUID)


def seg(path: Path, *drawn_on: str) -> Path:
    items = []
    for uid in drawn_on:
        items.append(Dataset())
        items[-1].SeriesInstanceUID = uid
    return write_object(path, SEG, ReferencedSeriesSequence=items)


def found(result: Annotations) -> dict[str, str]:
    return {str(v.item.relative): v.segmentation.name for v in result.volumes}


def nifti(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(PLANES.astype(np.int16), np.eye(4)), path)
    return path


def test_references_decide_wherever_the_files_lie(tmp_path: Path) -> None:
    one, other = series(tmp_path / "p1" / "a"), series(tmp_path / "p1" / "b")
    seg(tmp_path / "segs" / "x.dcm", other)
    seg(tmp_path / "segs" / "y.dcm", one)
    assert found(find_annotations(tmp_path)) == {"p1/a": "y.dcm", "p1/b": "x.dcm"}


def test_without_reference_the_only_one_in_the_folder(tmp_path: Path) -> None:
    series(tmp_path / "scan")
    seg(tmp_path / "scan" / "s.dcm")
    assert found(find_annotations(tmp_path / "scan")) == {"scan": "s.dcm"}
    shutil.move(tmp_path / "scan" / "s.dcm", tmp_path / "scan" / "Segmentation.seg.nrrd")
    assert found(find_annotations(tmp_path)) == {"scan": "Segmentation.seg.nrrd"}


def test_a_reference_to_another_series_is_not_taken(tmp_path: Path) -> None:
    series(tmp_path / "scan")
    seg(tmp_path / "scan" / "s.dcm", generate_uid())
    with pytest.raises(InputError, match="no segmentation beside"):
        find_annotations(tmp_path / "scan")


def test_a_dot_is_a_folder(tmp_path: Path) -> None:
    series(tmp_path / "scan")
    seg(tmp_path / "scan" / "s.dcm")
    here = Path.cwd()
    os.chdir(tmp_path / "scan")
    try:
        assert found(find_annotations(".")) == {"scan": "s.dcm"}
        (tmp_path / "scan" / "s.dcm").rename(tmp_path / "scan.seg.dcm")  # beside the folder
        assert found(find_annotations(".")) == {"scan": "scan.seg.dcm"}
    finally:
        os.chdir(here)


def test_several_are_asked_about_and_do_not_end_the_others(tmp_path: Path) -> None:
    uid = series(tmp_path / "a")
    seg(tmp_path / "a" / "s1.dcm", uid)
    seg(tmp_path / "a" / "s2.dcm", uid)
    nifti(tmp_path / "b.nii.gz")
    nifti(tmp_path / "b.mask.nii.gz")
    nifti(tmp_path / "c.nii.gz")
    result = find_annotations(tmp_path)
    assert found(result) == {"b": "b.mask.nii.gz"}
    assert "s1.dcm, s2.dcm: say which with --mask" in result.unclear["a"]
    assert [path.name for path in result.unlabelled] == ["c.nii.gz"]
    chosen = find_annotations(tmp_path / "a", tmp_path / "a" / "s2.dcm")
    assert found(chosen) == {"a": "s2.dcm"}


def test_a_mask_is_of_one_volume(tmp_path: Path) -> None:
    for name in ("a", "b", "m"):
        nifti(tmp_path / f"{name}.nii.gz")
    with pytest.raises(InputError, match="holds a, b"):
        find_annotations(tmp_path, tmp_path / "m.nii.gz")
    one = find_annotations(tmp_path / "a.nii.gz", tmp_path / "m.nii.gz")
    assert found(one) == {"a": "m.nii.gz"}
    with pytest.raises(InputError, match="no mask"):
        find_annotations(tmp_path / "a.nii.gz", tmp_path / "gone.nii.gz")
    with pytest.raises(InputError, match="no file or folder"):
        find_annotations(tmp_path / "gone")


def test_a_mask_that_is_not_given_may_belong_to_any_image(tmp_path: Path) -> None:
    write_pairs(tmp_path, [0.2, 0.5])
    assert len(find_annotations(tmp_path).pairs) == 2
    (mask, *_) = sorted(tmp_path.rglob("*.mask*.png"))
    with ungiven(mask), pytest.raises(InputError, match=f"{mask}: cannot be looked at"):
        find_annotations(tmp_path)
    with ungiven(tmp_path), pytest.raises(InputError, match="cannot be looked at") as caught:
        find_annotations(tmp_path)
    assert machine_fault(caught.value)


def test_a_folder_that_is_not_given_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_pairs(tmp_path / name, [0.2, 0.5])
    with ungiven(tmp_path / "two"), pytest.raises(InputError, match="cannot be looked"):
        find_annotations(tmp_path)
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("two"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return scan(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        seen = find_annotations(tmp_path)
    assert [each.path.name for each in seen.unseen] == ["two"]
    assert len(seen.pairs) == 2
    with pytest.raises(InputError, match="two: cannot be looked into: Input/output error"):
        seen.check_whole()


def test_a_name_that_leaves_no_room_for_a_masks_stops_nothing(tmp_path: Path) -> None:
    nifti(tmp_path / f"{'x' * 247}.nii.gz")
    nifti(tmp_path / "a.nii.gz")
    nifti(tmp_path / "a.mask.nii.gz")
    assert found(find_annotations(tmp_path)) == {"a": "a.mask.nii.gz"}
