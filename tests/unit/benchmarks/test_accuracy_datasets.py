from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from recallseg.benchmarks.accuracy.archives import Distribution, read_files
from recallseg.benchmarks.accuracy.datasets import load_datasets
from recallseg.benchmarks.accuracy.radiology import read_nrrd
from recallseg.engines.errors import InputError
from recallseg.runtime.reports.demo import load_slices

CONTENT = b"pixels"


def distribution(source_archive: bool, content: bytes = CONTENT) -> Distribution:
    name = "data/a.bin" if source_archive else "no_such_package/a.bin"
    digest = hashlib.sha256(content).hexdigest()
    return Distribution("no_such_package", "1.0", source_archive, {name: digest})


def write_wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_package/a.bin", CONTENT)


def test_files_of_a_wheel_and_of_a_source_archive_are_read(tmp_path: Path):
    write_wheel(tmp_path)
    assert read_files(distribution(False), tmp_path) == {"no_such_package/a.bin": CONTENT}
    with tarfile.open(tmp_path / "no_such_package-1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("no_such_package-1.0/data/a.bin")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    assert read_files(distribution(True), tmp_path) == {"data/a.bin": CONTENT}


def test_other_pixels_than_expected_are_refused(tmp_path: Path):
    write_wheel(tmp_path)
    with pytest.raises(InputError, match="is not the file"):
        read_files(distribution(False, b"others"), tmp_path)


@pytest.mark.parametrize("source_archive", [False, True])
def test_a_missing_distribution_says_how_to_fetch_it(tmp_path: Path, source_archive: bool):
    for folder in (None, tmp_path):
        with pytest.raises(InputError, match="pip download --no-deps") as raised:
            read_files(distribution(source_archive), folder)
        assert ("--no-binary" in str(raised.value)) is source_archive


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_nrrd_is_decoded_as_slice_row_column(encoding: str, endian: str):
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    raw = volume.astype("<i2" if endian == "little" else ">i2").tobytes()
    head = (
        "NRRD0004\n# a comment: with a colon\ntype: short\ndimension: 3\nsizes: 4 3 2\n"
        f"space directions: (0.5,0,0) (0,0.5,0) (0,3,4)\nendian: {endian}\nencoding: {encoding}\n\n"
    )
    decoded, thickness = read_nrrd(
        head.encode() + (gzip.compress(raw) if encoding == "gzip" else raw)
    )
    assert np.array_equal(decoded, volume)
    assert thickness == 5.0


def test_what_is_not_nrrd_is_refused():
    with pytest.raises(InputError, match="not an NRRD"):
        read_nrrd(b"PNG\n\n")
    with pytest.raises(InputError, match="not read here"):
        read_nrrd(b"NRRD0004\ntype: block\nencoding: raw\nsizes: 1\n\n")


def test_the_axial_protocol_is_that_of_the_demo():
    pytest.importorskip("nilearn")
    pytest.importorskip("nibabel")
    (dataset,), _ = load_datasets(["mni-axial"], None)
    slices = load_slices()
    for mine, demos in ((dataset.exemplars, slices.exemplars), (dataset.queries, slices.queries)):
        assert len(mine) == len(demos)
        for one, other in zip(mine, demos, strict=True):
            assert np.array_equal(one.image, other.image)
            assert set(one.masks) == set(other.masks)
            assert all(np.array_equal(one.masks[name], other.masks[name]) for name in one.masks)
    annotated = [dataset.positions[image.name] for image in dataset.annotated(32)]
    asked = [dataset.positions[image.name] for image in dataset.queries]
    assert min(abs(a - q) for a in annotated for q in asked) >= 2.0
    assert set(dataset.targets) == set(dataset.structures)
