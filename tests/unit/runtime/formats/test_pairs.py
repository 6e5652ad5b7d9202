"""Pairs of image and label map: what counts as one, and what is said about everything else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallseg.engines.errors import InputError
from recallseg.runtime.formats import pairs
from recallseg.runtime.formats.pairs import find_pairs, parse_labels, parse_legend, read_pair

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)


def write(folder: Path, *names: str, image: np.ndarray = GREY) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), image)


def test_parse_labels() -> None:
    assert parse_labels("1=left ventricle, 7=b") == {1: "left ventricle", 7: "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must read like"),
        ("1", "must read like"),
        ("a=b", "must read like"),
        ("-1=b", "must read like"),
        ("1=", "must read like"),
        ("1=a,", "must read like"),
        ("\u0661=a", "must read like"),
        ("0=a", "background"),
        ("65536=a", "too large"),
        ("1=a,1=b", "label 1 is given twice"),
        ("1=a,2=a", "'a' is given twice"),
        ("1=a/b", "cannot name"),
    ],
)
def test_bad_labels(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_labels(text)


@given(st.text(max_size=12))
def test_labels_parse_or_are_refused(text: str) -> None:
    try:
        labels = parse_labels(text)
    except InputError:
        return
    assert labels
    assert all(0 < value <= 65535 and name for value, name in labels.items())


def test_finds_pairs_below_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "b.mask.png", "one/a.x.jpg", "one/a.x.mask.png", "alone.png")
    write(tmp_path, ".hidden/c.png", ".hidden/c.mask.png")
    (tmp_path / "notes.txt").write_text("nothing")
    found = find_pairs(tmp_path)
    assert [pair.name for pair in found.pairs] == ["b", "one/a.x"]
    assert found.pairs[1].image.name == "a.x.jpg"
    assert [path.name for path in found.unlabelled] == ["alone.png"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        find_pairs(tmp_path / "none")
    with pytest.raises(InputError, match="0 images and 0 label maps"):
        find_pairs(tmp_path)
    write(tmp_path, "a.mask.png")
    with pytest.raises(InputError, match="has no image beside it"):
        find_pairs(tmp_path)
    write(tmp_path, "a.png", "a.jpg")
    with pytest.raises(InputError, match="the same name 'a'"):
        find_pairs(tmp_path)


def test_splits_a_label_map(tmp_path: Path) -> None:
    label_map = np.zeros((6, 8), np.uint16)
    label_map[1:3], label_map[4] = 1, 300
    write(tmp_path, "a.png")
    write(tmp_path, "a.mask.png", image=label_map)
    pair = find_pairs(tmp_path).pairs[0]
    labels = {1: "one", 2: "two", 300: "three"}
    annotated = read_pair(pair, labels)
    assert list(annotated.masks) == ["one", "three"]
    np.testing.assert_array_equal(annotated.masks["three"], label_map == 300)
    assert annotated.absent == ("two",)
    assert read_pair(pair, labels, "unknown").absent == ()
    with pytest.raises(InputError, match=r"a\.mask\.png has label 300.*known are 1=one"):
        read_pair(pair, {1: "one"})


def test_sizes_must_agree(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    write(tmp_path, "a.mask.png", image=np.zeros((8, 6), np.uint8))
    with pytest.raises(InputError, match=r"8x6.*6x8"):
        read_pair(find_pairs(tmp_path).pairs[0], {1: "one"})


def test_a_legend_that_the_machine_does_not_give_is_not_said_to_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "legend.txt").write_text("#ff0000=liver")
    assert parse_legend(str(tmp_path / "legend.txt")) == {(255, 0, 0): "liver"}
    with pytest.raises(InputError, match="must read like"):
        parse_legend(str(tmp_path / "none.txt"))

    def broken(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pairs, "read_text", broken)
    with pytest.raises(InputError, match=r"legend\.txt cannot be read: Permission denied"):
        parse_legend(str(tmp_path / "legend.txt"))
