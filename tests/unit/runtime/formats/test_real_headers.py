"""Headers as scanners, archives and anonymisers leave them: the right value, or a clear refusal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from support.dicom_series import make_slice, write_series

from recallseg.engines.errors import InputError, OutputError
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.dicom_files import is_dicom
from recallseg.runtime.formats.dicom_seg import Algorithm, check_segmentation, write_dicom_seg
from recallseg.runtime.formats.reading import read_volume

STACK = np.random.default_rng(3).integers(0, 1000, (4, 12, 10)).astype(np.uint16)


def one(path: Path, plane: np.ndarray = STACK[0], **fields: Any) -> Path:
    make_slice(plane, **fields).save_as(path, enforce_file_format=True)
    return path


def change(paths: list[Path], **fields: Any) -> None:
    for path in paths:
        dataset = pydicom.dcmread(path)
        for name, value in fields.items():
            if value is None:
                if name in dataset:
                    del dataset[name]
            elif isinstance(value, tuple):
                dataset.add_new(name, *value)
            else:
                setattr(dataset, name, value)
        dataset.save_as(path)


@pytest.mark.parametrize(("stored", "high"), [(12, 11), (12, 13), (12, 15), (10, 15), (16, 15)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_stored_bits_wherever_they_are(
    tmp_path: Path, stored: int, high: int, signed: bool, syntax: str | None
) -> None:
    """Other bits hold what they held in old scanners: overlays, garbage."""
    low = -(2 ** (stored - 1)) if signed else 0
    values = np.random.default_rng(1).integers(low, low + 2**stored, (12, 10))
    shift = high + 1 - stored
    raw = (values.astype(np.int64) & (2**stored - 1)) << shift
    noise = np.random.default_rng(2).integers(0, 2**16, values.shape)
    others = 0xFFFF & ~((2**stored - 1) << shift)
    plane = ((raw | (noise & others)) & 0xFFFF).astype(np.uint16)
    dataset = make_slice(plane, BitsStored=stored, HighBit=high, PixelRepresentation=int(signed))
    if syntax is not None:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    assert np.array_equal(read_dicom(tmp_path / "x.dcm").array[0], values)


@pytest.mark.parametrize(
    ("slope", "intercept", "factor", "offset"),
    [
        ("", "", 1, 0),
        (None, None, 1, 0),
        ("", "-1024", 1, -1024),
        ("2", "", 2, 0),
        ("0", "5", 1, 5),
        ("0.5", "0", 0.5, 0),
        ("1", "-40000", 1, -40000),
    ],
)
def test_rescale_that_is_absent_or_empty(
    tmp_path: Path, slope: str | None, intercept: str | None, factor: float, offset: int
) -> None:
    paths = write_series(tmp_path / "s", STACK)
    change(paths, RescaleSlope=slope, RescaleIntercept=intercept)
    assert np.array_equal(read_dicom(tmp_path / "s").array, STACK.astype(int) * factor + offset)


def test_a_slice_of_another_range_widens_all(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    change(paths, RescaleSlope="1", RescaleIntercept="0")
    change(paths[2:3], RescaleSlope="100")
    change(paths[3:], RescaleSlope="0.25")
    expected = STACK * np.array([1, 1, 100, 0.25])[:, None, None]
    assert np.array_equal(read_dicom(tmp_path / "s").array, expected)


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(
    ("value", "limit", "padded"),
    [(-2000, None, (-2000, -2000)), (-2000, -1990, (-2000, -1990)), (-1990, -2000, (-2000, -1990)),
     (63536, None, (-2000, -2000))],
)  # fmt: skip
def test_padding_and_its_range(
    tmp_path: Path, implicit: bool, value: int, limit: int | None, padded: tuple[int, int]
) -> None:
    array = STACK.astype(np.int16) - 500
    array[:, 0, :3], array[:, 1, :2] = -2000, -1995
    paths = write_series(tmp_path / "s", array, RescaleSlope="2", RescaleIntercept="-10")
    vr = "US" if value > 0 else "SS"
    change(paths, PixelPaddingValue=(vr, value))
    if limit is not None:
        change(paths, PixelPaddingRangeLimit=(vr, limit))
    if implicit:
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            dataset.save_as(path, implicit_vr=True, little_endian=True)
    inside = (array >= padded[0]) & (array <= padded[1])
    expected = array.astype(int) * 2 - 10
    expected[inside] = expected[~inside].min()
    volume = read_dicom(tmp_path / "s")
    assert np.array_equal(volume.array, expected)
    assert f"{inside.sum()} pixels are padding" in " ".join(volume.notes)


def test_an_image_that_is_all_padding_stays(tmp_path: Path) -> None:
    plane = np.full((12, 10), 7, np.uint16)
    one(tmp_path / "x.dcm", plane)
    change([tmp_path / "x.dcm"], PixelPaddingValue=("US", 7))
    assert (read_dicom(tmp_path / "x.dcm").array == 7).all()


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_by_the_stored_range(tmp_path: Path, signed: bool) -> None:
    """Every slice alike: the same stored value is the same tissue in each of them."""
    array = (STACK.astype(np.int16) - 500 * signed).astype(np.int16 if signed else np.uint16)
    array[1] //= 2
    write_series(
        tmp_path / "s", array, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11,
        RescaleSlope="2", RescaleIntercept="-100", WindowCenter=300, WindowWidth=100,
    )  # fmt: skip
    ends = -1 if signed else 4095  # lowest and highest of 12 bits
    volume = read_dicom(tmp_path / "s")
    assert np.array_equal(volume.array, 2 * (ends - array.astype(int)) - 100)
    assert volume.window == (2 * ends - 200 - 300, 100)


def palette(path: Path, entries: np.ndarray, bits: int, plane: np.ndarray) -> Path:
    dataset = make_slice(plane.astype(np.uint8), Modality="US")
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PhotometricInterpretation = 7, "PALETTE COLOR"
    for column, name in enumerate(("Red", "Green", "Blue")):
        word = entries[:, column].astype("<u2" if bits > 8 else "u1").tobytes()
        setattr(
            dataset, f"{name}PaletteColorLookupTableDescriptor", [len(entries) % 65536, 0, bits]
        )
        setattr(dataset, f"{name}PaletteColorLookupTableData", word)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (16, 8), (16, 0), (12, 4), (10, 2)])
def test_palettes_of_any_depth(tmp_path: Path, bits: int, shift: int) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (256, 3))
    colours[0] = 255
    plane = np.arange(120).reshape(12, 10)
    path = palette(tmp_path / "p.dcm", colours << shift, bits, plane)
    assert np.array_equal(read_dicom(path).array[0], colours[plane])


def test_a_dark_picture_with_a_full_palette_stays_dark(tmp_path: Path) -> None:
    colours = np.repeat(np.arange(256)[:, None] * 257, 3, axis=1)
    path = palette(tmp_path / "p.dcm", colours, 16, np.full((12, 10), 3))
    assert (read_dicom(path).array == 3).all()


@pytest.mark.parametrize(
    "kind", ["deflated", "implicit", "no preamble", "no meta", "zero preamble cut"]
)
def test_files_as_they_are_stored(tmp_path: Path, kind: str) -> None:
    paths = write_series(tmp_path / "s", STACK)
    for path in paths:
        dataset = pydicom.dcmread(path)
        if kind in ("implicit", "no meta"):
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            dataset.save_as(path, implicit_vr=True, little_endian=True)
        elif kind == "deflated":
            dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
            dataset.save_as(path)
        data = path.read_bytes()
        if kind == "no preamble":  # from the file meta information on
            path.write_bytes(data[132:])
        elif kind == "no meta":  # from the data set on
            length = int.from_bytes(data[140:144], "little")
            path.write_bytes(data[144 + length :])
        elif kind == "zero preamble cut":
            path.write_bytes(data[132 + 12 + int.from_bytes(data[140:144], "little") :])
    assert np.array_equal(read_volume(tmp_path / "s").array, STACK)


def test_what_only_begins_like_dicom_is_none(tmp_path: Path) -> None:
    for name, data in {
        "text": b"\x08\x00\x05\x00CS" + b"x" * 200,
        "zeros": bytes(500),
        "short": b"\x08\x00\x05",
        "empty": b"",
        "elf": b"\x7fELF" + bytes(300),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert not is_dicom(tmp_path / name), name


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = np.zeros((2000, 2000), np.uint16)
    dataset = make_slice(plane)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    assert read_dicom(tmp_path / "x.dcm").shape == (1, 2000, 2000)
    monkeypatch.setenv("RECALLSEG_MAX_BYTES", "1M")
    with pytest.raises(InputError, match="unpacks to more"):
        read_dicom(tmp_path / "x.dcm")


def test_an_output_is_checked_by_what_the_source_has(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    change(
        paths, PatientBirthDate=None, PatientSex=None, StudyTime=None, AccessionNumber=None,
        StudyDate=None, StudyID=None, ReferringPhysicianName=None, PatientName=None,
        PatientID=None, SliceThickness=None, Manufacturer=None, FrameOfReferenceUID=None,
    )  # fmt: skip
    volume = read_dicom(tmp_path / "s")
    assert "no frame of reference" in " ".join(volume.notes)
    check_segmentation(volume, ["a"], Algorithm("1", {}))
    mask = STACK > 500
    write_dicom_seg(tmp_path / "x.dcm", {"a": mask}, volume, Algorithm("1", {}))
    written = pydicom.dcmread(tmp_path / "x.dcm")
    for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AccessionNumber"):
        assert name in written
        assert not written.get(name)
    again = read_dicom(tmp_path / "s")
    assert written.FrameOfReferenceUID == again.origin.reference  # the same one every time


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_a_source_without_identity_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    paths = write_series(tmp_path / "s", STACK[:1])
    change(paths, **{name: None})
    with pytest.raises(InputError, match=f"the source has no {name}"):
        check_segmentation(read_dicom(paths[0]), ["a"], Algorithm("1", {}))


def test_images_without_identifiers_are_no_copies_of_each_other(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    change(paths[1:], SOPInstanceUID=None)
    volume = read_dicom(tmp_path / "s")
    assert np.array_equal(volume.array, STACK)
    with pytest.raises(InputError, match="SOPInstanceUID in each image"):
        check_segmentation(volume, ["a"], Algorithm("1", {}))


def test_private_scaling_is_told(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    for path in paths:
        dataset = pydicom.dcmread(path)
        block = dataset.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.5)
        dataset.save_as(path)
    volume = read_dicom(tmp_path / "s")
    assert np.array_equal(volume.array, STACK)
    assert "private scaling" in " ".join(volume.notes)


def test_a_fault_of_the_output_is_not_told_as_one_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import highdicom

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no")

    write_series(tmp_path / "s", STACK)
    volume = read_dicom(tmp_path / "s")
    monkeypatch.setattr(highdicom.seg, "Segmentation", fail)
    with pytest.raises(OutputError, match="cannot be written as a DICOM SEG"):
        check_segmentation(volume, ["a"], Algorithm("1", {}))


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 144", "Люкceмбypг"),  # noqa: RUF001  # as PS3.5 annex H has it
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Ünï^Cödé"),
        (None, "Doe^John"),
    ],
)
def test_names_in_any_character_set_are_kept(
    tmp_path: Path, charset: str | list[str] | None, name: str
) -> None:
    paths = write_series(tmp_path / "s", STACK)
    for path in paths:
        dataset = pydicom.dcmread(path)
        if charset is not None:
            dataset.SpecificCharacterSet = charset
        dataset.PatientName = name
        dataset.save_as(path)
    volume = read_dicom(tmp_path / "s")
    write_dicom_seg(tmp_path / "x.dcm", {"a": STACK > 500}, volume, Algorithm("1", {}))
    assert str(pydicom.dcmread(tmp_path / "x.dcm").PatientName) == name


def test_an_unknown_character_set_costs_a_name_and_not_the_result(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    for path in paths:
        change([path], SpecificCharacterSet="ISO_IR 100")
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999"))
    volume = read_dicom(tmp_path / "s")
    write_dicom_seg(tmp_path / "x.dcm", {"a": STACK > 500}, volume, Algorithm("1", {}))
    assert "Doe" in str(pydicom.dcmread(tmp_path / "x.dcm").PatientName)


def test_values_against_the_standard_do_not_stop_a_segmentation(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", STACK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(paths, PatientBirthDate=("DA", "19700000"), StudyTime=("TM", "99:99"),
               PatientSex=("CS", "unbekannt"), SeriesDescription=("LO", "x" * 90))  # fmt: skip
    volume = read_dicom(tmp_path / "s")
    check_segmentation(volume, ["a"], Algorithm("1", {}))
    assert "PatientBirthDate is no date" in " ".join(volume.notes)
    assert "1970" not in " ".join(volume.notes)
