"""The state machines above the driver, on the stand-in."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import device_checks
from support.fake_driver import FakeDriver

from recallseg.engines.device import Device, DeviceTensor, adopt_tensor, on_gpu, open_device
from recallseg.engines.device.driver import LOST, DriverError, explain
from recallseg.engines.device.pycuda import pack
from recallseg.engines.errors import (
    DeviceLostError,
    DeviceMemoryError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
)


def fill_bytes(
    grid: tuple[int, int, int], block: tuple[int, int, int], args: Sequence[Any]
) -> None:
    address, count, value = (argument.value for argument in args)
    ctypes.memset(address, value, min(count, grid[0] * block[0]))


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(kernels={"fill_bytes": fill_bytes})


@pytest.mark.parametrize("name", device_checks.CHECKS)
def test_the_stand_in_does_what_a_provider_must(driver: FakeDriver, name: str) -> None:
    device = Device(driver)
    device_checks.CHECKS[name](device)
    gc.collect()
    assert device.live_bytes == 0
    assert driver.live["buffers"] == driver.live["pinned"] == 0


@pytest.mark.parametrize("status", sorted(LOST))
def test_a_lost_device_stays_lost_and_says_how_to_go_on(driver: FakeDriver, status: int) -> None:
    device = Device(driver)
    tensor = device.tensor((4,))
    driver.fail("synchronize_stream", status, after=1)
    device.stream.synchronize()
    with pytest.raises(DeviceLostError, match="onnxruntime-cpu"):
        device.stream.synchronize()
    assert device.lost
    calls = len(driver.calls)
    with pytest.raises(DeviceLostError):
        device.stream.copy_in(tensor, np.zeros(4, np.float32))
    del tensor
    gc.collect()
    assert len(driver.calls) == calls  # a dead driver is left alone, also by what is given back


def test_a_device_lost_to_another_user_is_given_back_in_silence(driver: FakeDriver) -> None:
    first, second = Device(driver), Device(driver)
    buffer = second.allocate(100)
    driver.fail("synchronize", 719)
    with pytest.raises(DeviceLostError):
        first.synchronize()
    buffer.close()
    assert second.lost


def test_what_is_given_back_is_given_back_once(driver: FakeDriver) -> None:
    device = Device(driver)
    buffer = device.allocate(100)
    buffer.close()
    buffer.close()
    assert driver.calls.count("free") == 1


def test_too_little_memory_is_said_before_anything_is_taken() -> None:
    device = Device(FakeDriver(memory=100 << 20))
    with pytest.raises(DeviceMemoryError, match=r"workspace needs 200 MiB .* 100 MiB are free"):
        device.require(200 << 20, "The workspace")
    assert device.allocations == 0


def test_a_driver_that_is_too_old_is_refused() -> None:
    with pytest.raises(EngineUnavailableError, match=r"CUDA 10\.2, needed is 11\.4"):
        Device(FakeDriver(cuda=10020))


@pytest.mark.parametrize("ordinal", [1, -1])
def test_a_gpu_that_is_not_there_is_refused(ordinal: int) -> None:
    with pytest.raises(EngineUnavailableError, match=f"GPU {ordinal} was asked for"):
        Device(FakeDriver(), ordinal)


def test_a_callers_context_is_kept() -> None:
    driver = FakeDriver()
    driver.set_context(5)
    device = Device(driver)
    assert "retain_primary_context" not in driver.calls
    driver.set_context(9)
    device.enter()
    assert driver.current_context() == 5


def test_a_capture_that_breaks_leaves_nothing_behind(driver: FakeDriver) -> None:
    device = Device(driver)
    tensor = device.tensor((4,))

    def take_memory_while_capturing() -> None:
        with device.stream.capture():
            device.stream.copy_in(tensor, np.ones(4, np.float32))
            device.tensor((4,))

    with pytest.raises(EngineRunError, match="capturing"):
        take_memory_while_capturing()
    assert "executable" not in driver.live
    device.stream.synchronize()


class Foreign:
    def __init__(self, **fields: int) -> None:
        vars(self).update(fields)


@pytest.mark.parametrize("name", ["handle", "ptr", "cuda_stream"])
def test_a_callers_stream_is_used(driver: FakeDriver, name: str) -> None:
    device = Device(driver)
    handle = device.new_stream()
    theirs = device.adopt_stream(Foreign(**{name: handle.handle}))
    assert theirs.handle == handle.handle
    del theirs
    gc.collect()
    handle.synchronize()  # was not destroyed with our view of it


def test_what_is_no_stream_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(InputError, match="no CUDA stream"):
        Device(driver).adopt_stream("mine")


def test_kernel_parameters_are_aligned_as_a_compiler_does() -> None:
    packed = pack((ctypes.c_uint32(1), ctypes.c_uint64(2), ctypes.c_uint8(3), ctypes.c_float(4.0)))

    class Parameters(ctypes.Structure):
        _fields_ = (
            ("a", ctypes.c_uint32),
            ("b", ctypes.c_uint64),
            ("c", ctypes.c_uint8),
            ("d", ctypes.c_float),
        )

    assert packed == bytes(Parameters(1, 2, 3, 4.0))


@pytest.mark.parametrize("status", [1, 2, 35, 100, 200, 700, 801, 803, 12345])
def test_every_status_says_how_to_mend_it(status: int) -> None:
    error = explain(DriverError(status, "cuCall", "words"))
    assert "cuCall" in str(error)
    assert str(status) in str(error)


def test_there_is_no_other_provider() -> None:
    with pytest.raises(InputError, match="auto, cuda-bindings, pycuda"):
        open_device("opencl")  # type: ignore[arg-type]


def test_the_context_of_another_gpu_is_refused() -> None:
    driver = FakeDriver(devices=2)
    driver.set_context(5)
    with pytest.raises(InputError, match="current in this thread is on GPU 0"):
        Device(driver, 1)


def test_the_default_stream_has_a_name_and_cannot_be_recorded(driver: FakeDriver) -> None:
    # 0 is what PyTorch's default stream says, and what libraries take for "none was given".
    device = Device(driver, stream=0)
    assert device.stream.handle == 1
    with (
        pytest.raises(EngineUnavailableError, match="pass a stream of your own"),
        device.stream.capture(),
    ):
        pass
    assert "begin_capture" not in driver.calls


def test_what_spoils_a_recording_is_what_is_said(driver: FakeDriver) -> None:
    device = Device(driver)
    driver.fail("end_capture", 901)  # as the driver says of a recording that was spoilt

    def spoil() -> None:
        with device.stream.capture():
            raise EngineRunError("the real reason")

    with pytest.raises(EngineRunError, match="the real reason"):
        spoil()


def test_a_lost_device_is_told_from_a_library_that_failed(driver: FakeDriver) -> None:
    device = Device(driver)
    driver.fail("synchronize", 1)
    device.probe()
    driver.fail("synchronize", 700)
    with pytest.raises(DeviceLostError):
        device.probe()


class Array:
    """A caller's array by its interface."""

    def __init__(self, tensor: DeviceTensor, **change: Any) -> None:
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, **change}


@pytest.mark.parametrize("foreign", [True, False])
def test_what_a_caller_queued_is_done_before_we_read(
    foreign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDriver, "foreign_streams", foreign)  # PyCUDA knows its own only
    driver = FakeDriver(deferred=True)
    device = Device(driver)
    theirs, tensor = device.new_stream(), device.tensor((1000,))
    pinned = device.allocate_pinned(4000)
    pinned.array.view(np.float32)[:] = 7.0
    theirs.copy_in(tensor, pinned.array)
    found = np.zeros(1000, np.float32)
    device.stream.copy_out(found, tensor)
    assert not (found == 7.0).any()  # nobody waited: the stand-in shows it
    for _ in range(2):
        adopted = adopt_tensor(Array(tensor, stream=theirs.handle), device)
        device.stream.copy_out(found, adopted)
        assert (found == 7.0).all()
    assert driver.calls.count("create_event") == foreign


def test_read_only_and_masked_arrays(driver: FakeDriver) -> None:
    device = Device(driver)
    tensor = device.tensor((4,))
    assert not adopt_tensor(Array(tensor), device).read_only
    taken = adopt_tensor(Array(tensor, data=(tensor.address, True)), device)
    assert taken.read_only
    assert taken.rows(2).read_only
    assert taken.__cuda_array_interface__["data"] == (tensor.address, True)
    with pytest.raises(InputError, match="masked"):
        adopt_tensor(Array(tensor, mask=Array(tensor)), device)


def test_parts_of_a_tensor_share_its_memory(driver: FakeDriver) -> None:
    tensor = Device(driver).tensor((6, 2))
    part = tensor.part(2, 3)
    assert (part.address, part.shape) == (tensor.address + 16, (3, 2))
    with pytest.raises(EngineRunError, match="rows 5 to 8 of 6"):
        tensor.part(5, 3)


def test_arrays_of_a_gpu_are_told_from_others() -> None:
    assert not on_gpu(np.zeros(3))
    assert not on_gpu([1, 2])
    assert on_gpu(Array(DeviceTensor(256, (4,), np.dtype(np.uint8))))


def test_a_device_that_nobody_has_any_more_gives_all_back(driver: FakeDriver) -> None:
    device = Device(driver)
    other = device.new_stream()
    device.wait_for(other.handle)  # keeps an event for its own stream
    held = [device.allocate(64), device.allocate_pinned(64), device.tensor((3, 2))]
    gone = weakref.ref(device)
    del device, other
    gc.collect()
    assert gone() is not None  # what lies on it needs it
    held.append(held)  # as objects that refer to each other do
    del held
    gc.collect()
    gc.collect()  # a device and its stream too, once nothing lies on it
    assert gone() is None
    assert not any(driver.live.values()), driver.live
