"""The next query is queued before the last one's result is taken, and nothing of either changes."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from support.device_segmenters import (
    calls_of,
    make,
    picture,
    same,
    with_kernels,
    without_kernels,
)
from support.fake_onnxruntime import FakeSession

from recallseg import GpuOptions, Library, Model, Segmenter
from recallseg.engines.device import Device
from recallseg.engines.device import recording as guard
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import DeviceLostError, InputError
from recallseg.engines.registry import load_engines
from recallseg.runtime.model.device import DeviceModel
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.model.view import Wanted
from recallseg.runtime.segmenting.timings import Timings


@pytest.fixture(params=[False, True], ids=["at once", "deferred"])
def device(
    request: pytest.FixtureRequest,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> Device:
    """With kernels; work is done as early as it may, or as late."""
    return with_kernels(emulator, monkeypatch, deferred=request.param)


def logged(monkeypatch: pytest.MonkeyPatch, device: Device, library: Library) -> list[str]:
    """What is queued and waited for from now on, graphs by name, and searches."""
    calls = calls_of(device)
    run, recall = FakeSession.run_with_iobinding, type(library).recall

    def running(self: FakeSession, *arguments: Any) -> None:
        calls.append(self.graph)
        run(self, *arguments)

    def recalling(self: Library, *arguments: Any, **options: Any) -> Any:
        calls.append("search")
        return recall(self, *arguments, **options)

    monkeypatch.setattr(FakeSession, "run_with_iobinding", running)
    monkeypatch.setattr(type(library), "recall", recalling)
    calls.clear()
    return calls


def test_the_search_runs_beside_encode_and_one_copy_brings_the_result(
    library: Library, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(library, device, k=6)  # all there are
    segmenter.segment(picture(10)[0])
    calls = logged(monkeypatch, device, library)
    segmenter.segment(picture(11)[0])
    told = [name for name in calls if name not in ("set_context", "current_context")]
    # What is recalled lies there: one table, one kernel for memories, and one for pointers.
    after = told[told.index("search") :]
    until_attend = [name for name in after[: after.index("attend")] if name != "search"]
    assert until_attend == ["copy_in", "launch", "launch"]
    # Percentiles and two inputs; the image's size was the last one's, and so are the weights.
    assert told[: told.index("record_event")] == ["copy_in", *["launch"] * 6]
    rest = [name for name in told if name not in ("copy", "launch", "copy_in")]
    assert rest == [
        *("record_event", "wait_event", "embed", "copy_out", "record_event", "encode"),
        *("synchronize_event", "search"),  # waited for when encode is queued, and not before
        *("attend", "decode", "copy_out", "record_event", "synchronize_event"),
    ]


def begin(segmenter: Segmenter, image: Any, **options: Any) -> Callable[[], Any]:
    return segmenter._question.begin(image, Timings(), **options)


def test_a_query_is_queued_before_the_last_ones_result_is_taken(
    library: Library, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(library, device)
    images = [picture(seed, 50 + 10 * (seed % 3))[0] for seed in range(10, 14)]
    expected = [segmenter.segment(image) for image in images]
    outs = [(None, None)] * 3 + [
        (np.empty(images[3].shape, np.uint8), np.empty((2, *images[3].shape), np.bool_))
    ]
    calls = logged(monkeypatch, device, library)
    landings = [begin(segmenter, image, out=out) for image, out in zip(images, outs, strict=True)]
    # Nobody waited for more than four embeddings.
    assert sum(name.startswith("synchronize") for name in calls) == 4
    assert not segmenter.model.turns._depth
    found = [land() for land in landings[::-1]][::-1]  # in any order
    for one, wanted in zip(found, expected, strict=True):
        same(one, wanted)
    assert found[3].label_map is outs[3][0]
    before = device.allocations
    calls.clear()
    for landing in [begin(segmenter, image) for image in images]:
        landing()
    assert device.allocations == before  # pinned memory of the four is used again
    assert not {"allocate", "allocate_pinned", "create_event"} & set(calls)


def test_what_is_kept_of_a_query_in_flight_is_its_own(library: Library, device: Device) -> None:
    segmenter = make(library, device)
    images = [picture(seed)[0] for seed in (10, 11)]
    expected = [segmenter.segment(image, keep_logits=True) for image in images]
    landings = [begin(segmenter, image, keep_logits=True) for image in images]
    for land, wanted in zip(landings, expected, strict=True):
        found = land()
        for name, logits in wanted.logits.items():
            np.testing.assert_array_equal(found.logits[name], logits)


def test_a_look_that_is_put_back_waits_for_the_query_in_flight(
    library: Library, device: Device
) -> None:
    """It has no embedding to wait for, and writes where the query's memories were staged."""
    segmenter = make(library, device)
    model = segmenter.model
    kept = model.look(picture(12)[0], library.intensity).keep()
    expected = segmenter.segment(picture(10)[0])
    others = library.recall(kept.embedding, ["core"], 5).found["core"].memories
    segmenter.model.reserve(1, 5, graphs=("attend", "decode"))

    def ask() -> Any:
        view = model.put(kept)
        view.begin(2)  # one of them is left out
        view.recall(library.gather, [Wanted(1, [*others.values()])], 5)
        view.attend()
        view.decode()
        return view.logits()

    alone = ask()
    land = begin(segmenter, picture(10)[0])
    beside_it = ask()
    np.testing.assert_array_equal(beside_it, alone)
    same(land(), expected)


def test_a_query_that_is_never_taken_gives_its_memory_back(
    library: Library, device: Device
) -> None:
    segmenter = make(library, device)
    model = segmenter.model
    assert isinstance(model, DeviceModel)
    expected = segmenter.segment(picture(10)[0])
    land = begin(segmenter, picture(11)[0])
    del land
    same(segmenter.segment(picture(10)[0]), expected)
    model._before = None
    assert len(model._flights.free) <= 2


def test_threads_share_the_device_and_get_their_own(library: Library, device: Device) -> None:
    segmenter = make(library, device)
    images = [picture(seed)[0] for seed in range(10, 14)]
    expected = [segmenter.segment(image) for image in images]
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        found[number] = [segmenter.segment(images[number]) for _ in range(3)]

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, results in found.items():
        for result in results:
            same(result, expected[number])


def test_a_model_that_is_closed_lets_what_is_in_flight_land(
    library: Library, device: Device
) -> None:
    segmenter = make(library, device)
    expected = segmenter.segment(picture(10)[0])
    land = begin(segmenter, picture(10)[0])
    segmenter.model.close()
    same(land(), expected)


def test_a_device_lost_in_flight(library: Library, device: Device) -> None:
    segmenter = make(library, device)
    segmenter.segment(picture(10)[0])
    land = begin(segmenter, picture(10)[0])
    device.driver.fail("synchronize_event", 719)  # type: ignore[attr-defined]
    with pytest.raises(DeviceLostError):
        land()


@pytest.mark.parametrize("mode", ["percentile", "window", "range"])
def test_floats_on_the_device_are_looked_at_there(
    library: Library, device: Device, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the result of those of the host; NaN is told in the same words; nothing comes back."""
    rule = Intensity(mode, *((1, 99) if mode == "percentile" else (200.0, 1500.0)))
    monkeypatch.setattr(type(library), "intensity", rule)
    segmenter = make(library, device)
    image = picture(10)[0].astype(np.float32)
    expected = segmenter.segment(image)
    there = device.tensor(image.shape, np.float32)
    device.stream.copy_in(there, image)
    went_out: list[int] = []
    copy_out = device.driver.copy_out
    monkeypatch.setattr(
        device.driver, "copy_out", lambda h, d, n, s: (went_out.append(n), copy_out(h, d, n, s))
    )
    same(segmenter.segment(there), expected)
    assert image.nbytes not in went_out
    image[3, 4:9] = np.nan
    image[5, 5] = np.inf
    device.stream.copy_in(there, image)
    model = segmenter.model
    for look in (
        lambda: segmenter.segment(image),
        lambda: segmenter.segment(there),
        lambda: model.look(there, rule, ("encode",)),
    ):
        with pytest.raises(InputError, match=f"has 6 NaN or infinite pixels of {image.size}"):
            look()
    image[...] = 700
    device.stream.copy_in(there, image)
    same(segmenter.segment(there), segmenter.segment(image))  # constant


def test_without_kernels_floats_on_the_device_are_fetched(
    library: Library, session: type[FakeSession]
) -> None:
    device = without_kernels()
    segmenter = make(library, device)
    image = picture(10)[0].astype(np.float32)
    image[2, 2] = np.nan
    there = device.tensor(image.shape, np.float32)
    device.stream.copy_in(there, image)
    with pytest.raises(InputError, match="has 1 NaN"):
        segmenter.segment(there)


def test_nobody_waits_on_the_device_while_a_graph_is_recorded() -> None:
    entered, leave, recorded = Event(), Event(), Event()

    def wait() -> None:
        with guard.beside():
            entered.set()
            leave.wait(20)

    def record() -> None:
        with guard.recording():
            recorded.set()

    threads = [Thread(target=wait), Thread(target=record)]
    threads[0].start()
    assert entered.wait(20)
    threads[1].start()
    assert not recorded.wait(0.05)
    leave.set()
    assert recorded.wait(20)  # when the other had left
    entered.clear()
    with guard.recording():
        threads.append(Thread(target=wait))
        threads[-1].start()
        assert not entered.wait(0.05)
    assert entered.wait(20)
    for thread in threads:
        thread.join(20)


def test_a_first_run_is_recorded_alone(
    library: Library, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[tuple[str, bool]] = []
    run = FakeSession.run_with_iobinding

    def running(self: FakeSession, *arguments: Any) -> None:
        alone.append((self.graph, guard._alone))
        run(self, *arguments)

    segmenter = make(library, device, cuda_graphs=True)
    monkeypatch.setattr(FakeSession, "run_with_iobinding", running)
    segmenter.segment(picture(10)[0])
    assert alone == [(graph, True) for graph in ("embed", "encode", "attend", "decode")]
    alone.clear()
    segmenter.segment(picture(10)[0])
    assert alone == [(graph, False) for graph in ("embed", "encode", "attend", "decode")]


def test_what_is_given_back_while_a_graph_is_recorded_spoils_nothing(
    library: Library, device: Device, session: type[FakeSession]
) -> None:
    """By the thread that records, as the interpreter may at any time, and by others."""
    options = EngineOptions(device=device)
    things: list[Any] = [
        device.tensor((4,)), device.allocate_pinned(4), device.new_event(), device.new_stream(),
        load_engines(library.bundle, "onnxruntime-cuda", options=options, graphs=("embed",)),
    ]  # fmt: skip
    gone = weakref.ref(things[-1]["embed"]._session)
    driver: Any = device.driver
    before, still_there = driver.live, []

    def collect() -> None:
        if things:
            things.pop()
            gc.collect()
            others = Thread(target=things.clear)
            others.start()
            others.join(20)
            still_there.append((gone() is not None, driver.live["pinned"] - before["pinned"]))

    session.meanwhile = staticmethod(collect)
    segmenter = make(library, device, cuda_graphs=True)
    segmenter.segment(picture(10)[0])
    assert still_there[0][0]
    assert still_there[0][1] >= 0
    gc.collect()
    assert gone() is None
    before = driver.live
    assert not guard._put_off
    same(segmenter.segment(picture(10)[0]), make(library, device).segment(picture(10)[0]))


def test_two_models_record_and_wait_in_turns(
    library: Library, device: Device, session: type[FakeSession]
) -> None:
    """One's first query allocates, waits and records while the other does."""
    waiting = make(
        library,
        device,
        model=Model.open(library.bundle, engine="onnxruntime-cuda", gpu=GpuOptions(device=device)),
    )
    expected = waiting.segment(picture(10)[0])
    found: list[Any] = []
    threads: list[Thread] = []

    def meanwhile() -> None:
        if not threads:
            threads.append(Thread(target=lambda: found.append(waiting.segment(picture(10)[0]))))
            threads[0].start()
            threads[0].join(0.2)
            assert not found  # it stands back

    session.meanwhile = staticmethod(meanwhile)
    recorded = make(library, device, cuda_graphs=True).segment(picture(10)[0])
    threads[0].join(20)
    same(found[0], expected)
    same(recorded, expected)
