"""Libraries that the first edition made, and bundles of its format, as they lie on people's disks.

``first-edition.zip`` was made by the first edition with its demo bundle (fp32, one core of x86-64):
a library of two discs, an image that it segmented with k = 2, and the mask that came out.
``demo-format-1.json`` is the manifest that the demo bundle had then; its graphs are the same.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle
from support.former_bundle import write_former

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.errors import BundleError, LibraryMismatchError

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
DIGEST = "ad49bbdd1eac78092e1fbf85c394af76426654d72a056119a7c0675bff53b15d"
"""Of the library, as records of the first edition cite it."""
FORMER = "e4ae56aaf273f4eed75a4cc3127087daae8a74f0839a4d9b8579960635a108ae"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with zipfile.ZipFile(FIXTURES / "libraries" / "first-edition.zip") as archive:
        archive.extractall(tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture
def format_1(tmp_path: Path) -> Bundle:
    manifest = json.loads((FIXTURES / "bundles" / "demo-format-1.json").read_text())
    return write_former(Bundle.open("demo"), tmp_path / "demo", manifest)


@pytest.mark.parametrize("bundle", [None, "demo"])
def test_a_library_of_the_first_edition_is_used_as_it_was(folder: Path, bundle: str | None) -> None:
    with np.load(folder / "query.npz") as query, Library.open(folder, bundle) as library:
        assert library.bundle_identity == FORMER != library.bundle.identity
        assert FORMER in library.bundle.former_identities
        result = Segmenter(library, k=2).segment(query["image"])
        assert np.array_equal(result.masks["disc"], query["mask"])
        assert library.verify().ok


def test_it_can_be_added_to_and_calls_itself_anew_when_rebuilt(folder: Path) -> None:
    with Library.open(folder, "demo", mode="write") as library:
        image, masks = library.source("first")
        library.add(image[::-1].copy(), {"disc": masks["disc"][::-1].copy()})
        assert len(library) == 3
        assert library.bundle_identity == FORMER
        before = library.digest
        library.rebuild()
        assert library.bundle_identity == library.bundle.identity
        assert library.digest == before
        assert library.verify().ok


def test_what_it_never_recorded_is_unrecorded_and_its_digest_is_kept(folder: Path) -> None:
    with Library.open(folder, "demo", mode="write") as library:
        assert library.origins == ((None, 2),)
        image, masks = library.source("first")
        result = Segmenter(library, k=2).segment(image)
        assert result.provenance.library_digest == library.digest == DIGEST
        assert result.provenance.to_json()["memories"] == [{"origin": "unrecorded", "exemplars": 2}]
        assert result.quality.flag == "uncalibrated"
        key = library.add(image[::-1].copy(), {"disc": masks["disc"][::-1].copy()})
        [(origin, count), unrecorded] = library.origins
        assert origin is not None
        assert (origin.engine, origin.precision, count) == ("onnxruntime-cpu", "fp32", 1)
        assert unrecorded == (None, 2)
        library.remove(key)
        assert library.digest == DIGEST
        assert library.origins == ((None, 2),)


def test_a_bundle_of_format_1_still_opens_and_still_says_the_same(
    folder: Path, format_1: Bundle
) -> None:
    assert format_1.identity == FORMER
    assert format_1.former_identities == ()
    assert format_1.no_memory is None
    assert format_1.geometry == Bundle.open("demo").geometry
    assert format_1.segmenter.architecture == "sam2.1-hiera-custom"
    assert format_1.embedder.architecture == "dinov2-custom"
    with np.load(folder / "query.npz") as query, Library.open(folder, format_1) as library:
        result = Segmenter(library, k=2).segment(query["image"])
        assert np.array_equal(result.masks["disc"], query["mask"])
    assert result.provenance.recipe.bundle_identity == FORMER


def test_a_new_library_does_not_open_with_the_older_bundle_and_is_told_why(
    tmp_path: Path, format_1: Bundle
) -> None:
    Library.create(tmp_path / "new", "demo").close()
    with pytest.raises(LibraryMismatchError, match=r"weights are the same, export them again"):
        Library.open(tmp_path / "new", format_1)


def test_what_was_calibrated_under_a_former_identity_stays_in_force(
    tmp_path: Path, format_1: Bundle
) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(100, 10, (96, 96))
    mask = np.zeros((96, 96), bool)
    mask[30:60, 40:75] = True
    image[mask] += 80
    place = tmp_path / "library"
    with Library.create(place, format_1) as library:
        for _ in range(6):
            library.add(image + rng.normal(0, 3, image.shape), {"disc": mask})
        before = Segmenter(library, k=2).calibrate()
    with Library.open(place, "demo", mode="write") as library:
        assert library.bundle.identity != FORMER == library.bundle_identity
        segmenter = Segmenter(library, k=2)
        quality = segmenter.segment(image).quality
        assert quality.calibrated == {"disc": (6, 6)}
        assert quality.mend == ""
        other = Segmenter(library, k=3).segment(image).quality
        assert (other.flag, dict(other.calibrated)) == ("uncalibrated", {})
        assert "calibrated for other settings" in other.mend
        # Under today's identity it stands beside that one, and counts before it.
        assert segmenter.calibrate().keys() == before.keys()
        assert len(library.calibrations) == 2
        name = f"calibration {segmenter.recipe.digest} disc"
        library._store.catalog.set_note(name, "{}")
        assert "damaged" in segmenter.segment(image).quality.mend
    with Library.open(place, format_1) as library:  # which older programs still read
        assert Segmenter(library, k=2).segment(image).quality.calibrated == {"disc": (6, 6)}


def test_other_weights_are_refused_whatever_they_were_called(tmp_path: Path) -> None:
    former = make_fake_bundle(tmp_path / "former", weights_digest="1" * 64)
    heir = make_fake_bundle(
        tmp_path / "heir", weights_digest="2" * 64, former=[("1" * 64, "1" * 64)]
    )
    other = make_fake_bundle(tmp_path / "other", weights_digest="3" * 64)
    with Library.create(tmp_path / "library", heir, engine="fake") as library:
        assert not former.known_as(library.bundle_identity)
    with pytest.raises(LibraryMismatchError, match=heir.identity[:12]):
        Library.open(tmp_path / "library", other)
    # A list that names another identity than these weights had is no proof of anything.
    file = heir.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["former_identities"][0]["identity"] = other.identity
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"states former identity {other.identity[:12]}"):
        Library.open(tmp_path / "library", heir.path)
