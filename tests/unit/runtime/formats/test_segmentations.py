"""SEG of every maker: by their own positions, with the right voxels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian
from support.dicom_series import write_series
from support.multi_frame import write_multi_frame

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import read_annotated_volume
from recallseg.runtime.formats.dicom import read_dicom

STACK = np.random.default_rng(3).integers(0, 1000, (5, 36, 33)).astype(np.uint16)
ORGAN = highdicom.sr.CodedConcept("10200004", "SCT", "Liver")


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "s", STACK)
    return tmp_path / "s"


def mask_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(STACK.shape) > 0.6


def sources(series: Path) -> list[Any]:
    datasets = [pydicom.dcmread(path) for path in series.iterdir()]
    return sorted(datasets, key=lambda dataset: float(dataset.ImagePositionPatient[2]))


def drawn(
    series: Path, planes: np.ndarray, labels: list[str], kind: str = "BINARY", **extra: Any
) -> Any:
    """A SEG by highdicom: planes SxHxW, or SxHxWxN for N segments."""
    descriptions = [
        highdicom.seg.SegmentDescription(n, label, ORGAN, ORGAN, "MANUAL")
        for n, label in enumerate(labels, 1)
    ]
    return highdicom.seg.Segmentation(
        extra.pop("images", None) or sources(series), planes, kind, descriptions,
        highdicom.UID(), 1, highdicom.UID(), 1, "m", "m", "1", "1", **extra,
    )  # fmt: skip


def read(series: Path, dataset: Any, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    path = series.parent / "x.dcm"
    dataset.save_as(path)
    return read_annotated_volume(series, path, None, **options)


@pytest.mark.parametrize("highest", [255, 100, 1, 7])
@pytest.mark.parametrize("meaning", ["PROBABILITY", "OCCUPANCY"])
def test_fractional_is_cut_at_half_of_the_declared_maximum(
    series: Path, highest: int, meaning: str
) -> None:
    values = np.random.default_rng(1).random(STACK.shape).astype(np.float32)
    values[0, 0, :3] = 0.5, 0.0, 1.0
    segmentation = drawn(
        series, values, ["a"], "FRACTIONAL", fractional_type=meaning, max_fractional_value=highest
    )
    volume, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], np.around(values * highest) >= highest / 2)
    assert "0.5 of its maximum" in " ".join(volume.notes)


def test_a_label_map_of_several_segments(series: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 4, STACK.shape).astype(np.uint8)
    _, masks = read(series, drawn(series, labels, ["a", "b", "c"], "LABELMAP"))
    assert list(masks) == ["a", "b", "c"]
    for value, mask in enumerate(masks.values(), 1):
        assert np.array_equal(mask, labels == value)


def test_segments_that_overlap_stay_whole(series: Path) -> None:
    planes = np.stack([mask_of(0), mask_of(1)], axis=-1).astype(np.uint8)
    _, masks = read(series, drawn(series, planes, ["a", "b"]))
    assert np.array_equal(masks["a"], mask_of(0))
    assert np.array_equal(masks["b"], mask_of(1))
    assert (masks["a"] & masks["b"]).any()


@pytest.mark.parametrize("omit", [True, False])
def test_empty_frames_are_stored_or_not(series: Path, omit: bool) -> None:
    mask = mask_of()
    mask[[0, 2, 4]] = False
    segmentation = drawn(series, mask.astype(np.uint8), ["a"], omit_empty_frames=omit)
    assert segmentation.NumberOfFrames == (2 if omit else 5)
    _, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], mask)


def strip(segmentation: Any, how: str) -> None:
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        if how == "no derivation":
            del group.DerivationImageSequence
        for derivation in group.get("DerivationImageSequence") or ():
            for image in derivation.SourceImageSequence:
                if how == "no flag":
                    del image.SpatialLocationsPreserved
                elif how == "flag no":
                    image.SpatialLocationsPreserved = "NO"
    if how == "no references":
        strip(segmentation, "no derivation")
        del segmentation.ReferencedSeriesSequence
        if "SourceImageSequence" in segmentation:
            del segmentation.SourceImageSequence
    if how == "scrambled":
        uids = [
            g.DerivationImageSequence[0].SourceImageSequence[0]
            for g in segmentation.PerFrameFunctionalGroupsSequence
        ]
        values = [image.ReferencedSOPInstanceUID for image in uids]
        for image, value in zip(uids, reversed(values), strict=True):
            image.ReferencedSOPInstanceUID = value
            del image.SpatialLocationsPreserved


@pytest.mark.parametrize(
    "how", ["no derivation", "no flag", "flag no", "no references", "scrambled"]
)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_references_and_flags_decide_nothing(series: Path, how: str, kind: str) -> None:
    segmentation = drawn(series, mask_of().astype(np.uint8), ["a"], kind)
    strip(segmentation, how)
    _, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], mask_of())


def test_frames_in_any_order(series: Path) -> None:
    segmentation = drawn(series, mask_of().astype(np.uint8), ["a"], "LABELMAP")
    groups, pixels = list(segmentation.PerFrameFunctionalGroupsSequence), segmentation.pixel_array
    order = [3, 0, 4, 2, 1]
    segmentation.PerFrameFunctionalGroupsSequence = [groups[i] for i in order]
    segmentation.PixelData = pixels[order].tobytes()
    _, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], mask_of())


@pytest.mark.parametrize("flips", [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_a_grid_that_runs_the_other_way(series: Path, flips: tuple[int, int, int]) -> None:
    """Rows, columns or planes stored against the image's, as tools with axes of their own do."""
    volume = read_dicom(series)
    affine = volume.affine_in("LPS").copy()
    array = mask_of().astype(np.uint8)
    for axis, flip in zip((2, 1, 0), flips, strict=True):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
            array = np.flip(array, axis)
    theirs = highdicom.Volume(np.ascontiguousarray(array), affine, "PATIENT")
    _, masks = read(series, drawn(series, theirs, ["a"]))
    assert np.array_equal(masks["a"], mask_of())


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_planes_of_another_direction(series: Path, order: tuple[int, ...]) -> None:
    """A SEG cut coronally or sagittally, on the image's own lattice."""
    affine = read_dicom(series).affine_in("LPS")
    theirs = highdicom.Volume(
        np.ascontiguousarray(mask_of().astype(np.uint8).transpose(order)),
        affine[:, [*order, 3]], "PATIENT",
    )  # fmt: skip
    _, masks = read(series, drawn(series, theirs, ["a"]))
    assert np.array_equal(masks["a"], mask_of())


def test_a_box_smaller_than_the_image(series: Path) -> None:
    affine = read_dicom(series).affine_in("LPS").copy()
    affine[:3, 3] += affine[:3, :3] @ [1, 3, 2]
    box = mask_of()[1:4, 3:9, 2:7]
    theirs = highdicom.Volume(np.ascontiguousarray(box.astype(np.uint8)), affine, "PATIENT")
    _, masks = read(series, drawn(series, theirs, ["a"]))
    expected = np.zeros(STACK.shape, bool)
    expected[1:4, 3:9, 2:7] = box
    assert np.array_equal(masks["a"], expected)


def test_another_grid_is_refused_or_resampled(series: Path) -> None:
    affine = read_dicom(series).affine_in("LPS").copy()
    half = affine @ np.diag([1, 0.5, 0.5, 1])
    half[:3, 3] -= half[:3, :3] @ [0, 0.5, 0.5]
    fine = mask_of().repeat(2, 1).repeat(2, 2)
    theirs = highdicom.Volume(fine.astype(np.uint8), half, "PATIENT")
    segmentation = drawn(series, theirs, ["a"])
    with pytest.raises(InputError, match=r"another grid than the image: its voxels are .*resample"):
        read(series, segmentation)
    volume, masks = read(series, segmentation, resampled=True)
    assert np.array_equal(masks["a"], mask_of())
    assert "was resampled" in " ".join(volume.notes)


def test_another_frame_of_reference_is_refused_and_another_series_of_it_named(
    tmp_path: Path, series: Path
) -> None:
    write_series(tmp_path / "o", STACK)
    with pytest.raises(InputError, match="another frame of reference"):
        read(series, drawn(tmp_path / "o", mask_of().astype(np.uint8), ["a"]))
    reference = sources(series)[0].FrameOfReferenceUID
    for path in (tmp_path / "o").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.FrameOfReferenceUID = reference
        dataset.save_as(path)
    volume, masks = read(series, drawn(tmp_path / "o", mask_of().astype(np.uint8), ["a"]))
    assert np.array_equal(masks["a"], mask_of())
    assert "other images of the same frame of reference" in " ".join(volume.notes)


def test_labels_that_repeat_or_are_no_names(series: Path) -> None:
    planes = np.stack([mask_of(n) for n in range(4)], axis=-1).astype(np.uint8)
    segmentation = drawn(series, planes, ["Node", "GTV/1", "Node", "GTV-1"])
    _, masks = read(series, segmentation)
    assert list(masks) == ["Node", "GTV-1", "GTV-1 4"]
    assert np.array_equal(masks["Node"], mask_of(0) | mask_of(2))
    _, apart = read(series, segmentation, by_number=True)
    assert list(apart) == ["Node 1", "GTV-1", "Node 3", "GTV-1 4"]


def test_deflated_as_dcmqi_can_write(series: Path) -> None:
    segmentation = drawn(series, mask_of().astype(np.uint8), ["a"])
    segmentation.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    _, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], mask_of())


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_compressed_fractions(series: Path, syntax: str) -> None:
    values = np.random.default_rng(1).random(STACK.shape).astype(np.float32)
    segmentation = drawn(
        series, values, ["a"], "FRACTIONAL", fractional_type="PROBABILITY",
        transfer_syntax_uid=syntax,
    )  # fmt: skip
    _, masks = read(series, segmentation)
    assert np.array_equal(masks["a"], np.around(values * 255) >= 127.5)


def test_one_slice_of_one_image(tmp_path: Path) -> None:
    write_series(tmp_path / "one", STACK[:1])
    mask = mask_of()[:1]
    _, masks = read(tmp_path / "one", drawn(tmp_path / "one", mask.astype(np.uint8), ["a"]))
    assert np.array_equal(masks["a"], mask)


def test_a_reference_to_a_whole_multi_frame_object_says_no_frame(tmp_path: Path) -> None:
    """Its frames are on their own planes, and the flag is no contradiction of that."""
    array = STACK.astype(np.int16)
    path = write_multi_frame(tmp_path / "m.dcm", array, [4, 2, 0, 1, 3])
    image = pydicom.dcmread(path)
    stored = mask_of()[[4, 2, 0, 1, 3]].astype(np.uint8)
    segmentation = drawn(path, stored, ["a"], images=[image])
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
    _, masks = read(path, segmentation)
    assert np.array_equal(masks["a"], mask_of())


def test_more_masks_than_fit_are_refused_with_a_figure(
    series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.random.default_rng(1).integers(0, 31, STACK.shape).astype(np.uint8)
    segmentation = drawn(series, labels, [f"s{n}" for n in range(1, 31)], "LABELMAP")
    assert len(read(series, segmentation)[1]) == 30
    monkeypatch.setenv("RECALLSEG_MAX_BYTES", str(20 * STACK.size))
    with pytest.raises(InputError, match="GiB of pixels"):
        read(series, segmentation)


def test_a_segment_that_is_not_described_is_refused(series: Path) -> None:
    segmentation = drawn(series, mask_of().astype(np.uint8), ["a"])
    segmentation.SegmentSequence[0].SegmentNumber = 9
    with pytest.raises(InputError, match="segment 1, which is not described"):
        read(series, segmentation)
