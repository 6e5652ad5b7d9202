"""What a user may import from ``recallseg``, and that examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

import recallseg
from recallseg import errors
from recallseg.runtime.formats.pairs import Annotated

MODULES_WITH_EXAMPLES = (
    "recallseg",
    "recallseg.errors",
    "recallseg.runtime.arrays",
    "recallseg.runtime.formats.images",
    "recallseg.runtime.library.exemplar_door",
    "recallseg.runtime.library.upkeep_door",
    "recallseg.runtime.volumes.writing",
)


def test_every_public_name_is_there() -> None:
    wanted = {
        *("Bundle", "Model", "Library", "Segmenter", "Recipe", "Provenance", "Result", "Score"),
        *("Stream", "Frame", "Volume", "Intensity", "GpuOptions", "open_device", "read_image"),
        *("read_volume", "segment_volume", "write_segmentation", "import_exemplars"),
        *("evaluate", "errors"),
        *("VolumeResult", "ImportReport", "Evaluation", "Exemplar", "Match"),  # what they return
    }
    for name in wanted:
        assert getattr(recallseg, name) is not None
        assert name in dir(recallseg)
    assert sorted(recallseg.__all__) == sorted(dir(recallseg))
    for name in recallseg.__all__:
        assert hasattr(recallseg, name)


def test_the_page_of_python_names_all_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "use" / "python.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| .* \| `.*` \|$", page, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted({*recallseg.__all__} - {"__version__"})


def test_errors_are_found_where_tracebacks_say() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert (kind.__module__, kind.__qualname__) == ("recallseg.errors", name)
    error = pickle.loads(pickle.dumps(errors.InputError("no such image")))
    assert isinstance(error, errors.InputError)
    assert recallseg.RecallSegError is errors.RecallSegError


def test_a_repr_says_where_its_class_is_found(tmp_path: Path) -> None:
    image = np.zeros((40, 40), np.uint8)
    image[10:30, 10:30] = 200
    bundle = make_fake_bundle(tmp_path / "bundle", correct=True)
    volume = recallseg.Volume(image[None], np.eye(4), "image")
    with recallseg.Library.create(tmp_path / "library", bundle, engine="fake") as library:
        library.add(image, {"square": image > 0})
        segmenter = recallseg.Segmenter(library, frames=1)
        result = segmenter.segment(image)
        made = [
            *(bundle, library, segmenter, segmenter.model, result, result.scores["square"]),
            *(result.provenance, result.provenance.recipe, library.intensity, volume),
            *(recallseg.GpuOptions(), segmenter.correct(image)),
            recallseg.segment_volume(segmenter, volume),
            *(*library, *library.search(library.embed(image), "square", 1)),
            recallseg.evaluate(library, [Annotated("half", image // 2, {"square": image > 0})]),
            recallseg.ImportReport({}, (), {}),
            recallseg.VolumeCorrections(library, volume, segmenter=segmenter),
            recallseg.Frame(0, 0.0, 0.0, None, None),
        ]
        with recallseg.Stream(segmenter, lambda frame: None) as stream:
            made.append(stream)
            told = dict.fromkeys(recallseg.__all__)
            for one in made:
                name = next(n for n in told if getattr(recallseg, n) in type(one).__mro__)
                assert repr(one).startswith(f"recallseg.{name}("), name
                told.pop(name)
    left = {name for name in told if isinstance(getattr(recallseg, name), type)}
    assert left == {"RecallSegError"}
    for value in (result, recallseg.GpuOptions()):  # under the names of former pickles
        again = pickle.loads(pickle.dumps(value))
        assert again == value
        assert type(again).__module__.startswith("recallseg.runtime.")


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"np": np, **{public: getattr(recallseg, public) for public in recallseg.__all__}}
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs=known, optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed
