"""Masks as people draw them: colours, a file for each structure, polygons, folders of masks."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from recallseg.engines.errors import InputError
from recallseg.runtime.formats import polygons
from recallseg.runtime.formats.pairs import (
    Annotated,
    find_pairs,
    needs_labels,
    parse_legend,
    read_pair,
)
from recallseg.runtime.formats.polygons import fill, read_coco

H, W = 24, 32
LIVER = np.zeros((H, W), bool)
LIVER[4:12, 6:20] = True
SPLEEN = np.zeros((H, W), bool)
SPLEEN[10:20, 16:30] = True  # overlaps the liver


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((H, W), 90, np.uint8) + np.arange(W, dtype=np.uint8))
    return path


def write(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def only(folder: Path, masks: Path | None = None, **options: Any) -> Annotated:
    (pair,) = find_pairs(folder, masks).pairs
    return read_pair(pair, options.pop("labels", None), **options)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_0_and_255_is_the_one_structure(tmp_path: Path, suffix: str) -> None:
    image(tmp_path / "a.png")
    write(tmp_path / f"a.mask{suffix}", LIVER.astype(np.uint8) * 255)
    found = only(tmp_path, labels={1: "liver"})
    np.testing.assert_array_equal(found.masks["liver"], LIVER)
    np.testing.assert_array_equal(only(tmp_path, labels={255: "liver"}).masks["liver"], LIVER)
    with pytest.raises(InputError, match="label 255"):
        only(tmp_path, labels={1: "liver", 2: "spleen"})
    write(tmp_path / f"a.mask{suffix}", np.where(LIVER, 255, SPLEEN * 128).astype(np.uint8))
    with pytest.raises(InputError, match="label 128, 255"):
        only(tmp_path, labels={1: "liver"})


def test_one_file_for_each_structure_may_overlap(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    write(tmp_path / "a.mask.liver.png", LIVER.astype(np.uint8) * 255)
    write(tmp_path / "a.mask.left spleen.png", SPLEEN)
    write(tmp_path / "a.mask.cyst.png", np.zeros((H, W), np.uint8))
    found = only(tmp_path)
    np.testing.assert_array_equal(found.masks["liver"], LIVER)
    np.testing.assert_array_equal(found.masks["left spleen"], SPLEEN)
    assert found.absent == ("cyst",)
    assert only(tmp_path, missing="unknown").absent == ()
    assert not needs_labels(find_pairs(tmp_path).pairs)
    write(tmp_path / "a.mask.liver.png", LIVER + 2 * SPLEEN.astype(np.uint8))
    with pytest.raises(InputError, match="one value beside 0"):
        only(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_by_a_legend(tmp_path: Path, mode: str) -> None:
    image(tmp_path / "a.png")
    drawn = np.zeros((H, W, 3), np.uint8)
    drawn[LIVER] = (255, 0, 0)
    drawn[SPLEEN] = (0, 128, 255)
    picture = Image.fromarray(drawn)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray((LIVER | SPLEEN).astype(np.uint8) * 255))
    elif mode == "P":
        picture = picture.quantize(8, dither=Image.Dither.NONE)
    picture.save(tmp_path / "a.mask.png")
    legend = parse_legend("#FF0000=liver, #0080ff=spleen,#00ff00=cyst")
    found = only(tmp_path, legend=legend)
    np.testing.assert_array_equal(found.masks["liver"], LIVER & ~SPLEEN)
    np.testing.assert_array_equal(found.masks["spleen"], SPLEEN)
    assert found.absent == ("cyst",)
    with pytest.raises(InputError, match=r"#0080ff.*140 pixels"):
        only(tmp_path, legend=parse_legend("#ff0000=liver"))
    only(tmp_path, legend=parse_legend("#ff0000=liver,#0080ff=background"))
    if mode == "RGB":
        with pytest.raises(InputError, match="--legend"):
            only(tmp_path, labels={1: "liver"})


def test_a_legend_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "legend.txt").write_text("#ff0000=liver\n\n#ffffff=background\n")
    assert parse_legend(str(tmp_path / "legend.txt")) == {
        (255, 0, 0): "liver",
        (255, 255, 255): "background",
    }
    for text in ("liver", "red=liver", "#ff00=liver", "#ff0000=", "#ff0000=a,#ff0000=b"):
        with pytest.raises(InputError, match="legend"):
            parse_legend(text)


def test_a_legend_may_be_longer_than_a_files_name() -> None:
    names = [f"structure number {number}" for number in range(40)]
    text = ",".join(f"#{number:06x}={name}" for number, name in enumerate(names))
    assert [*parse_legend(text).values()] == names
    with pytest.raises(InputError, match="a legend must read like"):
        parse_legend("x" * 500)


def test_lossy_masks_are_refused_with_the_reason(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    noisy = np.where(LIVER, 1, 0).astype(np.uint8) * 7
    noisy[5, 7] = 9
    write(tmp_path / "a.mask.jpg", np.repeat((noisy * 20)[..., None], 3, 2))
    with pytest.raises(InputError, match="JPEG does not keep"):
        only(tmp_path, labels={1: "liver"})


def labelme(shapes: list[dict[str, Any]], **fields: Any) -> str:
    return json.dumps(
        {"version": "5.4.1", "shapes": shapes, "imageHeight": H, "imageWidth": W, **fields}
    )


def corners(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def test_labelme(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    stream = io.BytesIO()
    Image.fromarray(np.ones((3, 4), np.uint8)).save(stream, "PNG")
    packed = base64.b64encode(stream.getvalue()).decode()
    shapes = [
        {"label": "liver", "points": corners(6, 4, 20, 12), "shape_type": "polygon"},
        {"label": "liver", "points": [[0, 0], [2, 1]], "shape_type": "rectangle"},
        {"label": "cyst", "points": [[16, 12], [16, 15]], "shape_type": "circle"},
        {"label": "spot", "points": [[5, 6], [8, 8]], "shape_type": "mask", "mask": packed},
    ]
    (tmp_path / "a.json").write_text(labelme(shapes))
    found = only(tmp_path, labels={1: "liver", 2: "kidney"})
    wanted = LIVER.copy()
    wanted[0, :2] = True
    np.testing.assert_array_equal(found.masks["liver"], wanted)
    assert abs(int(found.masks["cyst"].sum()) - np.pi * 9) < 4
    assert np.argwhere(found.masks["spot"]).min(0).tolist() == [6, 5]
    assert int(found.masks["spot"].sum()) == 12
    assert found.absent == ("kidney",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (labelme([{"label": "a", "points": [[1, 2]], "shape_type": "point"}]), "is a point"),
        (labelme([{"label": "a", "points": [[1, 2], [3, 4]]}]), "polygon of 2 points"),
        (labelme([{"label": "a", "points": [[1, 2], [3, "x"], [1, 1]]}]), "damaged"),
        (labelme([{"label": "a", "points": [[1, 2], [3, float("nan")], [1, 1]]}]), "no number"),
        (labelme([{"points": corners(1, 1, 2, 2)}]), "no label"),
        (labelme([], imageHeight=W, imageWidth=H), "turned alike"),
    ],
)
def test_labelme_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        only(tmp_path)


def coco(path: Path, names: list[str], annotations: list[dict[str, Any]]) -> Path:
    value = {
        "images": [
            {"id": i, "file_name": name, "height": H, "width": W} for i, name in enumerate(names)
        ],
        "categories": [{"id": 3, "name": "spleen"}, {"id": 1, "name": "liver"}],
        "annotations": annotations,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


SQUARE = {"image_id": 0, "category_id": 1, "segmentation": [[6, 4, 20, 4, 20, 12, 6, 12]]}


@pytest.mark.parametrize("where", ["a.png", "sub/a.png", "elsewhere/a.png"])
def test_coco_finds_its_images(tmp_path: Path, where: str) -> None:
    image(tmp_path / "images" / "sub" / "a.png")
    image(tmp_path / "images" / "b.png")
    image(tmp_path / "images" / "c.png")
    path = coco(tmp_path / "annotations" / "all.json", [where, "b.png"], [SQUARE])
    found = find_pairs(tmp_path / "images", path)
    assert [pair.name for pair in found.pairs] == ["b", "sub/a"]
    assert [file.name for file in found.unlabelled] == ["c.png"]
    one, other = (read_pair(pair, None) for pair in found.pairs)
    assert one.masks == {}
    assert one.absent == ("liver", "spleen")
    np.testing.assert_array_equal(other.masks["liver"], LIVER)
    assert other.absent == ("spleen",)


def test_coco_in_the_folder_itself(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    parts = {
        "image_id": 0,
        "category_id": 1,
        "segmentation": [[0, 0, 2, 0, 2, 2], [4, 4, 9, 4, 9, 9, 4, 9]],
    }
    coco(tmp_path / "instances.json", ["a.png"], [SQUARE, parts])
    found = only(tmp_path)
    assert found.masks["liver"][4:9, 4:9].all()
    assert not find_pairs(tmp_path).passed


@pytest.mark.parametrize(
    ("kind", "entry", "said"),
    [
        ("categories", {"id": 1, "name": "cyst"}, "the id 1 to liver and to cyst"),
        ("images", {"id": 0, "file_name": "b.png", "height": H, "width": W}, "the id 0 to .*a.png"),
    ],
)
def test_an_id_that_means_two_things_is_nobodys(
    tmp_path: Path, kind: str, entry: dict[str, Any], said: str
) -> None:
    path = coco(tmp_path / "a.json", ["a.png"], [SQUARE])
    content = json.loads(path.read_text())
    content[kind].append(content[kind][0])  # said twice, and the same
    path.write_text(json.dumps(content))
    np.testing.assert_array_equal(read_coco(path).masks("a.png")["liver"], LIVER)
    content[kind].append(entry)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        read_coco(path)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_as_pycocotools_packs_them(tmp_path: Path, seed: int) -> None:
    mask_of = pytest.importorskip("pycocotools.mask", reason="needs pycocotools")
    drawn = np.random.default_rng(seed).random((H, W)) < (0.02, 0.5, 0.98, 0.0, 1.0)[seed]
    packed = mask_of.encode(np.asfortranarray(drawn.astype(np.uint8)))
    shape = {"size": [H, W], "counts": packed["counts"].decode()}
    path = coco(tmp_path / "a.json", ["a.png"], [{**SQUARE, "segmentation": shape}])
    np.testing.assert_array_equal(read_coco(path).masks("a.png")["liver"], drawn)


PACKED = {  # made with pycocotools 2.0.11 of the mask `LIVER`
    "size": [24, 32],
    "counts": "d48`00000000000000000000000000l8",
}


def test_run_lengths(tmp_path: Path) -> None:
    plain = {"size": [H, W], "counts": [6 * H + 4, *[8, H - 8] * 13, 8, 12 * H + H - 12]}
    for shape in (plain, PACKED):
        path = coco(tmp_path / "a.json", ["a.png"], [{**SQUARE, "segmentation": shape}])
        np.testing.assert_array_equal(read_coco(path).masks("a.png")["liver"], LIVER)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([[1, 2, 3, 4]], "three points"),
        ([], "only a box"),
        (None, "only a box"),
        ({"size": [W, H], "counts": [W * H]}, "run lengths are of"),
        ({"size": [H, W], "counts": [5]}, "cover 5 pixels"),
        ({"size": [H, W], "counts": [-1, H * W + 1]}, "damaged"),
        ({"size": [H, W], "counts": "~~~"}, "cover 42"),
        ({"size": [H, W], "counts": "oooo"}, "damaged"),
    ],
)
def test_shapes_that_cannot_be_used(tmp_path: Path, shape: Any, message: str) -> None:
    path = coco(tmp_path / "a.json", ["a.png"], [{**SQUARE, "segmentation": shape}])
    with pytest.raises(InputError, match=message):
        read_coco(path).masks("a.png")


def test_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    image(tmp_path / "images" / "p1" / "b.png")
    write(tmp_path / "masks" / "a.png", LIVER.astype(np.uint8))
    write(tmp_path / "masks" / "p1" / "b.mask.png", SPLEEN.astype(np.uint8))
    write(tmp_path / "masks" / "gone.png", SPLEEN.astype(np.uint8))
    found = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert [(p.image.name, p.mask.name) for p in found.pairs] == [
        ("a.jpg", "a.png"),
        ("b.png", "b.mask.png"),
    ]
    assert [p.path.name for p in found.passed] == ["gone.png"]


def test_a_folder_for_each_structure(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg")
    write(tmp_path / "masks" / "liver" / "a.png", LIVER.astype(np.uint8) * 255)
    write(tmp_path / "masks" / "spleen" / "a.png", SPLEEN.astype(np.uint8))
    found = only(tmp_path / "images", tmp_path / "masks")
    np.testing.assert_array_equal(found.masks["liver"], LIVER)
    np.testing.assert_array_equal(found.masks["spleen"], SPLEEN)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    write(tmp_path / "a.mask.png", LIVER.astype(np.uint8))
    image(tmp_path / "twice.png")
    image(tmp_path / "twice.bmp")
    write(tmp_path / "twice.mask.png", LIVER.astype(np.uint8))
    image(tmp_path / "both.png")
    write(tmp_path / "both.mask.png", LIVER.astype(np.uint8))
    (tmp_path / "both.json").write_text(labelme([]))
    write(tmp_path / "orphan.mask.png", LIVER.astype(np.uint8))
    (tmp_path / "record.json").write_text("{}")
    found = find_pairs(tmp_path)
    assert [pair.name for pair in found.pairs] == ["a"]
    reasons = {each.path.name: each.reason for each in found.passed}
    assert "same name" in reasons["twice.png"]
    assert "several masks" in reasons["both.png"]
    assert "no image beside it" in reasons["orphan.mask.png"]
    assert "no format" in reasons["record.json"]


@given(
    st.lists(st.tuples(st.floats(-5, 35), st.floats(-5, 30)), min_size=3, max_size=8),
)
def test_polygons_are_filled_by_their_centres(points: list[tuple[float, float]]) -> None:
    """Against Pillow, which draws the same polygon 16 times larger and knows no centres."""
    scale = 16
    large = Image.new("1", (W * scale, H * scale))
    ImageDraw.Draw(large).polygon([(x * scale, y * scale) for x, y in points], fill=1)
    drawn = np.asarray(large)
    share = drawn.reshape(H, scale, W, scale).mean((1, 3))
    found = fill(np.array(points), H, W)
    certain = (share == 0) | (share == 1)
    wrong = certain & (found != (share == 1))
    assert int(wrong.sum()) <= 2  # self-crossings meet Pillow's own rounding


@pytest.mark.parametrize("size", [(10**18, 10**18), (0, 5), (-3, 5), (5, 10**9)])
def test_an_image_of_no_size_is_not_drawn_on(tmp_path: Path, size: tuple[int, int]) -> None:
    shape = {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    text = {
        "images": [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "categories": [{"id": 1, "name": "liver"}],
        "annotations": [shape],
    }
    (tmp_path / "all.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match=rf"a\.png is of {size[0]}x{size[1]} pixels"):
        read_coco(tmp_path / "all.json").masks("a.png")


def test_a_mask_larger_than_its_image_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = cv2.imencode(".png", np.zeros((3000, 3000), np.uint8))[1].tobytes()
    mask = {"label": "liver", "shape_type": "mask", "points": [[0, 0], [5, 5]]}
    mask["mask"] = base64.b64encode(packed).decode()
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [mask]}))
    monkeypatch.setattr(polygons.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="its mask of 3000x3000 pixels leaves the image"):
        polygons.read_labelme(tmp_path / "a.json", H, W)
