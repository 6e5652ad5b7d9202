"""Probabilities say what masks say, pixel by pixel, for as long as a result promises."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

from recallseg import Library, Result, Segmenter, Volume, segment_volume
from recallseg.engines.errors import InputError, StaleViewError
from recallseg.engines.pixels.opencv import resize_plane
from recallseg.runtime.library.choices import Choice
from recallseg.runtime.library.heads import Head

STRUCTURES = ("disc", "core")


def picture(seed: int, shape: tuple[int, int] = (90, 71)) -> tuple[np.ndarray, dict]:
    """A noisy disc with a bright core, and the masks of both."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / min(shape)
    distance = np.hypot(*(grid - rng.uniform(0.4, 0.6) for grid in (y, x)))
    masks = {"disc": distance < 0.3, "core": distance < 0.12}
    image = 40 + 80 * masks["disc"] + 80 * masks["core"] + rng.normal(0, 6, shape)
    return image.clip(0, 255).astype(np.uint8), masks


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    with Library.create(tmp_path_factory.mktemp("l") / "library", "demo") as made:
        for seed in range(3):
            made.add(*picture(seed))
        yield made


def check(result: Result) -> None:
    for name, probability in result.probabilities.items():
        assert probability.dtype == np.float32
        assert probability.shape == result.label_map.shape
        assert 0 <= probability.min() <= probability.max() <= 1
        if result.scores[name].present:
            np.testing.assert_array_equal(probability >= 0.5, result.masks[name])
            # The mask decides only what rounding leaves open: nothing is bent to it.
            plain = 1 / (1 + np.exp(-resize_plane(result.logits[name], probability.shape)))
            np.testing.assert_allclose(probability, plain, atol=3e-4)


@pytest.mark.parametrize("pixels", ["opencv", "native"])
@pytest.mark.parametrize("shape", [(90, 71), (20, 300), (32, 32), (41, 23)])
def test_a_mask_is_where_its_probability_is_a_half_or_more(
    library: Library, shape: tuple[int, int], pixels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", pixels)
    segmenter = Segmenter(library, structures=STRUCTURES)
    for seed in (10, 11):
        result = segmenter.segment(picture(seed, shape)[0])
        assert result.masks["disc"].any()
        assert [*result.probabilities] == [*STRUCTURES]
        check(result)
    with pytest.raises(KeyError):
        result.probabilities["liver"]


def test_a_logit_at_the_threshold_follows_the_mask(library: Library) -> None:
    image = picture(10)[0]
    result = Segmenter(library).segment(image, keep_logits=True)
    for tiny in (0.0, 1e-9, -1e-9):
        plane = np.full_like(result.logits["disc"], tiny)
        found = Result(**{**vars(result), "logits": {"disc": plane}}).probabilities["disc"]
        np.testing.assert_array_equal(found >= 0.5, result.masks["disc"])
        assert np.abs(found - 0.5).max() < 1e-6


def test_logits_are_the_models_until_it_looks_again(library: Library) -> None:
    segmenter = Segmenter(library)
    result = segmenter.segment(picture(10)[0])
    kept = segmenter.segment(picture(10)[0], keep_logits=True)
    with pytest.raises(StaleViewError, match="seen another image since"):
        result.probabilities["disc"]
    assert kept == result  # what is kept beside makes no other result
    expected = kept.probabilities["disc"]
    segmenter.segment(picture(11)[0])
    np.testing.assert_array_equal(kept.probabilities["disc"], expected)
    assert kept.logits["disc"].nbytes == 4 * segmenter.bundle.geometry.logit_size**2
    check(kept)


def test_a_result_keeps_no_model_alive(library: Library) -> None:
    segmenter = Segmenter(library)
    result = segmenter.segment(picture(10)[0])
    del segmenter
    gc.collect()
    with pytest.raises(StaleViewError, match="keep_logits=True"):
        result.probabilities["disc"]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_kept_logits_are_pickled_and_others_are_left_out(library: Library, way) -> None:  # type: ignore[no-untyped-def]
    segmenter = Segmenter(library)
    kept = segmenter.segment(picture(10)[0], keep_logits=True)
    again = way(kept)
    assert again == kept
    np.testing.assert_array_equal(again.probabilities["core"], kept.probabilities["core"])
    without = way(segmenter.segment(picture(10)[0]))
    assert without == kept
    with pytest.raises(InputError, match="keep_logits=True"):
        without.probabilities["core"]


def test_a_list_of_images_keeps_them_where_asked(library: Library) -> None:
    segmenter = Segmenter(library)
    results = segmenter.segment_many([picture(i)[0] for i in (10, 11)], keep_logits=True)
    for result in results:
        check(result)


def test_slices_of_a_volume_have_them_while_they_are_handed_over(library: Library) -> None:
    volume = Volume(np.stack([picture(i)[0] for i in (10, 11, 12)]), np.eye(4), "image")
    found = np.zeros(volume.shape, np.float32)
    slices = iter(found)

    def keep(pixels: np.ndarray, result: Result) -> None:
        check(result)
        next(slices)[:] = result.probabilities["disc"]

    made = segment_volume(Segmenter(library), volume, on_slice=keep)
    np.testing.assert_array_equal(found >= 0.5, made.mask("disc"))


def test_of_what_nothing_was_recalled_for_they_are_zero(tmp_path: Path) -> None:
    with Library.create(tmp_path / "library", "demo") as library:
        image, masks = picture(0)
        library.add(image, {"disc": masks["disc"]}, absent=("core",))
        other, known = picture(1)
        key = library.add(other, known)
        result = Segmenter(library).segment(image, without=(key,), keep_logits=True)
        assert not result.scores["core"].present
        assert not result.probabilities["core"].any()
        check(result)


def test_a_head_that_finds_too_little_leaves_the_mask_empty(library: Library) -> None:
    segmenter = Segmenter(library, structures=STRUCTURES)
    with Library.create(library.path.parent / "with a head", "demo") as own:
        for seed in range(3):
            own.add(*picture(seed))
        from recallseg.engines.heads import REFINE, feature_count, graph_digest

        shapes = [(32, feature_count(2)), (32,), (16, 32), (16,), (2, 16), (2,)]
        units = tuple(np.zeros(shape, np.float32) for shape in shapes)
        choices = {
            "disc": Choice(0.5, 0.0, 0.5, 0.6, 0.0, 0.2, 3),
            "core": Choice(0.5, 0.9, 0.5, 0.6, 0.0, 0.2, 3),  # at least 90 % of the image
        }
        numbers = {i: i for i in range(1, 4)}
        own.heads.store(
            Head(
                STRUCTURES, choices, units, (), dict.fromkeys(numbers, 0), numbers, "exemplars",
                {}, own.generation, graph_digest(REFINE), "2026-01-01T00:00:00+00:00", own.newest,
                len(own),
            )
        )  # fmt: skip
        refined = Segmenter(own, structures=STRUCTURES)
        image = picture(10)[0]
        result = refined.segment(image)
        assert result.provenance.recipe.head
        assert result.logits["disc"].shape == image.shape
        check(result)
        assert not result.scores["core"].present
        assert not result.masks["core"].any()
        assert (result.probabilities["core"] >= 0.5).any()  # as the docstring says
        assert segmenter.segment(image).logits["disc"].shape != image.shape


def test_what_a_person_corrected_has_them_too(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", correct=True)
    with Library.create(tmp_path / "library", bundle, engine="fake") as library:
        library.add(*picture(0))
        segmenter = Segmenter(library, k=1)
        session = segmenter.correct(picture(0)[0])
        drawn = np.zeros((90, 71), bool)
        drawn[3:5, 7] = True
        result = session.draw("new", drawn)
        result = session.click("disc", 5, 5)
        segmenter.segment(picture(1)[0])  # takes nothing from the session's results
        check(result)
        np.testing.assert_array_equal(result.probabilities["new"] >= 0.5, drawn)
        assert pickle.loads(pickle.dumps(result)).probabilities["new"].max() > 0.999
