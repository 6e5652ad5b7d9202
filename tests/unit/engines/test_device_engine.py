"""Engines on a device: staging, recordings, and what they refuse."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from support.fake_driver import FakeDriver

from recallseg.engines.device import Device, DeviceTensor, Kernels
from recallseg.engines.device_engine import MOST_BINDINGS, DeviceEngine
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import DeviceLostError, EngineRunError
from recallseg.engines.fake import FakeEngine
from recallseg.engines.specs import GraphSpec, TensorSpec

SPEC = GraphSpec(
    "double", (TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("y", "float32", ("n", 4)),)
)


class Doubling(DeviceEngine):
    """y = 2 x by a kernel."""

    name: ClassVar[str] = "doubling"
    variants: ClassVar[tuple[str, ...]] = ()
    enqueued = 0
    _kernels: Kernels | None = None

    @classmethod
    def require_library(cls) -> None:
        pass

    def _enqueue(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        self.enqueued += 1
        x, y = inputs["x"], outputs["y"]
        arguments = [
            ctypes.c_uint64(x.address),
            ctypes.c_uint64(y.address),
            ctypes.c_int32(x.nbytes),
        ]
        if self._kernels is None:
            self._kernels = self.device.load_kernels(b"double")
        self._kernels.launch("double", (1, 1, 1), (1, 1, 1), arguments, self.stream)


def double(grid: object, block: object, arguments: list[ctypes.c_uint64]) -> None:
    x, y, size = (argument.value for argument in arguments)
    source = np.frombuffer((ctypes.c_uint8 * size).from_address(x), np.float32)
    np.frombuffer((ctypes.c_uint8 * size).from_address(y), np.float32)[:] = 2 * source


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(kernels={"double": double})  # type: ignore[dict-item]


def rows(n: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.arange(4 * n, dtype=np.float32).reshape(n, 4)


def test_arrays_of_the_host_are_staged_and_staging_only_grows(driver: FakeDriver) -> None:
    engine = Doubling(SPEC, device=Device(driver))
    for n, allocations in ((2, 2), (2, 2), (1, 2), (3, 4)):
        y = np.zeros((n, 4), np.float32)
        engine.run({"x": rows(n)}, {"y": y})
        np.testing.assert_array_equal(y, 2 * rows(n))
        assert engine.device.allocations == allocations


def test_a_binding_is_run_and_recorded_then_replayed(driver: FakeDriver) -> None:
    device = Device(driver)
    engine = Doubling(SPEC, options=EngineOptions(device=device, cuda_graphs=True))
    for _ in range(4):
        for n in (2, 1):  # each shape has a recording of its own
            y = np.zeros((n, 4), np.float32)
            engine.run({"x": rows(n)}, {"y": y})
            np.testing.assert_array_equal(y, 2 * rows(n))
    assert engine.enqueued == 4
    assert driver.calls.count("launch_graph") == 6
    x, y = device.tensor((1, 4)), device.tensor((1, 4))
    engine.run({"x": x}, {"y": y})
    assert engine.enqueued == 6  # other addresses are another binding


def test_recordings_are_bounded(driver: FakeDriver) -> None:
    device = Device(driver)
    engine = Doubling(SPEC, options=EngineOptions(device=device, cuda_graphs=True))
    x = device.tensor((MOST_BINDINGS + 5, 4))
    y = device.tensor((MOST_BINDINGS + 5, 4))
    for _ in range(2):
        for n in range(1, MOST_BINDINGS + 6):
            engine.run({"x": x.rows(n)}, {"y": y.rows(n)})
            engine.run({"x": x.rows(n)}, {"y": y.rows(n)})
    assert driver.live["executable"] <= MOST_BINDINGS + 1


def test_a_graph_goes_to_the_stream_that_it_was_given(driver: FakeDriver) -> None:
    device = Device(driver)
    side = device.new_stream()
    assert Doubling(SPEC, options=EngineOptions(device=device)).stream is device.stream
    options = EngineOptions(device=device, streams={"double": side})
    assert Doubling(SPEC, options=options).stream is side


def test_a_lost_device_is_named(driver: FakeDriver) -> None:
    engine = Doubling(SPEC, device=Device(driver))
    driver.fail("copy_in", 719)
    y = np.zeros((1, 4), np.float32)
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="engine onnxruntime-cpu"):
            engine.run({"x": rows(1)}, {"y": y})


def test_engines_of_the_cpu_refuse_tensors_of_a_device(driver: FakeDriver) -> None:
    device = Device(driver)
    engine = FakeEngine(SPEC)
    with pytest.raises(EngineRunError, match="runs on the CPU and got tensors that lie on a GPU"):
        engine.run({"x": device.tensor((1, 4))}, {"y": device.tensor((1, 4))})


def test_rows_of_a_tensor_on_the_device(driver: FakeDriver) -> None:
    tensor = Device(driver).tensor((3, 4))
    assert tensor.row(2).address == tensor.address + 32
    assert tensor.row(2).shape == (4,)
    with pytest.raises(EngineRunError, match="row 3 of 3"):
        tensor.row(3)
