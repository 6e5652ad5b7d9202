"""Pictures and masks come as a viewer shows them, by one rule, whatever their format and depth.

Pillow is the viewer: it knows orientation, palettes and inverted files by code of its own.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.headers import declared_size, meaning
from recallseg.runtime.formats.images import read_colours, read_image, read_label_map

ORIENTATION, PHOTOMETRIC = 274, 262
ORIENTATIONS = list(range(1, 9))


def scene(*, mode: str = "L") -> Image.Image:
    """A picture that no turn maps to itself, in blocks that a lossy format keeps."""
    values = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(values)
    return image if mode == "L" else Image.merge("RGB", [image, ImageOps.invert(image), image])


def save(path: Path, image: Image.Image, orientation: int = 1, **options: Any) -> Path:
    if path.suffix in (".tif", ".tiff"):
        options["tiffinfo"] = {ORIENTATION: orientation, **options.get("tiffinfo", {})}
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(path, **options)
    return path


def viewed(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_orientation_as_a_viewer_shows_it(
    tmp_path: Path, suffix: str, orientation: int, mode: str
) -> None:
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    path = save(tmp_path / f"a{suffix}", scene(mode=mode), orientation, **options)
    # Pillow 13 itself mixes up the rows of an uncompressed TIFF that is to be turned.
    wanted = viewed(save(tmp_path / "wanted.png", scene(mode=mode), orientation)).astype(int)
    found = read_image(path).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= (6 if suffix == ".jpg" else 0)
    stored = read_image(path, as_stored=True).astype(int)
    assert np.abs(stored - np.asarray(scene(mode=mode)).astype(int)).max() <= 6
    if suffix != ".jpg" and mode == "L":
        np.testing.assert_array_equal(read_label_map(path), wanted)


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_where_white_is_zero(tmp_path: Path, bits: int, order: str) -> None:
    values = np.array([[0, 1, 1, 0], [1, 1, 0, 1]]) * (2**bits - 1)
    values[0, 0] = min(5, 2**bits - 1)
    path = tmp_path / "a.tif"
    highest = 2**bits - 1
    path.write_bytes(tiff(highest - values, bits, 0, order=order))
    scale = 255 if bits == 1 else 1
    np.testing.assert_array_equal(read_image(path), values * scale)
    np.testing.assert_array_equal(read_image(path, as_stored=True), (highest - values) * scale)
    path.write_bytes(tiff(values, bits, 1, order=order))
    np.testing.assert_array_equal(read_image(path), values * scale)
    np.testing.assert_array_equal(read_label_map(path), values)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_odd_depths_are_not_rescaled(tmp_path: Path, bits: int) -> None:
    values = np.array([[0, 1, 300, 7], [2**bits - 1, 15, 500, 1000]])
    (tmp_path / "a.tif").write_bytes(tiff(values, bits, 1))
    found = read_image(tmp_path / "a.tif")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, values)


def test_a_fax_mask(tmp_path: Path) -> None:
    """CCITT group 4, which writes white as 0: the usual file of a scanned mask."""
    mask = np.zeros((16, 24), bool)
    mask[3:9, 5:20] = True
    Image.fromarray(mask).save(tmp_path / "a.tif", compression="group4")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.tif"), mask)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), mask * 255)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_numbers_in_a_mask_and_colours_in_an_image(
    tmp_path: Path, suffix: str, transparent: bool
) -> None:
    numbers = np.array([[0, 1, 2, 2], [3, 1, 0, 2]], np.uint8)
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [9, 9, 200]], np.uint8)
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(colours.ravel().tolist())
    options = {"transparency": 0} if transparent and suffix == ".png" else {}
    image.save(tmp_path / f"a{suffix}", **options)
    np.testing.assert_array_equal(read_label_map(tmp_path / f"a{suffix}"), numbers)
    if not options:
        np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), colours[numbers])
    np.testing.assert_array_equal(read_colours(tmp_path / f"a{suffix}"), colours[numbers])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_in_png(tmp_path: Path, bits: int) -> None:
    numbers = (np.arange(24).reshape(3, 8) % 2**bits).astype(np.uint8)
    image = Image.fromarray(numbers).convert("P")
    image.putpalette([v for i in range(2**bits) for v in (i * 60 % 256, 7, 9)])
    image.save(tmp_path / "p.png", bits=bits)
    np.testing.assert_array_equal(read_label_map(tmp_path / "p.png"), numbers)
    (tmp_path / "g.png").write_bytes(grey_png(numbers, bits))
    np.testing.assert_array_equal(read_label_map(tmp_path / "g.png"), numbers)
    np.testing.assert_array_equal(read_image(tmp_path / "g.png"), numbers * (255 // (2**bits - 1)))


def test_a_grey_palette_is_grey(tmp_path: Path) -> None:
    image = scene().convert("P")
    image.putpalette([v for i in range(256) for v in (255 - i,) * 3])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), 255 - np.asarray(scene()))


def test_grey_with_opacity_is_grey(tmp_path: Path) -> None:
    opaque = Image.new("L", scene().size, 255)
    Image.merge("LA", [scene(), opaque]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(scene()))


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_colours_for_print(tmp_path: Path, suffix: str) -> None:
    """CMYK becomes RGB without a profile, as Pillow does it too."""
    image = Image.merge("CMYK", [scene(), ImageOps.invert(scene()), scene(), scene()])
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    image.save(tmp_path / f"a{suffix}", **options)
    wanted = np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")).astype(int)
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_label_maps_of_other_types(tmp_path: Path, dtype: type) -> None:
    values = np.array([[0, 1, 300], [2, 2, 0]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.tif"), values)
    for wrong in (values - 1, values * 1000):
        Image.fromarray(wrong.astype(dtype)).save(tmp_path / "b.tif")
        with pytest.raises(InputError, match="whole numbers from 0 to 65535"):
            read_label_map(tmp_path / "b.tif")


def test_colours_and_transparency_of_a_drawing(tmp_path: Path) -> None:
    drawn = np.zeros((4, 4, 4), np.uint8)
    drawn[..., :3] = 200  # what editors leave below full transparency
    drawn[1:3, 1:3] = (255, 0, 0, 255)
    Image.fromarray(drawn).save(tmp_path / "a.png")
    found = read_colours(tmp_path / "a.png")
    assert (found[0, 0] == 0).all()
    assert found[1, 1].tolist() == [255, 0, 0]
    drawn[1, 1, 3] = 128
    Image.fromarray(drawn).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="half transparent"):
        read_colours(tmp_path / "a.png")


def test_small_copies_are_no_pages(tmp_path: Path) -> None:
    small = scene().resize((8, 6))
    small.encoderinfo = {"tiffinfo": {254: 1}}  # type: ignore[attr-defined]
    scene().save(tmp_path / "a.tif", save_all=True, append_images=[small])
    assert read_image(tmp_path / "a.tif").shape == (24, 32)
    scene().save(tmp_path / "b.tif", save_all=True, append_images=[scene()] * 2)
    with pytest.raises(InputError, match="has 3 pages"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 3, "photometric": 2, "planar": 2, "bits": 16}, "planar"),
        ({"samples": 2}, "2 channels"),
        ({"samples": 4, "photometric": 2}, "4 channels"),
        ({"photometric": 8, "samples": 3}, "of a kind"),
        ({"bits": 16, "form": 3}, "floating-point numbers of 16 bits"),
        ({"bits": 4}, "4 bits"),
        ({"bits": 32, "form": 3, "photometric": 0}, "white is its zero"),
        ({"bits": 64, "form": 6}, "complex"),
    ],
)
def test_what_the_decoder_would_read_wrongly_is_refused(
    tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    given = {"bits": 8, "photometric": 1, "samples": 1, **fields}
    data = bytes(4 * 2 * given["samples"] * max(given["bits"], 8) // 8)
    extra = {"form": given.get("form", 1), "planar": given.get("planar", 1)}
    (tmp_path / "a.tif").write_bytes(
        tiff_file(data, 4, 2, given["bits"], given["photometric"], given["samples"], **extra)
    )
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / "a.tif")


def test_stacks_of_imagej_are_refused(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.tif", tiffinfo={270: "ImageJ=1.54f\nimages=7\nslices=7\n"})
    with pytest.raises(InputError, match="7 pages"):
        read_image(tmp_path / "a.tif")


def test_big_tiff(tmp_path: Path) -> None:
    stream = io.BytesIO()
    scene().save(stream, "TIFF", big_tiff=True, tiffinfo={ORIENTATION: 6})
    assert declared_size(stream.getvalue()) == (24, 32)
    (tmp_path / "a.tif").write_bytes(stream.getvalue())
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.rot90(np.asarray(scene()), -1))


def test_twenty_thousand_pixels_square_are_refused_by_their_header(tmp_path: Path) -> None:
    """With a figure, and before memory is taken."""
    (tmp_path / "a.tif").write_bytes(tiff_file(b"", 20_000, 20_000, 8, 1, 1))
    with pytest.raises(InputError, match="400000000 pixels; at most 268435456"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("seed", range(20))
def test_damaged_headers_say_something_or_nothing(seed: int) -> None:
    """Never another error than InputError's; the decoder has its say."""
    rng = np.random.default_rng(seed)
    for suffix in ("TIFF", "PNG", "JPEG", "BMP"):
        stream = io.BytesIO()
        scene().save(stream, suffix)
        data = np.frombuffer(stream.getvalue(), np.uint8).copy()
        data[rng.integers(0, min(len(data), 300), 6)] = rng.integers(0, 256, 6)
        meaning(data.tobytes())
        declared_size(data.tobytes()[: int(rng.integers(1, len(data)))])


def pack(values: np.ndarray, bits: int, order: str) -> bytes:
    if bits % 8 == 0:
        return values.astype(f"{order}u{bits // 8}").tobytes()
    rows = ["".join(format(int(v), f"0{bits}b") for v in row) for row in values]
    rows = [row.ljust(-(-len(row) // 8) * 8, "0") for row in rows]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


def tiff(values: np.ndarray, bits: int, photometric: int, *, order: str = "<") -> bytes:
    height, width = values.shape
    return tiff_file(pack(values, bits, order), width, height, bits, photometric, 1, order=order)


def tiff_file(
    data: bytes,
    width: int,
    height: int,
    bits: int,
    photometric: int,
    samples: int,
    *,
    form: int = 1,
    planar: int = 1,
    order: str = "<",
) -> bytes:
    """Write a TIFF file tag by tag: what no library writes must be tried too."""
    short, long = "H", "I"
    strips = samples if planar == 2 else 1
    tags: list[tuple[int, str, list[int]]] = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [bits] * samples),
        (259, short, [1]),
        (262, short, [photometric]),
        (273, long, [0] * strips),
        (277, short, [samples]),
        (278, long, [height]),
        (279, long, [len(data) // strips] * strips),
        (284, short, [planar]),
        (339, short, [form] * samples),
    ]
    end = 8 + 2 + 12 * len(tags) + 4
    sizes = {t: struct.calcsize(order + k * len(v)) for t, k, v in tags}
    start = end + sum(size + size % 2 for size in sizes.values() if size > 4)
    entries = blobs = b""
    for tag, kind, values in tags:
        if tag == 273:
            values = [start + i * (len(data) // strips) for i in range(strips)]
        raw = struct.pack(order + kind * len(values), *values)
        code = {"H": 3, "I": 4}[kind]
        place = struct.pack(order + "I", end + len(blobs)) if len(raw) > 4 else raw.ljust(4, b"\0")
        if len(raw) > 4:
            blobs += raw + b"\0" * (len(raw) % 2)
        entries += struct.pack(order + "HHI", tag, code, len(values)) + place
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "I", 8) + struct.pack(order + "H", len(tags))
    return head + entries + bytes(4) + blobs + data


def grey_png(values: np.ndarray, bits: int) -> bytes:
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    height, width = values.shape
    rows = b"".join(b"\0" + pack(row[None], bits, ">") for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
