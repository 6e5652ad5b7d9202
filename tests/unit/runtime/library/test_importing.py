"""Import: resumable, idempotent, and one bad file loses nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.pictures import LABELS, disc, write_pairs

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.pairs import find_pairs, parse_labels
from recallseg.runtime.library import Library, batches
from recallseg.runtime.library.identifying import is_random_key
from recallseg.runtime.library.importing import (
    import_annotated,
    import_exemplars,
    import_pairs,
)

POSITIONS = [0.1, 0.3, 0.5, 0.7]
NAMES = [f"disc-{position:.2f}" for position in POSITIONS]


def test_interrupted_then_resumed(
    fake_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LEAST_BATCH", 2)
    write_pairs(tmp_path / "pairs", POSITIONS)
    pairs, labels = find_pairs(tmp_path / "pairs").pairs, parse_labels(LABELS)

    def interrupt(name: str) -> None:
        if name == NAMES[1]:
            raise KeyboardInterrupt

    with (
        Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library,
        pytest.raises(KeyboardInterrupt),
    ):
        import_pairs(library, pairs, labels, progress=interrupt)
    with Library.open(tmp_path / "lib", mode="write", engine="fake") as library:
        assert len(library) == 2
        report = import_pairs(library, pairs, labels, tags={"modality": "MR"})
        assert report.skipped == tuple(NAMES[:2])
        assert list(report.added) == NAMES[2:]
        assert all(is_random_key(key) for key in report.added.values())
        assert [library.whois(key).name for key in report.added.values()] == NAMES[2:]
        assert library.get(report.added[NAMES[3]]).tags == {"modality": "MR"}
        assert import_pairs(library, pairs, labels).skipped == tuple(NAMES)
        assert len(library) == 4


def test_what_is_retired_does_not_come_back_by_an_import(
    fake_bundle: Bundle, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs", POSITIONS)
    pairs, labels = find_pairs(tmp_path / "pairs").pairs, parse_labels(LABELS)
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        added = import_pairs(library, pairs, labels).added
        library.retire([added[NAMES[1]]])
        report = import_pairs(library, pairs, labels)
        assert (report.added, report.skipped) == ({}, tuple(NAMES))
        assert len(library) == 3
        assert list(report.notes) == [NAMES[1]]
        assert f"'{added[NAMES[1]]}', which is retired" in report.notes[NAMES[1]][0]
        library.reinstate([added[NAMES[1]]])
        assert import_pairs(library, pairs, labels).notes == {}


def test_many_are_added_in_few_commits(fake_bundle: Bundle, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [i / 40 for i in range(40)])
    pairs, labels = find_pairs(tmp_path / "pairs").pairs, parse_labels(LABELS)
    told: list[str] = []
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        report = import_pairs(library, pairs, labels, key="{number}", progress=told.append)
        assert [*report.added] == told == [pair.name for pair in pairs]
        assert [exemplar.key for exemplar in library] == [str(i + 1) for i in range(40)]
        assert len([*library.history()]) < 10


def test_one_that_cannot_be_added_is_named_and_stops_no_other(
    fake_bundle: Bundle, tmp_path: Path
) -> None:
    """The key is taken twice, and a picture comes twice, all within what is added at once."""
    names, places = ["x", "y", "x", "y again", "late"], [0.1, 0.2, 0.3, 0.2, 0.5]
    sources = [(name, partial(disc, at)) for name, at in zip(names, places, strict=True)]
    told: list[str] = []
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        report = import_annotated(library, sources, key="{name}", progress=told.append)
        assert [exemplar.key for exemplar in library] == ["x", "y", "late"]
        assert told == names
        assert report.skipped == ("y again",)
        assert "already has an exemplar 'x'" in report.failed["x"]
        assert "items[" not in report.failed["x"]
        sources = [("a", partial(disc, 0.6)), ("x", partial(disc, 0.7))]
        with pytest.raises(InputError, match="an exemplar 'x'"):
            import_annotated(library, sources, key="{name}", strict=True)
        assert "a" in library


def test_other_masks_for_a_name_that_is_there(fake_bundle: Bundle, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", POSITIONS[:1])
    pairs = find_pairs(tmp_path / "pairs").pairs
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        import_pairs(library, pairs, {1: "disc", 2: "core"}, key="{name}")
        assert [exemplar.key for exemplar in library] == NAMES[:1]
        report = import_pairs(library, pairs, {1: "ring", 2: "core"})
        assert len(library) == 2
        assert report.added[NAMES[0]] != NAMES[0]


def test_a_bad_file(fake_bundle: Bundle, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", POSITIONS)
    (tmp_path / "pairs" / f"{NAMES[1]}.png").write_bytes(b"no image")
    pairs, labels = find_pairs(tmp_path / "pairs").pairs, parse_labels(LABELS)
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        with pytest.raises(InputError, match=NAMES[1]):
            import_pairs(library, pairs, labels, strict=True)
        assert len(library) == 1
        report = import_pairs(library, pairs, labels)
        assert list(report.failed) == [NAMES[1]]
        assert len(library) == 3


def test_a_folder_is_enough(fake_bundle: Bundle, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", POSITIONS[:2])
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        labels = parse_labels(LABELS)
        report = import_exemplars(library, tmp_path / "pairs", labels=labels, key="disc {number}")
        assert report.added == {NAMES[0]: "disc 1", NAMES[1]: "disc 2"}
        with pytest.raises(InputError, match=r"must have \{name\} or \{number\}, got 'disc'"):
            import_exemplars(library, tmp_path / "pairs", labels=labels, key="disc")


def test_from_python_it_takes_what_the_command_takes(fake_bundle: Bundle, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    drawn = np.zeros((40, 40, 6), np.uint8)
    drawn[10:30, 10:30] = 1
    voxels = np.random.default_rng(0).integers(0, 200, drawn.shape).astype(np.int16)
    for folder, name, array in (("images", "a.nii.gz", voxels), ("masks", "a.nii.gz", drawn)):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / folder / name)
    image, mask = (tmp_path / folder / "a.nii.gz" for folder in ("images", "masks"))
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        report = import_exemplars(
            library, image, labels={1: "box"}, mask=mask, slices="every:2", plane="axial"
        )
        assert len(report.added) == 3
        assert not report.failed
        found = find_annotations(image, mask)
        for wrong, why in (
            ({"slices": "some"}, "slices must read all, every:5"),
            ({"segments": "apart"}, "segments must be one of union, by-number"),
            ({"mask": mask}, "has its masks already"),
        ):
            with pytest.raises(InputError, match=why):
                import_exemplars(library, found, labels={1: "box"}, **wrong)
        assert len(library) == 3
