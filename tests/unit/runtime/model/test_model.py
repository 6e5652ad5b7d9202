"""One model for all who use a bundle: loaded once, shared fairly, true about state and size."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier, Event, Thread, get_ident
from time import sleep
from typing import Any
from weakref import ref

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fake_bundle import make_fake_bundle
from support.measuring import measures

from recallseg import Bundle, Library, Model, Segmenter
from recallseg.engines import errors
from recallseg.engines.buffer_shapes import buffer_shapes
from recallseg.engines.fake import FakeEngine
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.model import host
from recallseg.runtime.model.buffers import Buffers
from recallseg.runtime.model.kept_looks import Kept
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.model.turns import Turns
from recallseg.runtime.model.view import Wanted
from recallseg.runtime.reports.evaluation import evaluate

SIZE = 64
GRAPHS = ["attend", "decode", "embed", "encode", "memorize"]
INTENSITY = Intensity("range")


def picture(position: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A bright square at ``position`` (0 to 3), and its mask."""
    image = np.full((SIZE, SIZE), 20, np.uint8)
    mask = np.zeros((SIZE, SIZE), bool)
    top, left = divmod(position, 2)
    mask[32 * top : 32 * top + 32, 32 * left : 32 * left + 32] = True
    image[mask] = 200 + position
    return image, mask


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Iterator[Library]:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as made:
        for position in range(4):
            image, mask = picture(position)
            made.add(image, {"square": mask, "rest": ~mask}, key=str(position))
        yield made


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph of every engine that is made from now on."""
    names: list[str] = []
    make = FakeEngine.__init__

    def counted(self: FakeEngine, spec: Any, *rest: Any) -> None:
        names.append(spec.name)
        make(self, spec, *rest)

    monkeypatch.setattr(FakeEngine, "__init__", counted)
    return names


# One set of engines


def test_adding_and_segmenting_load_every_graph_once(
    tmp_path: Path, fake_bundle: Bundle, loaded: list[str]
) -> None:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    assert loaded == []
    image, mask = picture(0)
    library.add(image, {"square": mask})
    assert sorted(loaded) == ["embed", "encode", "memorize"]
    segmenters = [Segmenter(library, k=k) for k in (1, 2, 4)]
    for segmenter in segmenters:
        assert segmenter.segment(image).masks["square"].any()
    library.add(picture(1)[0], {"square": picture(1)[1]})
    assert sorted(loaded) == GRAPHS
    assert len({id(segmenter.model) for segmenter in segmenters}) == 1
    assert repr(segmenters[0].model).startswith("recallseg.Model(fake, fake fp32; embed, encode,")


def test_a_reader_loads_no_graph_that_only_adding_needs(
    library: Library, loaded: list[str]
) -> None:
    with Segmenter(library.path, engine="fake") as segmenter:
        segmenter.segment(picture(0)[0])
    assert "memorize" not in loaded
    assert sorted(loaded) == ["attend", "decode", "embed", "encode"]
    with pytest.raises(errors.LibraryError, match="closed"):  # it had opened it
        segmenter.segment(picture(0)[0])


def test_an_evaluation_at_several_k_loads_one_set(library: Library, loaded: list[str]) -> None:
    with Library.open(library.path, engine="fake") as reader:
        images = [
            Annotated(str(i), picture(i)[0] // 2, {"square": picture(i)[1]}, ()) for i in range(2)
        ]
        found = evaluate(reader, images, ["square"], [1, 2, 4], lambda k: Segmenter(reader, k=k))
    assert sorted(loaded) == ["attend", "decode", "embed", "encode"]
    assert found.workspace_bytes[1] < found.workspace_bytes[2] < found.workspace_bytes[4]


def test_a_model_that_nothing_uses_is_given_back(library: Library) -> None:
    reader = Library.open(library.path, engine="fake")
    first = Segmenter(reader)
    assert Segmenter(reader).model is first.model
    gone = ref(first.model)
    del first
    gc.collect()
    assert gone() is None


def test_settings_of_a_segmenter_are_the_librarys_unless_given(library: Library) -> None:
    assert Segmenter(library).engine == "fake"
    other = Segmenter(library, threads=1, engine="fake")
    alike = Segmenter(library, threads=1)
    assert other.model is alike.model
    assert Segmenter(library, threads=2).model is not other.model
    with pytest.raises(errors.InputError, match="no engine 'fast'"):
        Library.open(library.path, engine="fast")


def test_a_given_model_serves_both(library: Library, fake_bundle: Bundle) -> None:
    with Model.open(fake_bundle, engine="fake") as model:
        with Library.open(library.path, model=model, mode="read") as reader:
            assert Segmenter(reader).model is model
            assert reader.embed(picture(0)[0]).shape == (fake_bundle.geometry.embedding_dim,)
            with pytest.raises(errors.InputError, match="where a model is given"):
                Segmenter(reader, model=model, engine="onnxruntime-cpu")
            with pytest.raises(errors.InputError, match="where a model is given"):
                Library.open(library.path, model=model, precision="int8")
        segmenter = Segmenter(library, model=model)
        assert segmenter.model is model
        assert not model.closed


def test_a_model_of_another_bundle_is_refused(library: Library, tmp_path: Path) -> None:
    other = make_fake_bundle(tmp_path / "other", image_size=32)
    model = Model.open(other, engine="fake")
    with pytest.raises(errors.LibraryMismatchError, match="not with"):
        Library.open(library.path, model=model)
    with pytest.raises(errors.LibraryMismatchError, match="not with"):
        Segmenter(library, model=model)
    with pytest.raises(errors.LibraryMismatchError, match="not with"):
        Library.create(tmp_path / "new", library.bundle, model=model)
    assert not (tmp_path / "new").exists()


# What is on it


def test_a_view_is_valid_until_the_next_look(library: Library, fake_bundle: Bundle) -> None:
    model = Model.open(fake_bundle, engine="fake")
    view = model.look(picture(0)[0], INTENSITY)
    embedding = view.embedding
    view.encode()
    again = model.look(picture(1)[0], INTENSITY)
    for use in (
        lambda: view.embedding, view.encode, view.attend, view.decode, view.keep, view.finish,
        view.logits, lambda: view.begin(1), lambda: view.memorize([picture(0)[1]]),
        lambda: view.recall(library.gather, [], 1),
    ):  # fmt: skip
        with pytest.raises(errors.StaleViewError, match="another image is on the model"):
            use()
    assert repr(view) == "View(64x64, stale)"
    assert repr(again) == "View(64x64, valid)"
    np.testing.assert_array_equal(embedding, model.embed(picture(0)[0], INTENSITY))


def test_logits_of_a_segmenter_are_of_its_own_last_query(library: Library) -> None:
    first, second = Segmenter(library, k=1), Segmenter(library, k=2, structures=["rest"])
    with pytest.raises(errors.StaleViewError, match="no query yet"):
        first.logits()
    first.segment(picture(0)[0])
    assert first.logits().shape == (2, 64 // 4, 64 // 4)
    second.segment(picture(0)[0])
    assert second.logits().shape[0] == 1
    with pytest.raises(errors.StaleViewError):
        first.logits()


def test_logits_of_structures_that_were_left_out_are_no_numbers(library: Library) -> None:
    image, mask = picture(3)
    library.add(255 - image, {"square": mask}, absent=("rest",))
    segmenter = Segmenter(library, k=1)
    result = segmenter.segment(255 - image)
    assert not result.scores["rest"].present
    logits = segmenter.logits()
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[0]).all()


def test_a_look_for_one_graph_does_not_give_the_other(fake_bundle: Bundle) -> None:
    model = Model.open(fake_bundle, engine="fake")
    view = model.look(picture(0)[0], INTENSITY, ("embed",))
    assert view.embedding.shape == (fake_bundle.geometry.embedding_dim,)
    with pytest.raises(errors.InputError, match="'encode' was not asked for"):
        view.encode()
    view = model.look(picture(0)[0], INTENSITY, ("encode",))
    view.encode()
    with pytest.raises(errors.InputError, match="'embed' was not asked for"):
        _ = view.embedding


def ask(library: Library, view: Any) -> tuple[NDArray[np.float32], Any]:
    """Ask a view for "square" with two exemplars."""
    recollection = library.recall(view.embedding, ["square"], 2)
    found = recollection.found["square"]
    view.begin(1)
    stored = [found.memories[match.key] for match in found.matches]
    view.recall(library.gather, [Wanted(0, stored)], 2)
    view.attend()
    view.decode()
    return view.logits(), view.finish()


def test_a_kept_look_comes_back_without_its_image(library: Library, fake_bundle: Bundle) -> None:
    model = Model.open(fake_bundle, engine="fake")
    model.reserve(1, 2, graphs=("attend", "decode"))
    view = model.look(picture(2)[0], INTENSITY)
    kept = view.keep()
    expected, finished = ask(library, view)
    assert view.keep().nbytes == kept.nbytes > 0
    model.look(picture(0)[0], INTENSITY).encode()
    runs: list[str] = []
    run = model._composition.run
    model._composition.run = lambda graph, tensors: (runs.append(graph), run(graph, tensors))  # type: ignore[method-assign,assignment]
    view = model.put(kept)
    found, again = ask(library, view)
    assert runs == ["attend", "decode"]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again.label_map, finished.label_map)
    ask(library, view)  # as often as one likes
    assert model.nbytes == Model.required_bytes(fake_bundle, n=1, k=2) + 2 * kept.nbytes + (
        model.pixels.nbytes  # type: ignore[attr-defined]
    )


def test_kept_looks_are_bounded_and_the_least_recently_used_goes(fake_bundle: Bundle) -> None:
    def keep(model: Model, position: int) -> Kept:
        return model.look(picture(position)[0], INTENSITY).keep()

    probe = Model.open(fake_bundle, engine="fake")
    each = keep(probe, 0).nbytes
    model = Model.open(fake_bundle, engine="fake", keep_bytes=2 * each)
    first, second = keep(model, 0), keep(model, 1)
    model.put(first)
    third = keep(model, 2)
    assert (model.put(first).shape, model.put(third).shape) == ((SIZE, SIZE), (SIZE, SIZE))
    with pytest.raises(
        errors.StaleViewError, match="this kept look was dropped: the model keeps 0 MiB"
    ):
        model.put(second)
    before = model.nbytes
    for position in range(4):  # dropped by whoever held it: its room serves again
        keep(model, position)
    assert model.nbytes == before
    third.close()
    with pytest.raises(errors.StaleViewError, match="dropped"):
        model.put(third)
    with pytest.raises(errors.InputError, match="another model"):
        probe.put(first)
    small = Model.open(fake_bundle, engine="fake", keep_bytes=each - 1)
    with pytest.raises(errors.InputError, match="larger keep_bytes"):
        keep(small, 0)


# Size


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 4), (5, 2)])
def test_a_model_states_its_size_in_advance(
    fake_bundle: Bundle, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    model = Model.open(fake_bundle, engine="fake")
    assert model.nbytes == 0
    model.reserve(n, k, masks=2, graphs=("embed", "encode"))
    required = Model.required_bytes(fake_bundle, n=n, k=k, masks=2)
    assert model.nbytes == required
    model.reserve(1, k, graphs=())  # the largest of all users counts
    model.reserve(n, 1, masks=1, graphs=())
    assert model.nbytes == required
    logits, masks = np.zeros((n, 64, 64), np.float32), np.zeros((n, 100, 200), np.bool_)
    model.pixels.finish(  # type: ignore[attr-defined]
        logits, [True] * n, np.zeros((100, 200), np.uint8), masks
    )
    assert model.nbytes == required + 8 * 100 * 200


def test_what_a_call_is_given_is_contiguous_and_shared(fake_bundle: Bundle) -> None:
    buffers = Buffers(fake_bundle, lambda shape: np.zeros(shape, np.float32))
    buffers.grow(buffer_shapes(fake_bundle.specs, fake_bundle.geometry, n=4, k=8))
    for n, k in ((1, 8), (3, 2), (4, 8), (1, 32)):
        call = buffers.of("attend", n, k)
        assert call["memories"].shape[:2] == (n, k)
        assert all(array.flags.c_contiguous for array in call.values())
        assert np.shares_memory(call["memories"], buffers["memories"])
        assert buffers.holds(n, k)
    assert not buffers.holds(3, 11)


def test_more_than_was_reserved_is_an_error(library: Library, fake_bundle: Bundle) -> None:
    model = Model.open(fake_bundle, engine="fake")
    model.reserve(1, 1, graphs=("attend", "decode"))
    with pytest.raises(errors.EngineRunError, match="Reserve it first"):
        ask(library, model.look(picture(0)[0], INTENSITY))


def test_too_little_memory_to_grow_is_known_before_and_harms_nobody(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = Segmenter(library, k=1)
    image, _ = picture(1)
    expected = segmenter.segment(image)
    model, before = segmenter.model, segmenter.model.nbytes
    needed = Model.required_bytes(library.bundle, n=2, k=8)
    for _ in range(2):
        monkeypatch.setattr(host, "available_memory", lambda: 1024)
        with pytest.raises(errors.HostMemoryError, match=r"2 structures and k = 8 needs .* 0 MiB"):
            Segmenter(library, k=8)
    monkeypatch.setattr(host, "available_memory", lambda: needed)
    monkeypatch.setattr(model._buffers, "_allocate", _failing(model._allocate, after=1))
    with pytest.raises(errors.HostMemoryError, match="refused"):
        Segmenter(library, k=8)
    monkeypatch.setattr(model._buffers, "_allocate", model._allocate)
    assert model.nbytes == before
    again = segmenter.segment(image)
    assert again.scores == expected.scores
    np.testing.assert_array_equal(again.label_map, expected.label_map)
    assert Segmenter(library, k=8).segment(image).masks["square"].any()


def _failing(allocate: Any, after: int) -> Any:
    calls = iter(range(after))

    def fail(shape: tuple[int, ...]) -> Any:
        if next(calls, None) is None:
            return allocate((1 << 60,))  # more than any machine addresses
        return allocate(shape)

    return fail


# Life


def test_a_closed_model_says_so_to_whoever_uses_it(library: Library, fake_bundle: Bundle) -> None:
    with Model.open(fake_bundle, engine="fake") as model:
        segmenter = Segmenter(library, model=model, frames=1)
        segmenter.segment(picture(0)[0])
        view = model.look(picture(0)[0], INTENSITY)
        kept = view.keep()
    for use in (
        lambda: segmenter.segment(picture(0)[0]),
        lambda: segmenter.distance(picture(0)[0]),
        segmenter.logits,
        segmenter.warm_up,
        segmenter.frame_memories,
        lambda: Segmenter(library, model=model),
        lambda: model.put(kept),
        view.encode,
    ):
        with pytest.raises(errors.ModelClosedError, match="has been closed"):
            use()
    assert model.closed
    assert model.nbytes == 0
    assert model.graphs == ()
    assert "closed" in repr(model)
    model.close()
    assert Segmenter(library).segment(picture(0)[0]).masks["square"].any()  # one of its own


def test_a_closed_model_of_a_library_is_opened_again(library: Library) -> None:
    segmenter = Segmenter(library)
    segmenter.model.close()
    assert Segmenter(library).segment(picture(0)[0]).masks["square"].any()
    with pytest.raises(errors.ModelClosedError):
        segmenter.segment(picture(0)[0])
    library.add(255 - picture(0)[0], {"square": picture(0)[1]})


def test_closing_waits_for_the_query_in_work(library: Library) -> None:
    segmenter = Segmenter(library)
    model, done = segmenter.model, Event()
    with model.turns:
        closing = Thread(target=lambda: (model.close(), done.set()))
        closing.start()
        assert not done.wait(0.05)
        assert not model.closed
        segmenter.segment(picture(0)[0])
    closing.join(120)
    assert model.closed


# Turns


def test_turns_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = Turns(), []
    threads = []
    with turns:
        for number in range(10):
            thread = Thread(target=lambda n=number: [order.append(n) for _ in range(1) if take()])

            def take() -> bool:
                with turns:
                    sleep(0.001)
                    return True

            thread.start()
            threads.append(thread)
            while len(turns._waiting) <= number:
                sleep(0.001)
        with turns:  # again by whoever has it
            pass
        assert order == []
    for thread in threads:
        thread.join(120)
    assert len(order) == 10


def test_a_turn_that_was_given_up_is_not_handed_out() -> None:
    turns = Turns()
    with ThreadPoolExecutor(2) as others:
        with turns:
            assert not others.submit(turns.acquire, 0.01).result()
            assert len(turns._waiting) == 0
        assert others.submit(turns.acquire, 1.0).result()


@measures
def test_ten_threads_are_all_answered_and_none_starves(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that asks again at once stands behind the nine others that wait."""
    segmenters = [
        Segmenter(library, k=1 + number % 4, structures=["square", "rest"][: 1 + number % 2])
        for number in range(10)
    ]
    expected = [
        segmenter.segment(picture(number % 4)[0]) for number, segmenter in enumerate(segmenters)
    ]
    served: list[int] = []
    begin = Barrier(10)
    numbers: dict[int, int] = {}
    acquire = Turns.acquire

    def noted(turns: Turns, timeout: float = -1) -> bool:
        came = acquire(turns, timeout)
        if came and turns._depth == 1:  # written down within the turn: the order is that of turns
            served.append(numbers[get_ident()])
        return came

    def work(number: int) -> None:
        numbers[get_ident()] = number
        begin.wait(120)
        for _ in range(12):
            found = segmenters[number].segment(picture(number % 4)[0], deadline_ms=60_000.0)
            assert found.scores == expected[number].scores
            np.testing.assert_array_equal(found.label_map, expected[number].label_map)

    with monkeypatch.context() as patch, ThreadPoolExecutor(10) as threads:
        patch.setattr(Turns, "acquire", noted)
        for outcome in [threads.submit(work, number) for number in range(10)]:
            outcome.result(300)
    assert sorted(served) == sorted(list(range(10)) * 12)
    # While all ten ask, whoever is served has let every other go first.
    middle = served[30:90]
    gaps = [
        later - earlier
        for number in range(10)
        for places in [[i for i, one in enumerate(middle) if one == number]]
        for earlier, later in pairwise(places)
    ]
    assert max(gaps) <= 20


def test_adding_and_segmenting_at_once(library: Library) -> None:
    """Either takes the model and the library; neither waits for the other with one in hand."""
    segmenter = Segmenter(library, k=2)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (SIZE, SIZE), np.uint8) for _ in range(12)]

    def add() -> None:
        for image in images:
            library.add(image, {"square": picture(0)[1]})

    def ask_often() -> None:
        for _ in range(30):
            segmenter.segment(picture(0)[0])

    with ThreadPoolExecutor(3) as threads:
        for outcome in [threads.submit(work) for work in (add, ask_often, ask_often)]:
            outcome.result(60)
    assert len(library) == 16
    assert math.isfinite(segmenter.distance(images[0]))


def test_queries_go_on_while_a_library_is_encoded_anew(library: Library) -> None:
    segmenter = Segmenter(library, k=2)
    asked: list[int] = []

    def progress(done: int, total: int) -> None:
        with ThreadPoolExecutor(1) as other:  # would wait for ever if the library were locked
            other.submit(segmenter.segment, picture(0)[0]).result(10)
        asked.append(done)

    library.rebuild(progress=progress)
    assert asked == [0, 1, 2, 3, 4]
    assert segmenter.segment(picture(0)[0]).masks["square"].any()


def test_an_image_that_only_lacks_structures_can_be_the_first(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    """It has no mask to make a memory of, only an embedding."""
    with Library.create(tmp_path / "absent", fake_bundle, engine="fake") as made:
        made.add(picture(0)[0], {}, absent=("square",))
        made.add(picture(1)[0], {"square": picture(1)[1]})
        assert made.count("square", absent=True) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_embedding_that_is_no_direction_is_the_engines_fault(
    library: Library, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Not the image's: services set aside what is at fault."""
    segmenter = Segmenter(library, k=1)
    run = segmenter.model._composition.run

    def spoilt(graph: str, tensors: dict[str, np.ndarray]) -> None:
        run(graph, tensors)
        if graph == "embed":
            tensors["embedding"][:] = value

    monkeypatch.setattr(segmenter.model._composition, "run", spoilt)
    image, _ = picture(1)
    for ask in (segmenter.segment, segmenter.distance):
        with pytest.raises(
            errors.EngineRunError, match=r"gave an embedding of length (nan|inf|0\.0)"
        ):
            ask(image)
