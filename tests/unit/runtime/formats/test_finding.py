"""One finder: what is taken of a folder, as what, under which name; and why all else is not."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from support.dicom_series import make_slice, write_object, write_picture, write_series

from recallseg.engines.errors import InputError
from recallseg.runtime.formats import finding, walking
from recallseg.runtime.formats.finding import Finding, find_in_folder, find_inputs, is_mask

SR = "1.2.840.10008.5.1.4.1.1.88.33"
KO = "1.2.840.10008.5.1.4.1.1.88.59"
PR = "1.2.840.10008.5.1.4.1.1.11.1"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
RTDOSE = "1.2.840.10008.5.1.4.1.1.481.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
PDF = "1.2.840.10008.5.1.4.1.1.104.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
PLANES = np.zeros((3, 8, 6), np.uint16)


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def taken(found: Finding) -> dict[str, int]:
    """Number of files by the name of the outputs."""
    return {str(item.relative): len(item.files) for item in found.items}


def reasons(found: Finding) -> dict[str, str]:
    return {each.path.name: each.reason for each in found.passed}


def test_a_series_has_the_name_of_its_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", PLANES)
    assert taken(find_in_folder(tmp_path / "scan")) == {"scan": 3}
    assert taken(find_in_folder(tmp_path)) == {"scan": 3}
    here = Path.cwd()
    os.chdir(tmp_path / "scan")
    try:
        assert taken(find_inputs([Path()])) == {"scan": 3}
        assert [item.name for item in find_inputs([Path()]).items] == ["scan"]
    finally:
        os.chdir(here)


def test_mixed_and_nested(tmp_path: Path) -> None:
    write_series(tmp_path / "p1" / "CT", PLANES)
    write_series(tmp_path / "p1" / "T2", PLANES[:2])
    write_series(tmp_path / "p2", PLANES)
    touch(tmp_path / "p2" / "scan.nii.gz")
    touch(tmp_path / "p2" / "thumbnail.jpg")
    touch(tmp_path / "p3" / "x" / "head.nrrd")
    touch(tmp_path / "notes.txt")
    touch(tmp_path / "empty", b"")
    found = find_in_folder(tmp_path)
    assert taken(found) == {
        **{"p1/CT": 3, "p1/T2": 2, "p2": 3},
        **{"p2/scan": 1, "p2/thumbnail": 1, "p3/x/head": 1},
    }
    assert reasons(found) == {"notes.txt": "of no format that is read", "empty": "an empty file"}


def test_several_series_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        made = write_series(tmp_path / f"made{number}", PLANES, SeriesNumber=number)
        (tmp_path / "study").mkdir(exist_ok=True)
        for path in made:
            path.rename(tmp_path / "study" / f"{number}.{path.stem}")
    names = sorted(taken(find_in_folder(tmp_path / "study")))
    assert [name[:5] for name in names] == ["MR-1-", "MR-2-"]
    assert [len(name) for name in names] == [5 + 64] * 2  # the whole digest: no two share it


@pytest.mark.parametrize("count", [2, 5])
def test_views_of_one_series_are_pictures_of_their_own(tmp_path: Path, count: int) -> None:
    series = generate_uid()
    for i in range(count):
        write_picture(tmp_path / "mammo" / f"view{i}.dcm", series, PLANES[0], Modality="MG")
    found = find_in_folder(tmp_path)
    assert taken(found) == {f"mammo/view{i}": 1 for i in range(count)}
    inbox = find_in_folder(tmp_path, links=False, by_folder=False)
    assert len({item.name for item in inbox.items}) == count
    assert all(item.name.startswith("MG-3-") and item.path.is_file() for item in inbox.items)


def test_clips_and_stills_of_one_ultrasound_series(tmp_path: Path) -> None:
    series = generate_uid()
    for i in range(2):
        clip = make_slice(PLANES[0], SeriesInstanceUID=series, NumberOfFrames=3, Modality="US")
        clip.PixelData = PLANES.tobytes()
        touch(tmp_path / f"clip{i}").unlink()
        clip.save_as(tmp_path / f"clip{i}", enforce_file_format=True)
    write_picture(tmp_path / "still", series, PLANES[0], Modality="US")
    assert taken(find_in_folder(tmp_path)) == {"clip0": 1, "clip1": 1, "still": 1}


def test_slices_that_lost_their_position_stay_one_series(tmp_path: Path) -> None:
    """CT slices are a stack whatever is missing: their reader says what, once."""
    for i in range(3):
        dataset = make_slice(PLANES[0], SOPClassUID=CT, SeriesInstanceUID="1.2.3")
        dataset.save_as(tmp_path / f"{i}.dcm", enforce_file_format=True)
    assert list(taken(find_in_folder(tmp_path)).values()) == [3]


@pytest.mark.parametrize(
    ("sop_class", "reason"),
    [
        (SR, "Comprehensive SR, not an image"),
        (KO, "Key Object Selection Document, not an image"),
        (PR, "Grayscale Softcopy Presentation State, not an image"),
        (PDF, "Encapsulated PDF, not an image"),
        (RTSTRUCT, "RT Structure Set, not an image"),
    ],
)
def test_other_objects_are_passed_over_by_name(tmp_path: Path, sop_class: str, reason: str) -> None:
    write_series(tmp_path / "scan", PLANES)
    write_object(tmp_path / "scan" / "OTHER", sop_class)
    found = find_in_folder(tmp_path / "scan")
    assert taken(found) == {"scan": 3}
    assert reasons(found) == {"OTHER": reason}


@pytest.mark.parametrize("sop_class", [RTDOSE, SEG, LABEL_MAP, "1.2.840.10008.5.1.4.1.1.4.2"])
def test_pixels_that_are_no_write_picture(tmp_path: Path, sop_class: str) -> None:
    write_series(tmp_path / "scan", PLANES)
    write_object(tmp_path / "scan" / "o.dcm", sop_class, Rows=8, Columns=6, NumberOfFrames=3)
    found = find_in_folder(tmp_path / "scan")
    assert taken(found) == {"scan": 3}
    assert "o.dcm" in reasons(found)
    assert [path.name for path in found.masks] == (["o.dcm"] if ".66." in sop_class else [])


def test_a_segmentation_says_what_it_was_drawn_on(tmp_path: Path) -> None:
    referenced = Dataset()
    referenced.SeriesInstanceUID = "1.2.3.4"
    path = write_object(tmp_path / "a.dcm", SEG, ReferencedSeriesSequence=[referenced])
    assert find_in_folder(tmp_path).drawn_on == {path: ("1.2.3.4",)}


def test_a_series_in_parts_is_one_and_a_copy_of_it_another(tmp_path: Path) -> None:
    made = write_series(tmp_path / "disc" / "a", PLANES)
    (tmp_path / "disc" / "b").mkdir()
    made[0].rename(tmp_path / "disc" / "b" / made[0].name)
    found = find_in_folder(tmp_path)
    assert taken(found) == {"disc": 3}
    shutil.copytree(tmp_path / "disc" / "a", tmp_path / "copy")
    assert sorted(taken(find_in_folder(tmp_path)).values()) == [1, 2, 2]


def test_copies_of_a_slice_are_left_out_and_other_pixels_under_its_name_are_not(
    tmp_path: Path,
) -> None:
    made = write_series(tmp_path, PLANES, shuffle=False)
    shutil.copy(made[0], tmp_path / "z (1).dcm")
    found = find_in_folder(tmp_path)
    assert list(taken(found).values()) == [3]
    assert reasons(found) == {"z (1).dcm": f"a copy of {made[0].name}"}
    data = bytearray(made[0].read_bytes())
    data[-1] ^= 1
    (tmp_path / "z (1).dcm").write_bytes(data)
    assert list(taken(find_in_folder(tmp_path)).values()) == [4]  # its reader refuses it


def test_links_are_followed_where_a_person_names_the_folder(tmp_path: Path) -> None:
    touch(tmp_path / "store" / "a.png")
    touch(tmp_path / "store" / "below" / "b.png")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "to folder").symlink_to(tmp_path / "store")
    (tmp_path / "named" / "c.png").symlink_to(tmp_path / "store" / "a.png")
    (tmp_path / "named" / "nothing.png").symlink_to(tmp_path / "gone")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "named")  # a loop
    found = find_in_folder(tmp_path / "named")
    assert taken(found) == {"c": 1, "to folder/a": 1, "to folder/below/b": 1}
    assert reasons(found) == {
        "nothing.png": "a symbolic link to nothing",
        "back": "a folder that was looked into by another way",
    }
    inbox = find_in_folder(tmp_path / "named", links=False)
    assert not inbox.items
    assert set(reasons(inbox).values()) == {"a symbolic link, which is not followed here"}


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "zero.dcm").symlink_to("/dev/zero")
    found = find_in_folder(tmp_path)
    assert not found.items
    assert set(reasons(found).values()) == {"no regular file (pipe, socket or device)"}


def test_masks_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.mask.png", "a.mask.liver.png", "v.seg.nrrd", "v.mask.nii.gz", ".x.png"):
        touch(tmp_path / name)
    touch(tmp_path / ".git" / "y.png")
    found = find_in_folder(tmp_path)
    assert not found.items
    assert len(found.masks) == 4
    assert reasons(found)[".git"] == reasons(found)[".x.png"] == "hidden"
    assert not is_mask(Path("masked.png"))
    assert not is_mask(Path("a.masks.png"))


def test_files_named_one_by_one(tmp_path: Path) -> None:
    made = write_series(tmp_path / "scan", PLANES)
    report = write_object(tmp_path / "scan" / "sr.dcm", SR)
    found = find_inputs([*made, report])
    assert taken(found) == {"scan": 3}  # as scan/*.dcm gives them
    assert reasons(found) == {"sr.dcm": "Comprehensive SR, not an image"}
    assert taken(find_inputs(made[:1])) == {made[0].stem: 1}
    unknown = touch(tmp_path / "notes.txt")
    assert [item.kind for item in find_inputs([unknown, tmp_path / "none.png"]).items] == [
        "image",
        "image",
    ]  # their reader says what is wrong
    assert find_inputs([unknown], "nifti").items[0].kind == "nifti"
    with pytest.raises(InputError, match="no format 'jpeg'"):
        find_inputs([unknown], "jpeg")


def test_of_a_folder_one_format(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", PLANES)
    touch(tmp_path / "scan" / "a.png")
    found = find_inputs([tmp_path / "scan"], "dicom")
    assert taken(found) == {"scan": 3}
    assert reasons(found) == {"a.png": "image, not dicom"}


@pytest.mark.parametrize("name", [b"r\xf6ntgen.png", b"\xff\xfe.png", "日本.png".encode()])
def test_names_of_any_bytes(tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    (item,) = find_in_folder(tmp_path).items
    assert os.fsencode(item.name) == name


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_series(tmp_path, PLANES)
    headers: finding.Headers = {}
    find_in_folder(tmp_path, headers=headers)
    read: list[Path] = []
    whole = finding.read_header
    monkeypatch.setattr(finding, "read_header", lambda path: read.append(path) or whole(path))
    find_in_folder(tmp_path, headers=headers)
    assert read == []
    made[0].write_bytes(made[0].read_bytes() + b"\0\0")
    made[1].unlink()
    find_in_folder(tmp_path, headers=headers)
    assert read == [made[0]]
    assert set(headers) == {made[0], made[2]}


def test_damaged_headers_become_items_that_fail_when_read(tmp_path: Path) -> None:
    whole = write_series(tmp_path, PLANES)[0].read_bytes()
    touch(tmp_path / "torn.dcm", b"half a head")
    touch(tmp_path / "cut", whole[:150])
    found = find_in_folder(tmp_path)
    assert taken(found)["torn"] == 1
    assert ("cut" in taken(found)) != ("cut" in reasons(found))


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "MOST_FILES", 2)
    for i in range(3):
        touch(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match="more than 2 files"):
        find_in_folder(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        find_in_folder(tmp_path / "none")


def test_an_image_that_lost_its_pixels_is_told_as_one(tmp_path: Path) -> None:
    write_object(tmp_path / "a.dcm", CT)
    assert reasons(find_in_folder(tmp_path)) == {
        "a.dcm": "CT Image without pixels, not an image",
    }


def test_a_copy_that_the_disk_does_not_give_is_no_second_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the series would be said to hold one image twice, and people would remove it."""
    made = write_series(tmp_path, PLANES)
    shutil.copy(made[0], tmp_path / "z.dcm")

    def broken(*_: object, **__: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(finding.filecmp, "cmp", broken)
    found = find_in_folder(tmp_path)
    assert found.incomplete
    troubles = {item.path.name: (item.trouble, item.fault) for item in found.items}
    assert "z.dcm cannot be compared with" in troubles["z.dcm"][0]
    assert "may lack a slice" in troubles[tmp_path.name][0]
    assert {fault for _, fault in troubles.values()} == {errno.EIO}
