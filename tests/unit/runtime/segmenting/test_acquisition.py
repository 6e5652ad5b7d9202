"""Scale and side travel from file to library to query, and are told where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from support.dicom_series import ORIENTATIONS, make_slice, write_picture, write_series
from support.pictures import disc

from recallseg import Bundle, Library, Segmenter
from recallseg.runtime.formats.dicom import read_dicom
from recallseg.runtime.formats.volume import SPACING_TAG, Slicing, Volume
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.volumes.slices import acquisition_of, segment_volume

PLANE = disc(0.4).image.astype(np.uint16)
MASK = disc(0.4).masks["disc"]


def segmenter(path: Path, bundle: Bundle, **tags: str) -> Segmenter:
    library = Library.create(path, bundle, engine="fake")
    library.add(PLANE, {"disc": MASK}, tags=tags)
    return Segmenter(library, k=1, engine="fake")


def reasons(path: Path, bundle: Bundle, tags: dict[str, str], **query: Any) -> tuple[str, ...]:
    result = segmenter(path, bundle, **tags).segment(PLANE, acquisition=Acquisition(**query))
    found = result.quality.reasons.get("disc", ())
    return tuple(why for why in found if "scale" in why or "mirrored" in why)


@pytest.mark.parametrize(
    ("exemplar", "query", "differs"),
    [
        ("0.5x0.5", (0.5, 0.5), False),
        ("0.5x0.5", (0.7, 0.7), False),
        ("0.5x0.5", (0.8, 0.8), True),
        ("0.5x0.5", (0.3, 0.3), True),
        ("1x0.25", (0.5, 0.5), False),  # as large a field
        ("0.5x0.5", None, False),
        (None, (0.5, 0.5), False),
        ("nonsense", (0.5, 0.5), False),
        ("0x0.5", (0.5, 0.5), False),
    ],
)
def test_scale(
    tmp_path: Path,
    fake_bundle: Bundle,
    exemplar: str | None,
    query: tuple[float, float] | None,
    differs: bool,
) -> None:
    tags = {} if exemplar is None else {SPACING_TAG: exemplar}
    found = reasons(tmp_path / "lib", fake_bundle, tags, spacing=query)
    assert bool(found) == differs
    assert all(why.startswith("another scale: 1 of 1") for why in found)


@pytest.mark.parametrize(
    ("exemplar", "query", "mirrored"),
    [
        ({"laterality": "L"}, {"laterality": "R"}, True),
        ({"laterality": "L"}, {"laterality": "L"}, False),
        ({"laterality": "B"}, {"laterality": "R"}, False),
        ({}, {"laterality": "R"}, False),
        ({"orientation": "L-F"}, {"orientation": "R-F"}, True),
        ({"orientation": "A-F"}, {"orientation": "P-F"}, True),
        ({"orientation": "A-F"}, {"orientation": "A-F"}, False),
        ({"orientation": "A-F"}, {"orientation": "L-F"}, False),
    ],
)
def test_side(
    tmp_path: Path,
    fake_bundle: Bundle,
    exemplar: dict[str, str],
    query: dict[str, str],
    mirrored: bool,
) -> None:
    assert bool(reasons(tmp_path / "lib", fake_bundle, exemplar, **query)) == mirrored


def test_areas_only_where_the_spacing_is_known(tmp_path: Path, fake_bundle: Bundle) -> None:
    asked = segmenter(tmp_path / "lib", fake_bundle)
    known = asked.segment(PLANE, acquisition=Acquisition((0.5, 0.25)))
    pixels = int(known.masks["disc"].sum())
    assert pixels
    assert known.to_json()["square_mm"] == {"disc": pytest.approx(pixels * 0.125, abs=1e-3)}
    assert asked.segment(PLANE).to_json()["square_mm"] is None


def picture(path: Path, **fields: Any) -> Volume:
    return read_dicom(write_picture(path, "1.2.3", PLANE, **fields))


def region(x: float, y: float, units: int = 3) -> Dataset:
    made = Dataset()
    made.PhysicalUnitsXDirection = made.PhysicalUnitsYDirection = units
    made.PhysicalDeltaX, made.PhysicalDeltaY = x, y
    return made


@pytest.mark.parametrize(
    ("fields", "spacing"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.3]}, [0.2, 0.3]),
        ({"PixelSpacing": [0.4, 0.4], "ImagerPixelSpacing": [0.2, 0.3]}, [0.4, 0.4]),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, [0.1, 0.1]),
        ({"SequenceOfUltrasoundRegions": [region(0.02, 0.03)]}, [0.3, 0.2]),
        ({"SequenceOfUltrasoundRegions": [region(0.02, 0.03, units=4)]}, None),  # seconds
        ({}, None),
        ({"PixelSpacing": [1.0, 1.0]}, [1.0, 1.0]),
    ],
)
def test_spacing_of_radiographs_and_ultrasound(
    tmp_path: Path, fake_bundle: Bundle, fields: dict[str, Any], spacing: list[float] | None
) -> None:
    volume = picture(tmp_path / "a.dcm", Modality="DX", **fields)
    record = segment_volume(segmenter(tmp_path / "lib", fake_bundle), volume).to_json(volume)
    assert record["spacing_mm"] == (None if spacing is None else pytest.approx(spacing))
    assert record["millilitres"] is None
    if spacing is None:
        assert record["square_mm"] is None
    else:
        wanted = record["voxels"]["disc"] * spacing[0] * spacing[1]
        assert record["square_mm"]["disc"] == pytest.approx(wanted, abs=1e-3)


def test_side_of_a_radiograph(tmp_path: Path) -> None:
    volume = picture(tmp_path / "a.dcm", PatientOrientation=["P", "F"], ImageLaterality="R")
    assert acquisition_of(volume, Slicing.of(volume)) == Acquisition(None, "R", "P-F")
    assert "orientation" not in picture(tmp_path / "b.dcm", PatientOrientation=["P"]).tags


@pytest.mark.parametrize("plane", list(ORIENTATIONS))
def test_slices_know_their_own_scale(tmp_path: Path, plane: str) -> None:
    write_series(
        tmp_path / "s", np.stack([PLANE] * 3), orientation=ORIENTATIONS[plane],
        spacing=(3.0, 0.8, 0.9), PatientOrientation=["L", "P"],
    )  # fmt: skip
    volume = read_dicom(tmp_path / "s")
    found = acquisition_of(volume, Slicing.of(volume))
    assert found.spacing == pytest.approx((0.8, 0.9))
    assert found.orientation == ""  # slices are turned upright: no side is left to differ
    assert not make_slice(PLANE).get("PatientOrientation")


def test_from_file_to_library_to_query(tmp_path: Path, fake_bundle: Bundle) -> None:
    """A radiograph with its mask beside, imported; then one of twice its size is asked for."""
    from recallseg.runtime.formats.annotated_volumes import SliceChoice
    from recallseg.runtime.formats.annotations import AnnotatedVolume
    from recallseg.runtime.formats.finding import find_inputs
    from recallseg.runtime.library.importing import import_volume

    path = write_picture(tmp_path / "a.dcm", "1.2.3", PLANE, ImagerPixelSpacing=[0.2, 0.2])
    (item,) = find_inputs([path]).items
    library = Library.create(tmp_path / "lib", fake_bundle, engine="fake")
    drawn = AnnotatedVolume(item, tmp_path / "a.mask.png")
    report = import_volume(
        library, drawn, None, SliceChoice(),
        read=lambda item, mask, labels: (read_dicom(item.path), {"disc": MASK[None]}),
    )  # fmt: skip
    (key,) = report.added.values()
    assert library.get(key).tags[SPACING_TAG] == "0.2x0.2"
    larger = picture(tmp_path / "b.dcm", ImagerPixelSpacing=[0.4, 0.4])
    result = segment_volume(Segmenter(library, k=1, engine="fake"), larger)
    assert any("another scale" in why for why in result.slices[0].reasons["disc"])
    same = segment_volume(Segmenter(library, k=1, engine="fake"), read_dicom(path))
    assert not any("scale" in why for why in same.slices[0].reasons.get("disc", ()))
