"""What callers hand in is taken or refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_image, check_mask, check_name, check_tags

IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "<i4", ">i2", ">f4", "f2", "f8"])
def test_any_real_dtype_is_taken(dtype: str) -> None:
    image = np.asfortranarray(IMAGE.astype(dtype))
    checked = check_image(image)
    assert checked.dtype == np.dtype(dtype).newbyteorder("=")
    assert checked.flags.c_contiguous
    assert np.array_equal(checked, IMAGE)


def test_colour_is_taken() -> None:
    assert check_image(np.zeros((3, 4, 3), np.uint8)).shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2]], "must be one, got a list of 1.*segment_many"),
        (IMAGE.astype(bool), "got bool"),
        (IMAGE.astype(complex), "got complex128"),
        (np.array([["a"]]), "got <U1"),
        (np.zeros(3), r"got 3\."),
        (np.array(3.0), "no axes"),
        (np.zeros((3, 4, 1)), r"image\[\.\.\., 0\]"),
        (np.zeros((3, 4, 4)), r"image\[\.\.\., :3\]"),
        (np.zeros((3, 40, 50)), r"moveaxis"),
        (np.zeros((9, 40, 50)), "one slice at a time"),
        (np.zeros((0, 4)), "empty: its shape is 0x4"),
        (np.array([[1.0, np.nan, np.inf]]), "2 NaN or infinite pixels of 3"),
    ],
)
def test_other_images_are_refused(image: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_image(image)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
@pytest.mark.parametrize("high", [1, 255])
def test_masks_of_two_values_are_taken(dtype: type, high: int) -> None:
    if dtype is not bool or high == 1:
        mask = check_mask((np.array([[0, 1], [1, 1]]) * high).astype(dtype), (2, 2, 3))
        assert mask.dtype == bool
        assert mask.tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True]], "the mask of .* must be one, got a list of 1"),
        (np.ones((4, 3), bool), r"has shape 4x3, the image is 3x4 \(height x width\)"),
        (np.ones((3, 4, 1), bool), "has shape 3x4x1"),
        (np.ones((3, 4)), "mask > 0.5"),
        (IMAGE, r"values 0, 1, 2, 3, 4, 5, \.\.\.; expected 0 and 1.*label_map == value"),
        (np.full((3, 4), 2, np.uint8), "values 2"),
        (-np.eye(3, 4, dtype=np.int8), "values -1, 0"),
        (np.zeros((3, 4), bool), r"'nucleus' is empty.*absent=\('nucleus',\)"),
    ],
)
def test_other_masks_are_refused(mask: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_mask(mask, (3, 4), "nucleus")


def test_an_empty_mask_where_it_may_be() -> None:
    assert not check_mask(np.zeros((3, 4), bool), (3, 4), allow_empty=True).any()


@pytest.mark.parametrize("name", ["left ventricle", "Zyste (groß)", "肝臓", "a" * 64, "T1", "a.b"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a" * 65, "a/b", "a\\b", "..", ".a", " a", "a ", "a\nb", "a\0b", "\u202ea", 3, None],
)
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(InputError, match="name"):
        check_name(name)


def test_tags() -> None:
    assert list(check_tags({"b": "2", "a": "1"})) == ["a", "b"]
    assert check_tags(None) == {}
    for wrong in ({"a": 1}, {"a": ""}, {"": "x"}, {"a": "x\n"}, ["a"]):
        with pytest.raises(InputError):
            check_tags(wrong)  # type: ignore[arg-type]
