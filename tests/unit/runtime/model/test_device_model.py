"""A query on a device gives what the CPU gives, allocates nothing, and says what went wrong."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.device_segmenters import (
    STRUCTURES,
    cache_of,
    calls_of,
    make,
    on_cpu,
    picture,
    same,
    with_kernels,
    without_kernels,
)
from support.fake_driver import FakeDriver
from support.fake_onnxruntime import FakeSession
from support.fake_tensorrt import HostGpu

from recallseg import Bundle, Frame, Library, Segmenter, Stream
from recallseg.benchmarks.subjects import portable_only
from recallseg.engines.budget import graph_bytes, memory_budget
from recallseg.engines.device import Device, DeviceTensor
from recallseg.engines.errors import (
    DeviceLostError,
    DeviceMemoryError,
    EngineRunError,
    InputError,
    LibraryCorruptError,
    StaleViewError,
)
from recallseg.engines.heads import REFINE, feature_count, graph_digest
from recallseg.runtime.library.choices import Choice
from recallseg.runtime.library.encoding import MEMORY_FORMATS
from recallseg.runtime.library.heads import Head
from recallseg.runtime.model.device import DeviceModel
from recallseg.runtime.model.model import GpuOptions, Model
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.model.view import View, Wanted


# Work is done as early as it may, and as late: what is reused too soon shows in one of the two.
@pytest.mark.parametrize(
    ("integrated", "deferred", "cuda_graphs"),
    [(False, False, False), (False, True, True), (True, True, False), (True, False, True)],
)
def test_without_pixel_kernels_it_is_the_cpu_bit_by_bit(
    library: Library,
    session: type[FakeSession],
    integrated: bool,
    deferred: bool,
    cuda_graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(integrated=integrated, deferred=deferred)
    segmenter, reference = make(library, device, cuda_graphs=cuda_graphs), on_cpu(library)
    for seed in range(10, 14):
        image, _ = picture(seed, 50 + 10 * (seed % 3))
        same(segmenter.segment(image), reference.segment(image))
    np.testing.assert_array_equal(segmenter.logits(), reference.logits())
    assert segmenter.distance(image) == reference.distance(image)


@pytest.mark.parametrize("kernels_built", [False, True])
def test_probabilities_of_a_device_are_its_masks_at_one_half(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    kernels_built: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = (
        with_kernels(emulator, monkeypatch) if kernels_built else without_kernels(deferred=True)
    )
    segmenter, reference = make(library, device), on_cpu(library)
    image, _ = picture(11)
    found, kept = segmenter.segment(image), reference.segment(image, keep_logits=True)
    for name in STRUCTURES:
        probability = found.probabilities[name]
        np.testing.assert_array_equal(probability >= 0.5, found.masks[name])
        # The kernels' pixels are the CPU's but for rounding, and so are the networks' inputs.
        np.testing.assert_allclose(probability, kept.probabilities[name], atol=1e-2)
    held = segmenter.segment(image, keep_logits=True)
    segmenter.segment(picture(12)[0])
    np.testing.assert_array_equal(held.probabilities["disc"] >= 0.5, held.masks["disc"])
    with pytest.raises(StaleViewError, match="keep_logits=True"):
        found.probabilities["disc"]
    on_device = tuple(
        device.tensor(shape, dtype)
        for shape, dtype in ((image.shape, np.uint8), ((2, *image.shape), np.bool_))
    )
    if kernels_built:
        there = segmenter.segment(image, out=on_device)
        np.testing.assert_array_equal(there.probabilities["disc"] >= 0.5, held.masks["disc"])


@pytest.fixture(scope="module")
def libraries(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle
) -> Iterator[dict[str, Library]]:
    """One in each format of memories, of the same exemplars."""
    folder = tmp_path_factory.mktemp("formats")
    made = {}
    for memory_format in MEMORY_FORMATS:
        library = Library.create(
            folder / memory_format, tiny_bundle, threads=1, memory_format=memory_format
        )
        for seed in range(4):
            library.add(*picture(seed))
        made[memory_format] = library
    yield made
    for library in made.values():
        library.close()


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("facts", [{}, {"deferred": True, "integrated": True}])
@pytest.mark.parametrize("kernels_built", [False, True])
def test_memories_of_any_format_are_the_same_on_the_device(
    libraries: dict[str, Library],
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    kernels: Any,
    memory_format: str,
    facts: dict[str, bool],
    kernels_built: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "recallseg.engines.pixels._native", kernels)
    monkeypatch.setenv("RECALLSEG_PIXELS", "native" if kernels_built else "opencv")
    library = libraries[memory_format]
    device = (
        with_kernels(emulator, monkeypatch, **facts) if kernels_built else without_kernels(**facts)
    )
    segmenter = make(library, device)
    for seed in (10, 11):  # copied there, and there already
        found = segmenter.segment(picture(seed)[0])
        same(found, on_cpu(library).segment(picture(seed)[0]))
    assert found.provenance.recipe.memory_format == memory_format
    g = library.bundle.geometry
    numbers = {("fp16", True): 2, ("int8", True): 1}.get((memory_format, kernels_built), 4)
    scales = 4 * g.tokens if numbers == 1 else 0
    stored = g.tokens * g.memory_dim * numbers + scales + 4 * g.channels
    assert cache_of(segmenter).slot_bytes == stored


def test_memories_of_two_formats_share_the_caches_room(
    libraries: dict[str, Library],
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch)
    g = libraries["fp16"].bundle.geometry
    room = 8 * (2 * g.tokens * g.memory_dim + 4 * g.channels) + 3_000
    first = make(libraries["fp16"], device, k=1, cache_bytes=room)
    second = Segmenter(
        libraries["int8"], k=1, structures=STRUCTURES, reach=math.inf, model=first.model
    )
    image = picture(10)[0]
    for _ in range(2):
        same(first.segment(image), make(libraries["fp16"], device, k=1).segment(image))
        same(second.segment(image), make(libraries["int8"], device, k=1).segment(image))
    assert isinstance(first.model, DeviceModel)
    caches = first.model.caches
    budget = memory_budget(libraries["fp16"].bundle, k=1, n=2, engine="onnxruntime-cuda")
    lines = {line.name: line.size for line in budget.lines}
    assert lines["recalled memories"] == 2 * caches["fp16"].slot_bytes
    assert (caches["fp16"].slots, caches["int8"].slots) == (8, 2)  # what a question takes, at least
    first.model.close()
    assert device.live_bytes >= 0


def test_a_memory_that_was_damaged_on_disk_is_not_taken_there(
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Library.create(
        tmp_path / "library", tiny_bundle, threads=1, memory_format="int8"
    ) as library:
        library.add(*picture(0))
    [shard] = (tmp_path / "library" / "memories").iterdir()
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with Library.open(tmp_path / "library", threads=1) as library:
        segmenter = make(library, with_kernels(emulator, monkeypatch), k=1)
        with pytest.raises(LibraryCorruptError, match="not what was stored"):
            segmenter.segment(picture(10)[0])


@pytest.mark.parametrize(
    ("dtype", "facts"),
    [
        (np.uint8, {}),
        (np.int16, {"deferred": True}),
        (np.uint16, {"deferred": True, "integrated": True}),
        (np.float32, {"integrated": True}),
        (np.float64, {"deferred": True}),
    ],
)
def test_with_pixel_kernels_it_is_the_native_kernels_bit_by_bit(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    kernels: Any,
    dtype: Any,
    facts: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "recallseg.engines.pixels._native", kernels)
    monkeypatch.setenv("RECALLSEG_PIXELS", "native")
    segmenter = make(library, with_kernels(emulator, monkeypatch, **facts))
    image = (picture(10)[0] / 12).astype(dtype)
    for shown in (image, np.stack([image, image[::-1], image], -1)):
        same(segmenter.segment(shown), on_cpu(library).segment(shown))


def test_arrays_on_the_device_are_taken_and_filled_where_they_lie(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch)
    segmenter = make(library, device)
    image, _ = picture(10)
    expected = segmenter.segment(image)
    there = device.tensor(image.shape, image.dtype)
    device.stream.copy_in(there, image)
    same(segmenter.segment(there), expected)

    labels = device.tensor(image.shape, np.uint8)
    masks = device.tensor((2, *image.shape), np.bool_)
    result = segmenter.segment(there, out=(labels, masks))
    assert isinstance(result.masks["core"], DeviceTensor)
    found = np.empty(image.shape, np.bool_)
    device.stream.copy_out(found, result.masks["core"])
    np.testing.assert_array_equal(found, expected.masks["core"])
    mixed = segmenter.segment(there, out=(None, masks))
    np.testing.assert_array_equal(mixed.label_map, expected.label_map)
    with pytest.raises(InputError, match="out must have shape"):
        segmenter.segment(there, out=(masks, None))
    with pytest.raises(InputError, match="must have shape HxW"):
        segmenter.segment(device.tensor((2, 3, 4), np.uint8))


def test_an_array_on_the_device_without_kernels_is_fetched(
    library: Library, session: type[FakeSession]
) -> None:
    device = without_kernels()
    segmenter = make(library, device)
    image, _ = picture(10)
    there = device.tensor(image.shape, image.dtype)
    device.stream.copy_in(there, image)
    same(segmenter.segment(there), segmenter.segment(image))


@pytest.mark.parametrize("kernels_built", [False, True])
def test_nothing_is_allocated_in_steady_state(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    kernels_built: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch) if kernels_built else without_kernels()
    segmenter = make(library, device)
    segmenter.segment(picture(10)[0])
    before = device.allocations, segmenter.model.nbytes
    calls: list[str] = device.driver.calls  # type: ignore[attr-defined]
    calls.clear()
    for seed in range(11, 15):
        segmenter.segment(picture(seed)[0])
    assert (device.allocations, segmenter.model.nbytes) == before
    assert not {"allocate", "allocate_pinned", "create_event", "create_stream"} & set(calls)
    # One wait for the embedding, one for the result.
    waits = sum(name.startswith("synchronize") for name in calls)
    assert waits == 2 * 4


def test_a_model_states_its_size_in_advance(library: Library, session: type[FakeSession]) -> None:
    segmenter = make(library, without_kernels(), k=4)
    cache = cache_of(segmenter)
    required = Model.required_bytes(library.bundle, n=2, k=4)
    assert segmenter.required_bytes == required
    assert segmenter.model.nbytes == required + cache.slots * cache.slot_bytes


def test_too_little_memory_is_said_before_anything_is_taken(
    tmp_path: Path, session: type[FakeSession]
) -> None:
    library = Library.create(tmp_path / "library", portable_only(Bundle.open("demo")), threads=1)
    library.add(*picture(0))
    needed = []
    for integrated in (False, True):  # where memory is shared the cache takes it, too
        device = without_kernels(memory=1 << 20, integrated=integrated)
        with pytest.raises(DeviceMemoryError, match=r"2 structures and k = 3.* needs") as raised:
            make(library, device)
        assert device.allocations == 0
        [figure] = re.findall(r"needs (\d+) MiB", str(raised.value))
        needed.append(int(figure))
    graphs = ("embed", "encode", "attend", "decode")
    weights = graph_bytes(library.bundle, graphs, ("ort-cpu", "portable"), "fp32")
    assert needed[0] == needed[1] > weights >> 20


def test_what_is_recalled_again_is_not_copied_again(
    library: Library, session: type[FakeSession]
) -> None:
    segmenter = make(library, without_kernels())
    image, _ = picture(10)
    segmenter.segment(image)
    cache = cache_of(segmenter)
    assert (cache.hits, cache.misses) == (0, 6)
    segmenter.segment(image)
    assert (cache.hits, cache.misses) == (6, 6)


def test_a_small_cache_forgets_the_least_recently_used(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    segmenter, reference = make(library, without_kernels(), cache_bytes=0), on_cpu(library)
    cache = cache_of(segmenter)
    assert cache.slots == 6  # what one query needs is never less
    for seed in range(6):
        image, _ = picture(seed)
        same(segmenter.segment(image), reference.segment(image))
    assert cache.misses > 6


def test_of_a_changed_library_only_new_memories_are_loaded(
    tmp_path: Path, tiny_bundle: Bundle, session: type[FakeSession]
) -> None:
    library = Library.create(tmp_path / "library", tiny_bundle, threads=1)
    for seed in range(3):
        image, masks = picture(seed)
        library.add(image, masks, key=str(seed))
    segmenter = make(library, without_kernels())
    segmenter.segment(image)
    library.remove("2")
    other, masks = picture(9)
    library.add(other, masks, key="2")
    found = segmenter.segment(other)
    assert cache_of(segmenter).misses == 6 + 2  # a key that means another exemplar now is new
    same(found, make(library, without_kernels()).segment(other))


def test_memories_of_earlier_frames_are_used_and_made(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(deferred=True)
    segmenters = make(library, device, frames=2), on_cpu(library, frames=2)
    frame_memories = [segmenter.frame_memories() for segmenter in segmenters]
    for seed in range(10, 14):
        image, _ = picture(seed)
        found, expected = (
            segmenter.segment(image, frame_memories=memories)
            for segmenter, memories in zip(segmenters, frame_memories, strict=True)
        )
        same(found, expected)
        assert found.frame_memories == expected.frame_memories


def test_a_lost_device_leaves_library_and_process_unharmed(
    library: Library, session: type[FakeSession]
) -> None:
    device = without_kernels()
    segmenter = make(library, device)
    image, _ = picture(10)
    before = library.digest
    device.driver.fail("copy_in", 719)  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="engine onnxruntime-cpu"):
            segmenter.segment(image)
    assert library.digest == before
    assert on_cpu(library).segment(image).masks["disc"].any()


STEPS = (
    "set_context", "copy_in", "launch", "record_event", "wait_event", "copy_out",
    "synchronize_event", "copy",
)  # fmt: skip


@pytest.mark.parametrize("call", STEPS)
def test_a_device_lost_in_any_step(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch)
    segmenter = make(library, device)
    calls: list[str] = device.driver.calls  # type: ignore[attr-defined]
    calls.clear()
    segmenter.segment(picture(10)[0])
    done = list(calls)
    assert set(STEPS) <= set(done)
    # In the middle of those calls, if there are several.
    device.driver.fail(call, 719, after=done.count(call) // 2)  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="engine onnxruntime-cpu"):
            segmenter.segment(picture(11)[0])
    del segmenter
    gc.collect()  # nothing is given back to a dead driver, and nothing raises
    assert device.lost


@pytest.mark.parametrize("call", ["copy_in", "copy_out", "record_event", "copy", "wait_event"])
def test_after_a_passing_failure_the_next_query_is_right(
    library: Library, session: type[FakeSession], call: str
) -> None:
    device = without_kernels()
    segmenter = make(library, device)
    image, _ = picture(10)
    expected = segmenter.segment(image)
    device.driver.fail(call, 1)  # type: ignore[attr-defined]
    with pytest.raises(EngineRunError, match="injected"):
        segmenter.segment(picture(11)[0])
    same(segmenter.segment(image), expected)


def test_scores_that_are_no_numbers_are_an_error(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(library, without_kernels())
    model = segmenter.model
    assert isinstance(model, DeviceModel)
    run = model._composition.run

    def spoilt(graph: str, names: Any) -> None:
        run(graph, names)
        if graph == "decode":
            model._stream.fill(model._buffers["iou"], 0xFF)

    monkeypatch.setattr(model._composition, "run", spoilt)
    with pytest.raises(EngineRunError, match="not finite"):
        segmenter.segment(picture(10)[0])


def test_an_image_is_read_when_its_owner_has_written_it(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch, deferred=True)
    segmenter = make(library, device)
    image, _ = picture(10)
    expected = segmenter.segment(image)
    theirs, there = device.new_stream(), device.tensor(image.shape, image.dtype)
    pinned = device.allocate_pinned(image.nbytes)
    pinned.array[:] = image.reshape(-1).view(np.uint8)
    theirs.copy_in(there, pinned.array)
    same(segmenter.segment(replace(there, stream=theirs.handle)), expected)


def test_out_that_cannot_be_written(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, _ = picture(10)
    device = with_kernels(emulator, monkeypatch)
    segmenter = make(library, device)
    labels = device.tensor(image.shape, np.uint8)
    with pytest.raises(InputError, match="read-only"):
        segmenter.segment(image, out=(replace(labels, read_only=True), None))


def test_out_on_the_device_needs_kernels(library: Library, session: type[FakeSession]) -> None:
    image, _ = picture(10)
    device = without_kernels()
    labels = device.tensor(image.shape, np.uint8)
    with pytest.raises(InputError, match="were not built"):
        make(library, device).segment(image, out=(labels, None))


def test_a_callers_buffer_that_was_freed_or_is_misaligned(
    library: Library, session: type[FakeSession]
) -> None:
    device = without_kernels()
    segmenter = make(library, device)
    image, _ = picture(10)
    there = device.tensor(image.shape, image.dtype)
    with pytest.raises(InputError, match="misaligned"):
        segmenter.segment(replace(there, address=there.address + 1))
    address = there.address
    del there
    gc.collect()
    with pytest.raises(InputError, match="It was freed"):
        segmenter.segment(DeviceTensor(address, image.shape, image.dtype))
    assert segmenter.segment(image).masks["disc"].any()


def test_engines_on_the_cpu_refuse_options_of_a_gpu(library: Library) -> None:
    with pytest.raises(InputError, match="runs on the CPU"):
        Segmenter(library, engine="onnxruntime-cpu", gpu=GpuOptions())


def test_a_callers_stream_is_honoured(library: Library, session: type[FakeSession]) -> None:
    driver = HostGpu.driver = FakeDriver()
    theirs = Device(driver).new_stream()
    device = Device(driver, stream=theirs.handle)
    make(library, device).segment(picture(10)[0])
    streams = {
        options["user_compute_stream"] for name, options, _ in session.made if name != "embed"
    }
    assert streams == {str(theirs.handle)}


def test_structures_beyond_one_call_are_done_in_groups(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    bundle = library.bundle
    monkeypatch.setattr(bundle, "geometry", replace(bundle.geometry, max_n=1))
    segmenter = make(library, without_kernels())
    same(segmenter.segment(picture(10)[0]), on_cpu(library).segment(picture(10)[0]))


@pytest.mark.parametrize("order", [("embedding", "encode"), ("encode", "embedding"), ("encode",)])
@pytest.mark.parametrize("deferred", [False, True])
def test_features_are_there_whatever_was_called_before(
    library: Library,
    session: type[FakeSession],
    order: tuple[str, ...],
    deferred: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    gpu = GpuOptions(device=without_kernels(deferred=deferred))
    found = []
    for model in (
        Model.open(library.bundle, engine="onnxruntime-cuda", gpu=gpu),
        Model.open(library.bundle, threads=1),
    ):
        model.reserve(1, 2, graphs=("embed", "encode", "attend", "decode"))
        view = model.look(picture(10)[0], library.intensity)
        for step in order:
            if step == "encode":
                view.encode()
            else:
                assert view.embedding.shape == (library.bundle.geometry.embedding_dim,)
        memories = library.recall(view.embedding, ["disc"], 2).found["disc"].memories
        view.begin(1)
        view.recall(library.gather, [Wanted(0, [*memories.values()])], 2)
        view.attend()
        view.decode()
        found.append((view.logits(), view.finish().iou, view.embedding))
        only = model.look(picture(10)[0], library.intensity, ("embed",))
        np.testing.assert_array_equal(only.embedding, found[-1][2])
        with pytest.raises(InputError, match="'encode' was not asked for"):
            only.encode()
    for there, here in zip(*found, strict=True):
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("deferred", [False, True])
def test_exemplars_are_encoded_on_the_gpu_of_the_librarys_model(
    tmp_path: Path,
    tiny_bundle: Bundle,
    session: type[FakeSession],
    deferred: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    gpu = GpuOptions(device=without_kernels(deferred=deferred))
    models = (
        Model.open(tiny_bundle, engine="onnxruntime-cuda", gpu=gpu),
        Model.open(tiny_bundle, threads=1),
    )
    shards = []
    for number, model in enumerate(models):
        with Library.create(tmp_path / str(number), tiny_bundle, model=model) as made:
            for seed in range(3):
                made.add(*picture(seed))
            same(
                Segmenter(made, k=2, reach=2.0).segment(picture(10)[0]),
                on_cpu(made, k=2, reach=2.0).segment(picture(10)[0]),
            )
            assert Segmenter(made).model is model
        shards.append([p.read_bytes() for p in sorted((tmp_path / str(number)).glob("memories/*"))])
    assert shards[0] == shards[1]
    assert {name for name, _, _ in session.made} >= {
        "attend", "decode", "embed", "encode", "memorize",
    }  # fmt: skip


def test_segmenters_of_a_library_share_what_is_cached(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(deferred=True)
    image, _ = picture(10)
    first = make(library, device, k=2)
    first.segment(image)
    cache = cache_of(first)
    assert (cache.slots, cache.hits, cache.misses) == (12, 0, 4)
    second = make(library, device, k=2, structures=("core", "disc"))
    third = Segmenter(library, model=first.model, k=6, reach=math.inf)  # the cache has to grow
    assert second.model is first.model
    assert cache_of(third) is cache
    found = second.segment(image)
    assert (cache.hits, cache.misses) == (4, 4)
    expected = on_cpu(library, k=2, structures=("core", "disc")).segment(image)
    same(found, expected)
    same(third.segment(image), on_cpu(library, k=6).segment(image))
    assert (cache.hits, cache.misses) == (8, 12)


@pytest.mark.parametrize("integrated", [False, True])
def test_a_cache_that_grows_keeps_what_it_holds(
    library: Library,
    session: type[FakeSession],
    integrated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(deferred=True, integrated=integrated)
    image, _ = picture(10)
    first = make(library, device, k=1, cache_bytes=0)
    cache = cache_of(first)
    first.segment(image)
    assert (cache.slots, cache.misses) == (2, 2)
    larger = Segmenter(library, model=first.model, k=3, structures=STRUCTURES, reach=math.inf)
    assert (cache.slots, cache.misses) == (6, 2)
    same(larger.segment(image), on_cpu(library).segment(image))
    assert (cache.hits, cache.misses) == (2, 6)
    same(first.segment(image), on_cpu(library, k=1).segment(image))


def test_too_little_memory_to_grow_harms_nobody(
    library: Library, session: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(deferred=True)
    segmenter = make(library, device, k=1)
    image, _ = picture(10)
    expected = segmenter.segment(image)
    before = device.allocations, segmenter.model.nbytes, segmenter.model.graphs
    device.driver.total = device.live_bytes + (1 << 10)  # type: ignore[attr-defined]
    with pytest.raises(DeviceMemoryError, match=r"2 structures and k = 32.* needs \d+ MiB"):
        Segmenter(library, model=segmenter.model, k=30, frames=2)
    assert (device.allocations, segmenter.model.nbytes, segmenter.model.graphs) == before
    same(segmenter.segment(image), expected)
    # Known too late, as when another program takes it meanwhile: what was there stays as well.
    device.driver.total = 1 << 30  # type: ignore[attr-defined]
    device.driver.fail("allocate", 2, after=2)  # type: ignore[attr-defined]
    with pytest.raises(DeviceMemoryError):
        Segmenter(library, model=segmenter.model, k=30)
    same(segmenter.segment(image), expected)
    larger = Segmenter(library, model=segmenter.model, k=5, structures=STRUCTURES, reach=math.inf)
    same(larger.segment(image), on_cpu(library, k=5).segment(image))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_model_that_grew_is_recorded_anew(
    library: Library,
    session: type[FakeSession],
    cuda_graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    segmenter = make(library, without_kernels(deferred=True), k=1, cuda_graphs=cuda_graphs)
    for seed in range(10, 13):
        same(segmenter.segment(picture(seed)[0]), on_cpu(library, k=1).segment(picture(seed)[0]))
    larger = Segmenter(library, model=segmenter.model, k=4, structures=STRUCTURES, reach=math.inf)
    for seed in range(10, 14):
        same(larger.segment(picture(seed)[0]), on_cpu(library, k=4).segment(picture(seed)[0]))
        same(segmenter.segment(picture(seed)[0]), on_cpu(library, k=1).segment(picture(seed)[0]))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_kept_look_stays_on_the_gpu_and_comes_back(
    library: Library, session: type[FakeSession], deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    device = without_kernels(deferred=deferred)
    gpu = GpuOptions(device=device)
    model = Model.open(library.bundle, engine="onnxruntime-cuda", gpu=gpu)
    model.reserve(1, 2, graphs=("attend", "decode"))

    def ask(view: View) -> tuple[NDArray[np.float32], Any]:
        memories = library.recall(view.embedding, ["disc"], 2).found["disc"].memories
        view.begin(1)
        view.recall(library.gather, [Wanted(0, [*memories.values()])], 2)
        view.attend()
        view.decode()
        finished = view.finish()
        return view.logits(), finished.label_map

    view = model.look(picture(10)[0], library.intensity)
    calls_of(device).clear()
    kept = view.keep()
    assert calls_of(device).count("copy") == 3
    expected = ask(view)
    other = model.look(picture(11)[0], library.intensity).keep()
    ask(model.put(other))
    calls_of(device).clear()
    view = model.put(kept)
    assert not {"copy_in", "copy_out", "allocate"} & set(calls_of(device))
    for found, wanted in zip(ask(view), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_frame_on_the_gpu_stays_there_through_a_stream(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = with_kernels(emulator, monkeypatch, deferred=True)
    window = Intensity("window", 0.0, 255.0)
    segmenter = make(library, device, frames=2)
    monkeypatch.setattr(type(library), "intensity", window)
    greys = [(picture(seed)[0] / 12).astype(np.uint8) for seed in range(10, 15)]
    images = [np.stack([grey, grey[::-1], grey], -1) for grey in greys]
    expected = [segmenter.segment(image) for image in images]
    theirs = device.new_stream()
    there = device.tensor(images[0].shape, images[0].dtype)
    pinned = device.allocate_pinned(images[0].nbytes)
    frames: list[Frame] = []
    went_out: list[int] = []
    copy_out = device.driver.copy_out
    monkeypatch.setattr(
        device.driver, "copy_out", lambda h, d, n, s: (went_out.append(n), copy_out(h, d, n, s))
    )
    with Stream(make(library, device), frames.append, queue=8) as stream:
        for number, image in enumerate(images):
            pinned.array[:] = image.reshape(-1).view(np.uint8)
            theirs.copy_in(there, pinned.array)
            stream.push(replace(there, stream=theirs.handle))
            pinned.array[:] = 0  # the caller may reuse its memory at once
            theirs.copy_in(there, pinned.array)
            theirs.synchronize()
            assert stream.drain(30)
            if number == 1:
                before = device.allocations, segmenter.model.nbytes
    for frame, result in zip(frames, expected, strict=True):
        assert frame.error is None
        same(frame.result, result)
    assert (device.allocations, segmenter.model.nbytes) == before  # copies reuse their memory
    assert images[0].nbytes not in went_out


def test_a_frame_of_the_cpu_is_copied_there(library: Library, session: type[FakeSession]) -> None:
    model = make(library, without_kernels()).model
    image, _ = picture(10)
    found = model.copy_frame(image)
    assert isinstance(found, np.ndarray)
    assert not np.shares_memory(found, image)
    with pytest.raises(InputError, match="a frame must be"):
        model.copy_frame("frame")


def test_frame_memories_stay_on_the_gpu(
    library: Library,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those made of masks that were written where the caller wanted them: on the GPU."""
    device = with_kernels(emulator, monkeypatch, deferred=True)
    segmenter = make(library, device, frames=2)
    images = [picture(seed)[0] for seed in range(10, 14)]
    memories = segmenter.frame_memories()
    expected = [segmenter.segment(image, frame_memories=memories) for image in images]
    assert [*expected[-1].frame_memories.values()] == [2, 2]
    g = library.bundle.geometry
    went_out: list[int] = []
    copy_out = device.driver.copy_out
    monkeypatch.setattr(
        device.driver, "copy_out", lambda h, d, n, s: (went_out.append(n), copy_out(h, d, n, s))
    )
    memories.clear()
    masks = device.tensor((2, *images[0].shape), np.bool_)
    for image, result in zip(images, expected, strict=True):
        same_scores = segmenter.segment(image, frame_memories=memories, out=(None, masks))
        assert same_scores.scores == result.scores
        assert same_scores.frame_memories == result.frame_memories
    assert not {4 * g.tokens * g.memory_dim, 4 * g.channels} & set(went_out)


@pytest.mark.parametrize("kernels_built", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_head_does_for_a_device_what_it_does_on_a_cpu(
    tmp_path: Path,
    tiny_bundle: Bundle,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    kernels_built: bool,
    there: bool,
) -> None:
    monkeypatch.setenv("RECALLSEG_PIXELS", "opencv")
    draw = np.random.default_rng(0)
    n = len(STRUCTURES)
    shapes = [(32, feature_count(n)), (32,), (16, 32), (16,), (n, 16), (n,)]
    units = tuple(0.3 * draw.normal(size=shape).astype(np.float32) for shape in shapes)
    with Library.create(tmp_path / "library", tiny_bundle, threads=1) as own:
        for seed in range(4):
            image, masks = picture(seed)
            own.add(image, masks)
        used = Choice(0.5, 0.0, 0.5, 0.6, 0.0, 0.2, 4)
        own.heads.store(
            Head(
                STRUCTURES,
                dict.fromkeys(STRUCTURES, used),
                units,
                (),
                dict.fromkeys(range(1, 5), 0),
                {i: i for i in range(1, 5)},
                "exemplars",
                {},
                own.generation,
                graph_digest(REFINE),
                "2026-01-01T00:00:00+00:00",
                own.newest,
                len(own),
            )
        )
        device = with_kernels(emulator, monkeypatch) if kernels_built else without_kernels()
        image, _ = picture(9)
        given: Any = image
        if there:
            given = device.tensor(image.shape, image.dtype)
            device.stream.copy_in(given, image)
        found = make(own, device).segment(given, keep_logits=True)
        expected = on_cpu(own).segment(image, keep_logits=True)
        plain = on_cpu(own, refine=False).segment(image)
        assert found.provenance.head == expected.provenance.head is not None
        assert not np.array_equal(expected.label_map, plain.label_map)
        differing = np.mean(found.label_map != expected.label_map)
        assert differing == 0 if not kernels_built else differing < 1e-3
        assert found.logits["disc"].shape == image.shape
        for name, probability in found.probabilities.items():
            if found.scores[name].present:
                np.testing.assert_array_equal(probability >= 0.5, found.masks[name])
            np.testing.assert_allclose(probability, expected.probabilities[name], atol=1e-3)
