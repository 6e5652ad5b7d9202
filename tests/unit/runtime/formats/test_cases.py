"""Files that people have, from public reports: each read, and laid, as it is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    annotated_slices,
    read_annotated_volume,
)
from recallseg.runtime.formats.dicom_seg_reading import is_segmentation
from recallseg.runtime.formats.nifti import read_nifti, write_nifti
from recallseg.runtime.formats.nrrd import read_seg_nrrd
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.formats.volume import Slicing, Volume

FILES = Path(__file__).parents[3] / "fixtures" / "files"
CT = FILES / "common" / "ct"
AREAS = [22, 37, 58, 83]  # of the disc, at 0, 3, 6 and 9 mm


def areas(volume: Volume, mask: np.ndarray) -> dict[float, int]:
    """Pixels of a mask by the height, in mm towards the head, that they lie at."""
    index = np.argwhere(mask)
    z = (index @ volume.affine_in("LPS")[:3, :3].T + volume.affine_in("LPS")[:3, 3])[:, 2]
    heights, counts = np.unique(np.round(z, 3), return_counts=True)
    return dict(zip(heights.tolist(), counts.tolist(), strict=True))


def assert_on_the_disc(volume: Volume, mask: np.ndarray) -> None:
    assert areas(volume, mask) == dict(zip([0.0, 3.0, 6.0, 9.0], AREAS, strict=True))
    inside, outside = volume.array[mask].mean(), volume.array[~mask].mean()
    assert inside > outside + 100


@pytest.mark.parametrize(
    ("image", "mask", "labels", "structure"),
    [
        (CT, "seg-fractional/prob.seg.dcm", None, None),
        (CT, "seg-labelmap/labelmap.seg.dcm", None, None),
        (CT, "seg-without-spatial-locations-flag/slicer.seg.dcm", None, None),
        (CT, "slicer-segnrrd-on-dicom/slicer.seg.nrrd", None, "disc"),
        (CT, "label-with-slash/s.seg.dcm", None, "GTV-primary"),
        ("multiframe-descending/scan.dcm", "multiframe-descending/scan.seg.dcm", None, None),
        ("nifti-mask-reoriented/scan.nii.gz", "nifti-mask-reoriented/canonical.nii.gz",
         {1: "disc"}, "disc"),
    ],
)  # fmt: skip
def test_a_mask_lies_where_its_own_positions_say(
    image: str, mask: str, labels: dict[int, str] | None, structure: str | None
) -> None:
    volume, masks = read_annotated_volume(FILES / image, FILES / mask, labels)
    assert len(masks) == 1
    name, found = next(iter(masks.items()))
    assert structure in (None, name)
    assert_on_the_disc(volume, found)
    for each in annotated_slices(volume, masks, "v", SliceChoice()):
        assert each.image[each.masks[name]].mean() > 240


def test_a_mirrored_segmentation_that_contradicts_itself_is_refused() -> None:
    """Its frames lie at the heights of other images than those whose place they say they kept."""
    path = FILES / "seg-mirrored-grid" / "mirrored.seg.dcm"
    with pytest.raises(InputError, match=r"contradicts itself: a frame lies [39]\.0 mm off"):
        read_annotated_volume(CT, path, None)


def test_a_mirrored_segmentation_lies_where_its_positions_say(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(FILES / "seg-mirrored-grid" / "mirrored.seg.dcm")
    groups = dataset.PerFrameFunctionalGroupsSequence
    heights = [float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups]
    for group, height in zip(groups, reversed(heights), strict=True):
        group.PlanePositionSequence[0].ImagePositionPatient = [23.0, 0.0, height]
    dataset.save_as(tmp_path / "mirrored.seg.dcm")
    volume, masks = read_annotated_volume(CT, tmp_path / "mirrored.seg.dcm", None)
    assert_on_the_disc(volume, next(iter(masks.values())))


def test_a_fractional_segmentation_says_its_threshold() -> None:
    volume, _ = read_annotated_volume(CT, FILES / "seg-fractional" / "prob.seg.dcm", None)
    assert any("0.5 of its maximum" in note for note in volume.notes)


def test_two_segments_of_one_label_are_one_structure_or_two() -> None:
    path = FILES / "seg-two-lesions-one-label" / "two.seg.dcm"
    volume, masks = read_annotated_volume(CT, path, None)
    assert list(masks) == ["Lesion"]
    _, apart = read_annotated_volume(CT, path, None, by_number=True)
    assert list(apart) == ["Lesion 1", "Lesion 2"]
    one, two = apart.values()
    assert one.any()
    assert two.any()
    assert not (one & two).any()
    assert np.array_equal(masks["Lesion"], one | two)
    assert any("segments 1, 2 are one structure" in note for note in volume.notes)


@pytest.mark.parametrize("path", ["seg-labelmap/labelmap.seg.dcm", "seg-fractional/prob.seg.dcm"])
def test_a_segmentation_is_no_image(path: str) -> None:
    assert is_segmentation(FILES / path)
    with pytest.raises(InputError, match="segmentation"):
        read_volume(FILES / path)


def test_frames_are_ordered_by_position() -> None:
    volume = read_volume(FILES / "multiframe-descending" / "scan.dcm")
    assert areas(volume, volume.array > 200) == dict(zip([0.0, 3.0, 6.0, 9.0], AREAS, strict=True))


def test_tables_of_functional_groups_are_applied() -> None:
    volume = read_volume(FILES / "enhanced-voi" / "scan.dcm")
    stored = (volume.array + 1000) / 2
    assert (stored == np.rint(stored)).all()
    assert volume.window == (-600.0, 200.0)
    shown = read_volume(FILES / "enhanced-voi" / "scan.dcm", voi=True).array
    assert (shown[volume.array <= -700] == shown.min()).all()
    assert (shown[volume.array >= -500] == shown.max()).all()
    assert len(np.unique(shown)) > 1


def test_one_slice_is_cut_as_what_it_is() -> None:
    volume = read_volume(FILES / "one-sagittal-slice" / "slice.dcm")
    slicing = Slicing.of(volume)
    assert (slicing.plane, slicing.count(volume)) == ("sagittal", 1)
    assert slicing.view(volume.array, 0).shape == (24, 24)
    with pytest.raises(InputError, match="single sagittal slice"):
        Slicing.of(volume, "axial")


def test_time_points_are_no_colours() -> None:
    path = FILES / "nifti-three-time-points" / "dyn.nii.gz"
    with pytest.raises(InputError, match="series of 3 volumes"):
        read_volume(path)
    assert read_volume(path, time=3).array.ndim == 3


def test_qform_and_sform_are_both_kept(tmp_path: Path) -> None:
    import nibabel

    path = FILES / "nifti-sform-qform-disagree" / "scan.nii.gz"
    volume = read_nifti(path)
    assert any("sform and qform" in note for note in volume.notes)
    write_nifti(tmp_path / "m.nii.gz", np.ones(volume.shape, np.uint8), volume)
    source, written = nibabel.load(path).header, nibabel.load(tmp_path / "m.nii.gz").header
    for one, other in (
        (source.get_sform(coded=True), written.get_sform(coded=True)),
        (source.get_qform(coded=True), written.get_qform(coded=True)),
    ):
        assert np.array_equal(one[0], other[0])
        assert one[1] == other[1]
    assert written.get_sform()[:3, 3].tolist() == [30, 10, -20]
    assert written.get_qform()[:3, 3].tolist() == [0, 0, 0]


def test_padding_is_no_measurement() -> None:
    plain, padded = read_volume(CT), read_volume(FILES / "pixel-padding" / "scan")
    assert plain.array.min() == padded.array.min()
    assert padded.array.min() > -2000
    assert areas(padded, padded.array > 200) == areas(plain, plain.array > 200)
    assert any("padding" in note for note in padded.notes)


def test_rounded_positions_are_one_stack() -> None:
    volume = read_volume(FILES / "rounded-positions" / "scan")
    assert volume.shape[0] == 4
    assert volume.spacing[0] == pytest.approx(0.625)  # as SliceThickness states
    assert any("rounded" in note for note in volume.notes)


def test_a_file_without_preamble_is_read() -> None:
    volume = read_volume(FILES / "no-preamble" / "scan")
    assert volume.shape == (2, 24, 24)


def test_a_palette_of_sixteen_bits_with_low_entries_is_not_black() -> None:
    array = read_volume(FILES / "palette-16-bit-low-entries" / "us.dcm").array
    assert array.shape == (1, 24, 24, 3)
    assert array.dtype == np.uint8
    assert array.max() > 200


def test_components_of_an_old_segmentation_are_its_segments() -> None:
    folder = FILES / "slicer-4.10-segnrrd"
    _, segments = read_seg_nrrd(folder / "scan.seg.nrrd")
    (one, first), (two, second) = segments
    assert (one, two) == ("one", "two")
    assert first.any()
    assert np.array_equal(np.roll(first, 10, axis=0), second)
    volume, masks = read_annotated_volume(folder / "scan.nrrd", folder / "scan.seg.nrrd", None)
    assert np.array_equal(masks["two"], second)
    assert volume.shape == second.shape
