"""Whole queries with each provider on a GPU (``-m gpu``), and, as a test of this test, on the
stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fake_onnxruntime import install
from support.fake_tensorrt import HostGpu

from recallseg import Bundle, GpuOptions, Library, Segmenter
from recallseg.engines.budget import memory_budget
from recallseg.engines.device import Device, open_device
from recallseg.engines.device.device import PROVIDERS
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.pixels.device import kernel_image
from recallseg.engines.registry import engine_class
from recallseg.engines.verification import mask_dice
from recallseg.runtime.model.device import DeviceModel

ENGINE = "onnxruntime-cuda"
QUERIES = 20
LEAST_DICE = 0.99
"""Of the same graphs in fp32 on CPU and GPU: pixels at a border may fall either way."""


def picture(seed: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:200, :220]
    mask = np.hypot(y - rng.uniform(80, 120), x - rng.uniform(80, 120)) < 50
    image = 200 + 900 * mask + rng.normal(0, 60, mask.shape)
    return image.clip(0).astype(np.uint16), mask


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    made = Library.create(tmp_path_factory.mktemp("l") / "library", Bundle.open("demo"), threads=1)
    for seed in range(5):
        image, mask = picture(seed)
        made.add(image, {"disc": mask})
    return made


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is noted which graphs were proven on the stand-in GPU: once is enough here."""
    return tmp_path_factory.mktemp("proven")


@pytest.fixture(params=["stand-in", *(pytest.param(p, marks=pytest.mark.gpu) for p in PROVIDERS)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, proven: Path) -> Device:
    if request.param == "stand-in":
        install(monkeypatch, proven)
        return HostGpu.open(deferred=True)
    monkeypatch.setenv("RECALLSEG_CACHE", str(proven))
    try:
        engine_class(ENGINE).require_library()  # type: ignore[attr-defined]
        return open_device(request.param)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_queries_are_those_of_the_cpu_and_take_nothing(
    device: Device, library: Library, cuda_graphs: bool
) -> None:
    gpu = GpuOptions(device, cuda_graphs=cuda_graphs)
    segmenter = Segmenter(library, k=3, engine=ENGINE, gpu=gpu)
    reference = Segmenter(library, k=3, threads=1)
    images = [picture(seed)[0] for seed in range(10, 13)]
    expected = [reference.segment(image) for image in images]
    for _ in range(3):  # as it is, recorded, replayed
        for image, cpu in zip(images, expected, strict=True):
            found = segmenter.segment(image)
            assert mask_dice(found.masks["disc"], cpu.masks["disc"]) >= LEAST_DICE
            assert found.recalled["disc"][0].key == cpu.recalled["disc"][0].key
    allocations, free = device.allocations, device.free_memory()
    for number in range(QUERIES):
        segmenter.segment(images[number % len(images)])
    assert device.allocations == allocations
    assert device.free_memory() == free

    # The same image, written to the device on a stream of the caller's, and read after it.
    theirs, pinned = device.new_stream(), device.allocate_pinned(images[0].nbytes)
    pinned.array[:] = images[0].reshape(-1).view(np.uint8)
    there = device.tensor(images[0].shape, images[0].dtype)
    theirs.copy_in(there, pinned.array)
    interface = {**there.__cuda_array_interface__, "stream": theirs.handle}
    array: Any = SimpleNamespace(__cuda_array_interface__=interface)
    found = segmenter.segment(array)
    assert mask_dice(found.masks["disc"], expected[0].masks["disc"]) >= LEAST_DICE


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_queries_in_flight_are_those_of_one_after_the_other(
    device: Device, library: Library, cuda_graphs: bool
) -> None:
    """From the first query on, when graphs are recorded, and beside another thread's."""
    gpu = GpuOptions(device, cuda_graphs=cuda_graphs)
    images = [picture(seed)[0] for seed in range(10, 14)]
    with (
        Segmenter(library, k=3, engine=ENGINE, gpu=gpu) as segmenter,
        Segmenter(library, k=2, model=segmenter.model) as other,
    ):
        handed = [segmenter.segment_async(image) for image in images]
        beside = [other.segment(image) for image in images]
        first = [promise.result() for promise in handed]
        expected = [segmenter.segment(image) for image in images]
        again = [other.segment(image) for image in images]
        found = first + [segmenter.segment_async(image).result() for image in images]
        for one, wanted in zip([*found, *beside], [*expected, *expected, *again], strict=True):
            assert np.array_equal(one.label_map, wanted.label_map)
        allocations, free = device.allocations, device.free_memory()
        for number in range(QUERIES):
            handed.append(segmenter.segment_async(images[number % len(images)]))
        for number, promise in enumerate(handed):
            assert np.array_equal(promise.result().label_map, expected[number % 4].label_map)
        assert (device.allocations, device.free_memory()) == (allocations, free)


@pytest.mark.timeout(900)
def test_floats_that_lie_on_the_device(device: Device, library: Library) -> None:
    segmenter = Segmenter(library, k=3, engine=ENGINE, gpu=GpuOptions(device))
    image = picture(10)[0].astype(np.float32)
    expected = segmenter.segment(image)
    there = device.tensor(image.shape, np.float32)
    device.stream.copy_in(there, image)
    device.stream.synchronize()
    assert np.array_equal(segmenter.segment(there).label_map, expected.label_map)
    image[7, 9] = np.nan
    device.stream.copy_in(there, image)
    device.stream.synchronize()
    with pytest.raises(InputError, match="has 1 NaN or infinite pixels"):
        segmenter.segment(there)


def test_int8_memories_are_decoded_where_they_lie(device: Device, tmp_path: Path) -> None:
    with Library.create(tmp_path / "library", "demo", threads=1, memory_format="int8") as library:
        for seed in range(3):
            image, mask = picture(seed)
            library.add(image, {"disc": mask})
        segmenter = Segmenter(library, k=3, engine=ENGINE, gpu=GpuOptions(device))
        reference = Segmenter(library, k=3, threads=1)
        for seed in (10, 11):  # copied there, and there already
            image = picture(seed)[0]
            found, cpu = segmenter.segment(image), reference.segment(image)
            assert mask_dice(found.masks["disc"], cpu.masks["disc"]) >= LEAST_DICE
    assert isinstance(segmenter.model, DeviceModel)
    assert [*segmenter.model.caches] == ["int8" if _kernels_built() else "fp32"]


def _kernels_built() -> bool:
    try:
        kernel_image()
    except EngineUnavailableError:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("device", PROVIDERS, indirect=True)
def test_a_models_memory_is_what_the_budget_says(device: Device, library: Library) -> None:
    """Of a second model: the first has brought the context, and the libraries what they keep."""
    image = picture(10)[0]
    first = Segmenter(library, k=3, engine=ENGINE, gpu=GpuOptions(device))
    first.segment(image)
    free = device.free_memory()
    second = Segmenter(library, k=3, engine=ENGINE, gpu=GpuOptions(device))
    for _ in range(3):
        second.segment(image)
    taken = free - device.free_memory()
    budget = memory_budget(library.bundle, k=3, n=1, precision="fp32", engine=ENGINE, shared=False)
    said = sum(line.size for line in budget.lines if line.kind != "assumed")
    assert said == pytest.approx(taken, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("device", PROVIDERS, indirect=True)
def test_an_image_of_pytorch(device: Device, library: Library) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no GPU")
    image = picture(10)[0].astype(np.float32)
    segmenter = Segmenter(library, k=3, engine=ENGINE, gpu=GpuOptions(device))
    expected = segmenter.segment(image)
    work = torch.zeros((4096, 4096), device="cuda")
    for _ in range(20):
        work = work @ work  # the default stream is busy when the image is handed over
    there = torch.from_numpy(image).to("cuda", non_blocking=True) + work[0, 0]
    found = segmenter.segment(there)
    assert mask_dice(found.masks["disc"], expected.masks["disc"]) >= LEAST_DICE
