"""Good files of every format, and ways to damage them; a seed says which, to have them again."""

from __future__ import annotations

import gzip
import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import highdicom
import nibabel
import nrrd
import numpy as np
import pydicom
import SimpleITK
from pydicom.sr.codedict import codes
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from support.dicom_series import make_slice, write_series
from support.multi_frame import items, write_multi_frame

__all__ = ["FORMATS", "damage", "good_files", "good_series"]

FORMATS = ("dicom", "enhanced", "segmentation", "nifti", "nrrd", "metaimage", "picture")
INTERESTING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000,
               0xFFFFFFFF, 0x7FC00000, 0x7F800000)  # fmt: skip
WORDS = (b"0", b"-1", b"1e308", b"nan", b"inf", b"99999999999", b"none", b"(0,0,0)", b"", b"\xff",
         b"../../etc/passwd", b"/dev/zero", b"double", b"block", b"gzip", b"raw")  # fmt: skip


def good_files() -> dict[str, list[tuple[str, bytes]]]:
    """Return files by format: name (its suffix counts) and content."""
    with TemporaryDirectory() as folder:
        return {
            "dicom": _dicom(Path(folder, "series")),
            "enhanced": _enhanced(Path(folder)),
            "segmentation": _segmentations(good_series(Path(folder, "drawn"))),
            "nifti": _nifti(Path(folder)),
            "nrrd": _nrrd(Path(folder)),
            "metaimage": _metaimage(Path(folder)),
            "picture": _pictures(),
        }


def damage(kind: str, name: str, data: bytes, rng: random.Random) -> bytes:
    """Return the file with one to four things wrong."""
    unpack = kind == "nifti" and name.endswith(".gz") and rng.random() < 0.8
    content = bytearray(gzip.decompress(data) if unpack else data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = [*_GENERAL, *_FIELDS[kind]]
        rng.choice(ways)(content, rng)
    return gzip.compress(bytes(content), 1) if unpack else bytes(content)


def _dicom(folder: Path) -> list[tuple[str, bytes]]:
    array = (np.random.default_rng(0).random((4, 64, 48)) * 900).astype(np.uint16)
    paths = write_series(folder, array)
    source = [pydicom.dcmread(path) for path in paths]
    files = [_saved("slice", source[0])]
    for title, syntax in (
        ("rle", RLELossless),
        ("jpegls", JPEGLSLossless),
        ("j2k", JPEG2000Lossless),
    ):
        packed = pydicom.dcmread(paths[0])
        packed.compress(syntax, generate_instance_uid=False)
        files.append(_saved(title, packed))
    frames = make_slice(array[0], Modality="US", NumberOfFrames=4)
    frames.PixelData = array.tobytes()
    files.append(_saved("frames", frames))
    colour = make_slice(np.zeros((64, 48, 3), np.uint8), Modality="US")
    files.append(_saved("colour", colour))
    palette = make_slice(np.zeros((64, 48), np.uint8), Modality="US")
    palette.BitsAllocated = palette.BitsStored = 8
    palette.HighBit, palette.PhotometricInterpretation = 7, "PALETTE COLOR"
    palette.PixelData = array[0].astype(np.uint8).tobytes()
    for name in ("Red", "Green", "Blue"):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        table = np.arange(256, dtype="<u2").tobytes()
        setattr(palette, f"{name}PaletteColorLookupTableData", table)
    padded = pydicom.dcmread(paths[1])
    padded.add_new("PixelPaddingValue", "US", 0)
    padded.add_new("PixelPaddingRangeLimit", "US", 20)
    padded.BitsStored, padded.HighBit = 10, 11
    padded.RescaleSlope, padded.RescaleIntercept = "2", "-1000"
    deflated = pydicom.dcmread(paths[2])
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    bare = _saved("bare", pydicom.dcmread(paths[3]))[1]
    bare = bare[bare.find(struct.pack("<HH", 0x0008, 0x0008)) :]  # no preamble, no meta
    return [
        *files,
        _saved("palette", palette),
        _saved("padded", padded),
        _saved("deflated", deflated),
        ("bare.dcm", bare),
    ]


def good_series(folder: Path) -> list[Path]:
    """Write the series that the segmentations are drawn on; its identifiers are always the same."""
    array = (np.random.default_rng(0).random((4, 64, 48)) * 900).astype(np.uint16)
    paths = write_series(folder, array)
    for number, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.1"
        dataset.FrameOfReferenceUID = "1.2.3.2"
        uid = f"1.2.3.3.{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.save_as(path)
    return paths


def _enhanced(folder: Path) -> list[tuple[str, bytes]]:
    array = (np.random.default_rng(0).random((4, 24, 16)) * 900).astype(np.int16)

    def tables(index: int, group: pydicom.Dataset) -> None:
        group.PixelValueTransformationSequence = items(RescaleSlope=2, RescaleIntercept=-100)
        group.FrameVOILUTSequence = items(WindowCenter=300, WindowWidth=400)

    def times(index: int, group: pydicom.Dataset) -> None:
        group.PlanePositionSequence = items(ImagePositionPatient=[0.0, 0.0, index % 2 * 3.0])
        group.FrameContentSequence = items(StackID="1", TemporalPositionIndex=index // 2 + 1)

    write_multi_frame(folder / "shared.dcm", array, [3, 1, 0, 2], each=tables)
    write_multi_frame(folder / "each.dcm", array, [3, 1, 0, 2], shared=False)
    write_multi_frame(folder / "times.dcm", array, each=times)
    packed = pydicom.dcmread(folder / "shared.dcm")
    packed.compress(RLELossless, generate_instance_uid=False)
    packed.save_as(folder / "packed.dcm")
    names = ("shared.dcm", "each.dcm", "times.dcm", "packed.dcm")
    return [(name, (folder / name).read_bytes()) for name in names]


def _segmentations(paths: list[Path]) -> list[tuple[str, bytes]]:
    source = [pydicom.dcmread(path) for path in paths]
    mask = np.zeros((4, 64, 48), np.uint8)
    mask[1:3, 5:15, 5:12] = 1
    organ = codes.SCT.Organ
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "a", codes.DCM.ArtificialIntelligence, "1"
    )
    description = highdicom.seg.SegmentDescription(
        1, "thing", organ, organ,
        highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm,
    )  # fmt: skip
    files = []
    for kind, extra in (
        ("BINARY", {}),
        ("FRACTIONAL", {"fractional_type": "PROBABILITY"}),
        ("LABELMAP", {}),
    ):
        segmentation = highdicom.seg.Segmentation(
            source, mask.copy(), kind, [description], highdicom.UID(), 1, highdicom.UID(), 1,
            "m", "m", "1", "1", **extra,
        )  # fmt: skip
        files.append(_saved(f"seg-{kind.lower()}", segmentation))
    return files


def _saved(title: str, dataset: pydicom.Dataset) -> tuple[str, bytes]:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return f"{title}.dcm", file.getvalue()


def _nifti(folder: Path) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    files = []
    for name, kind, dtype in (
        ("one.nii", nibabel.Nifti1Image, np.int16),
        ("two.nii", nibabel.Nifti2Image, np.float32),
        ("packed.nii.gz", nibabel.Nifti1Image, np.uint8),
    ):
        image = kind((rng.random((9, 8, 5)) * 200).astype(dtype), np.diag([-1.0, 1.2, 3.0, 1.0]))
        nibabel.save(image, folder / name)
        files.append((name, (folder / name).read_bytes()))
    return files


def _nrrd(folder: Path) -> list[tuple[str, bytes]]:
    array = (np.random.default_rng(0).random((9, 8, 5)) * 200).astype(np.int16)
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.0, 1.2, 3.0]),
        "space origin": np.zeros(3),
    }
    segments = {**header, "Segment0_ID": "s0", "Segment0_Name": "thing", "Segment0_LabelValue": "1",
                "Segment0_Layer": "0"}  # fmt: skip
    files = []
    for name, encoding, fields, data in (
        ("raw.nrrd", "raw", header, array),
        ("gzip.nrrd", "gzip", header, array),
        ("bzip.nrrd", "bzip2", header, array),
        ("segments.seg.nrrd", "gzip", segments, (array > 100).astype(np.uint8)),
    ):
        nrrd.write(str(folder / name), data, {**fields, "encoding": encoding})
        files.append((name, (folder / name).read_bytes()))
    return files


def _metaimage(folder: Path) -> list[tuple[str, bytes]]:
    array = (np.random.default_rng(0).random((5, 8, 9)) * 200).astype(np.int16)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.2, 3.0))
    files = []
    for name, packed in (("raw.mha", False), ("packed.mha", True)):
        SimpleITK.WriteImage(image, str(folder / name), useCompression=packed)
        files.append((name, (folder / name).read_bytes()))
    return files


def _pictures() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 24)).astype(np.uint8)
    files = []
    for name, array in (
        ("grey8.png", grey),
        ("grey16.png", rng.integers(0, 65536, (20, 24)).astype(np.uint16)),
        ("colour.png", rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)),
    ):
        files.append((name, cv2.imencode(".png", array)[1].tobytes()))
    for suffix in (".jpg", ".bmp", ".tif"):
        files.append((f"other{suffix}", cv2.imencode(suffix, grey)[1].tobytes()))
    saved = io.BytesIO()
    np.save(saved, grey)
    return [*files, ("array.npy", saved.getvalue())]


Way = Callable[[bytearray, random.Random], None]


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_in_head(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _take_out(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 4, 16, 100))]


def _put_in(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 4, 16, 100)))


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.choice((4, 16, 200))]


def _interesting_number(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    if len(data) >= size:
        at = rng.randrange(len(data) - size + 1)
        if rng.random() < 0.7:
            at = rng.randrange(min(len(data) - size + 1, 700))
        value = rng.choice(INTERESTING) & ((1 << 8 * size) - 1)
        data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


_GENERAL: list[Way] = [
    _flip_bits, _flip_in_head, _cut, _take_out, _put_in, _repeat, _interesting_number
]  # fmt: skip

_TAGS = [  # group, element of what the reader asks for
    (0x0002, 0x0010), (0x0008, 0x0016), (0x0020, 0x000E), (0x0020, 0x0032), (0x0020, 0x0037),
    (0x0028, 0x0002), (0x0028, 0x0004), (0x0028, 0x0006), (0x0028, 0x0008), (0x0028, 0x0010),
    (0x0028, 0x0011), (0x0028, 0x0030), (0x0028, 0x0100), (0x0028, 0x0101), (0x0028, 0x0102),
    (0x0028, 0x0103), (0x0028, 0x1052), (0x0028, 0x1053), (0x7FE0, 0x0010), (0x5200, 0x9230),
    (0x0062, 0x0002), (0x0018, 0x0050), (0x5200, 0x9229), (0x0020, 0x9113), (0x0020, 0x9116),
    (0x0028, 0x9110), (0x0028, 0x9145), (0x0028, 0x9132), (0x0020, 0x9111), (0x0020, 0x9128),
    (0x0062, 0x0001), (0x0062, 0x0004), (0x0062, 0x000A), (0x0062, 0x000B), (0x0062, 0x000E),
    (0x0028, 0x0120), (0x0028, 0x0121), (0x0028, 0x1101), (0x0028, 0x1201), (0x0020, 0x0052),
    (0x0008, 0x2112), (0x0008, 0x1155), (0x0008, 0x9124),
]  # fmt: skip


def _dicom_field(data: bytearray, rng: random.Random) -> None:
    group, element = rng.choice(_TAGS)
    at = data.find(struct.pack("<HH", group, element))
    if at < 0 or at + 12 > len(data):
        return
    part = rng.randrange(3)
    if part == 0:  # the way the value is represented
        data[at + 4 : at + 6] = rng.choice((b"US", b"DS", b"OB", b"OW", b"SQ", b"UN", b"UI", b"??"))
    elif part == 1:  # its length
        data[at + 6 : at + 8] = struct.pack("<H", rng.choice(INTERESTING) & 0xFFFF)
    else:
        size = rng.choice((2, 4))
        data[at + 8 : at + 8 + size] = rng.choice(
            [struct.pack("<I", rng.choice(INTERESTING))[:size], b"nan\\"[:size], b"1e99"[:size]]
        )


def _nifti_field(data: bytearray, rng: random.Random) -> None:
    if len(data) < 348:
        return
    at, form = rng.choice(
        ((0, "i"), (40, "h"), (42, "h"), (44, "h"), (46, "h"), (48, "h"), (70, "h"), (72, "h"),
         (76, "f"), (80, "f"), (108, "f"), (112, "f"), (116, "f"), (252, "h"), (254, "h"),
         (256, "f"), (280, "f"), (300, "f"), (320, "f"))
    )  # fmt: skip
    value: float = rng.choice((0, 1, -1, 2, 7, 128, 511, 32767, -32768))
    if form == "f":
        value = rng.choice((0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 352.0, 1e6))
    struct.pack_into("<" + form, data, at, value)


def _nrrd_field(data: bytearray, rng: random.Random) -> None:
    _field(data, rng, data.find(b"\n\n"), b":", b"data file")


def _metaimage_field(data: bytearray, rng: random.Random) -> None:
    _field(data, rng, data.find(b"LOCAL"), b"=", b"ElementDataFile")


def _field(data: bytearray, rng: random.Random, end: int, between: bytes, file: bytes) -> None:
    """Change a line of a header in text, ``file`` names one with the pixels."""
    lines = bytes(data[:end]).split(b"\n") if end > 0 else []
    if len(lines) < 3:
        return
    at = rng.randrange(1, len(lines))
    name, colon, value = lines[at].partition(between)
    what = rng.randrange(4)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[at])
    elif what == 2:
        lines[at] = name + colon + b" " + rng.choice(WORDS)
    else:
        lines[at] = name + colon + re.sub(rb"\d+", lambda _: rng.choice(WORDS), value, count=1)
    if rng.random() < 0.1:
        lines.insert(1, file + between + b" " + rng.choice(WORDS))
    data[:end] = b"\n".join(lines)


def _png_chunk(data: bytearray, rng: random.Random) -> None:
    """Change a chunk and make its checksum right again, so that it gets past the first look."""
    if not data.startswith(b"\x89PNG"):
        _interesting_number(data, rng)
        return
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((at, length))
        at += 12 + length
    chunks = [(at, length) for at, length in chunks if length and at + 12 + length <= len(data)]
    if not chunks:
        return
    at, length = chunks[0] if rng.random() < 0.6 else rng.choice(chunks)
    where = at + 8 + rng.randrange(length)
    if bytes(data[at + 4 : at + 8]) == b"IHDR" and rng.random() < 0.5:
        struct.pack_into(">I", data, at + 8 + rng.choice((0, 4)), rng.choice(INTERESTING))
    else:
        data[where] = rng.randrange(256)
    checksum = zlib.crc32(data[at + 4 : at + 8 + length])
    struct.pack_into(">I", data, at + 8 + length, checksum)


_FIELDS: dict[str, list[Way]] = {
    "dicom": [_dicom_field] * 6,
    "enhanced": [_dicom_field] * 6,
    "segmentation": [_dicom_field] * 6,
    "nifti": [_nifti_field] * 6,
    "nrrd": [_nrrd_field] * 6,
    "metaimage": [_metaimage_field] * 6,
    "picture": [_png_chunk] * 6,
}
