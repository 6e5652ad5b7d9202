"""Images as people have them are taken as what they show, or refused with a reason."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support.fake_library import create, draw

from recallseg import Bundle, Library, Segmenter, read_image
from recallseg.engines.errors import InputError
from recallseg.runtime.arrays import as_array
from recallseg.runtime.checks import MOST_MASKS
from recallseg.runtime.formats.images import open_image

RAMP = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)


def palette(colours: list[int], **info: Any) -> Image.Image:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10) % 4, "L")
    image.putpalette(colours)
    image.info.update(info)
    return image


KINDS: dict[str, Any] = {
    "torch": torch.from_numpy(RAMP.copy()),
    "torch strided": torch.from_numpy(RAMP.T.copy()).T,
    "pil L": Image.fromarray(RAMP),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_pixels_whatever_holds_them(kind: str) -> None:
    array = open_image(KINDS[kind])
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, RAMP)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float16", "float32", "float64"])
def test_a_tensors_dtype_stays(dtype: str) -> None:
    tensor = torch.arange(12, dtype=getattr(torch, dtype)).reshape(3, 4)
    assert as_array(tensor, "an image").dtype == np.dtype(dtype)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "F", "RGB", "RGBA", "P", "I;16"])
def test_a_pil_image_is_what_its_file_is(mode: str, tmp_path: Path) -> None:
    """The reader of files, which shares no code with PIL, is the judge."""
    if mode == "I;16":
        image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32))
    elif mode == "P":
        image = Image.fromarray(COLOURS).quantize(16)
    else:
        image = Image.fromarray(COLOURS).convert(mode)
    assert image.mode == mode
    file = tmp_path / ("image.tiff" if mode in ("I", "F") else "image.png")
    image.save(file)
    np.testing.assert_array_equal(open_image(image), read_image(file))
    with Image.open(file) as opened:
        np.testing.assert_array_equal(open_image(opened), read_image(file))


def test_a_palette_of_greys_is_grey() -> None:
    image = palette([0, 0, 0, 90, 90, 90, 180, 180, 180, 255, 255, 255])
    np.testing.assert_array_equal(as_array(image, "an image")[0, :4], [0, 90, 180, 255])


def turned() -> Image.Image:
    image = Image.fromarray(COLOURS)
    image.getexif()[0x0112] = 6
    return image


def pages(_: Path) -> Image.Image:
    file, more = io.BytesIO(), [Image.fromarray(RAMP[::-1])]
    Image.fromarray(RAMP).save(file, "tiff", save_all=True, append_images=more)
    return Image.open(file)


def cut_off(_: Path) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:900]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: Image.fromarray(COLOURS).convert("CMYK"), "mode CMYK"),
        (lambda _: Image.fromarray(COLOURS).convert("YCbCr"), "mode YCbCr"),
        (lambda _: Image.fromarray(COLOURS).convert("HSV"), "mode HSV"),
        (lambda _: palette([0, 0, 0, 255, 0, 0], transparency=0), "partly transparent"),
        (lambda _: Image.fromarray(np.dstack([COLOURS, RAMP])), "partly transparent"),
        (lambda _: turned(), r"orientation 6.*exif_transpose"),
        (pages, "2 pages"),
        (cut_off, "cannot be decoded"),
        (lambda _: torch.zeros(3, 4, requires_grad=True), "detach"),
        (lambda _: torch.zeros(3, 4, dtype=torch.bfloat16), "cannot be read"),
        (lambda folder: folder / "nowhere.png", "there is no file"),
        (lambda folder: str(folder / "image.dcm"), "is a volume"),
        (lambda _: b"\x89PNG", "got bytes"),
        (lambda _: [RAMP], "list of 1.*segment_many"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_image(make(tmp_path))


class OnGpu:
    """Says that it lies on a GPU, as a tensor of PyTorch does."""

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("nobody may ask for it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_an_exemplar_on_a_gpu_is_refused(tmp_path: Path) -> None:
    with create(tmp_path / "library") as library, pytest.raises(InputError, match="on a GPU"):
        library.add(OnGpu(), {"nucleus": draw(0)[1]})


def test_a_library_takes_each_for_the_same_exemplar(tmp_path: Path) -> None:
    image, mask = draw(1)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    kinds = {
        "path": (tmp_path / "image.png", mask),
        "text": (str(tmp_path / "image.png"), mask),
        "pil": (Image.fromarray(image), Image.fromarray(mask)),
        "torch": (torch.from_numpy(image), torch.from_numpy(mask)),
    }
    with create(tmp_path / "library") as library:
        library.add(image, {"nucleus": mask}, key="numpy")
        for key, (taken, drawn) in kinds.items():
            library.add(taken, {"nucleus": drawn}, key=key)
            assert library.get(key).content == library.get("numpy").content
        with pytest.raises(InputError, match=r"mask of 'nucleus'.*got PosixPath"):
            library.add(image, {"nucleus": tmp_path / "image.png"})


def test_a_query_may_come_as_each(fake_bundle: Bundle, tmp_path: Path) -> None:
    image = np.full((64, 64), 20, np.uint8)
    image[:32, :32] = 200
    cv2.imwrite(str(tmp_path / "image.png"), image)
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        library.add(image, {"square": image > 100})
        segmenter = Segmenter(library, engine="fake")
        wanted = segmenter.segment(image).label_map
        for taken in (tmp_path / "image.png", Image.fromarray(image), torch.from_numpy(image)):
            np.testing.assert_array_equal(segmenter.segment(taken).label_map, wanted)
            assert segmenter.distance(taken) < 1e-3
            assert library.embed(taken) @ library.embed(image) == pytest.approx(1)


def test_what_is_masked_is_no_pixel() -> None:
    hidden = np.ma.array(RAMP, mask=RAMP > 200)
    for taken in (lambda: as_array(hidden, "an image"), lambda: open_image(hidden)):
        with pytest.raises(InputError, match="elements that are masked"):
            taken()
    plain = as_array(np.ma.array(RAMP), "an image")
    assert type(plain) is np.ndarray
    np.testing.assert_array_equal(plain, RAMP)
    assert as_array(RAMP, "an image") is RAMP


def test_an_exemplar_has_as_many_masks_as_can_be_read_again(tmp_path: Path) -> None:
    image, _ = draw(1)
    masks = {f"s{i}": np.arange(image.size).reshape(image.shape) == i % image.size
             for i in range(MOST_MASKS + 1)}  # fmt: skip
    with create(tmp_path / "library") as library:
        with pytest.raises(InputError, match=f"at most {MOST_MASKS} masks"):
            library.add(image, masks)
        masks.popitem()
        assert len(library.source(library.add(image, masks))[1]) == MOST_MASKS
