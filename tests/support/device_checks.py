"""What a provider must do, on a real GPU or on the stub: ``python -m support.device_checks NAME``.

Prints a line of JSON: the names of the checks that passed. It is a program of its own because a
process loads one driver.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np

from recallseg.engines.device import Device, adopt_tensor, open_device
from recallseg.engines.errors import (
    DeviceMemoryError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
)

FILL = b"""
.version 6.4
.target sm_50
.address_size 64
.visible .entry fill_bytes(.param .u64 address, .param .u32 count, .param .u32 value) {
  .reg .u64 %d<4>; .reg .u32 %r<6>; .reg .pred %p;
  ld.param.u64 %d0, [address]; ld.param.u32 %r0, [count]; ld.param.u32 %r1, [value];
  mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x;
  mad.lo.u32 %r5, %r2, %r3, %r4;
  setp.ge.u32 %p, %r5, %r0;
  @%p bra done;
  cvta.to.global.u64 %d1, %d0; cvt.u64.u32 %d2, %r5; add.u64 %d3, %d1, %d2;
  st.global.u8 [%d3], %r1;
done:
  ret;
}
\0"""
NUMBERS = np.arange(1000, dtype=np.float32)


def raises(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")
    assert words in said, said


def check_facts(device: Device) -> None:
    assert device.facts.name
    assert 50 <= device.facts.capability < 200
    assert 0 < device.free_memory() <= device.facts.memory
    assert device.primary
    assert Device(device.driver).facts == device.facts  # in the context that is current now


def check_copies(device: Device) -> None:
    first, second = device.tensor(NUMBERS.shape), device.tensor(NUMBERS.shape)
    found = np.zeros_like(NUMBERS)
    device.stream.copy_in(first, NUMBERS)
    device.stream.copy(second, first)
    device.stream.copy_out(found, second)
    device.stream.synchronize()
    assert np.array_equal(found, NUMBERS)
    device.stream.fill(second, 0)
    device.stream.copy_out(found, second)
    device.stream.synchronize()
    assert not found.any()
    wrong = np.zeros(3, np.float32)
    raises(EngineRunError, "does not fit", lambda: device.stream.copy_in(first, wrong))
    raises(
        EngineRunError, "contiguous", lambda: device.stream.copy_in(first, NUMBERS[None].T[::-1, 0])
    )


def check_pinned(device: Device) -> None:
    pinned = device.allocate_pinned(NUMBERS.nbytes)
    pinned.array.view(np.float32)[:] = NUMBERS
    tensor = device.tensor(NUMBERS.shape)
    found = np.zeros_like(NUMBERS)
    device.stream.copy_in(tensor, pinned.array)
    device.stream.copy_out(found, tensor)
    device.stream.synchronize()
    assert np.array_equal(found, NUMBERS)
    assert pinned.device_address
    pinned.close()
    raises(EngineRunError, "closed", lambda: pinned.device_address)


def check_streams(device: Device) -> None:
    other = device.new_stream()
    start, end = device.new_event(), device.new_event()
    tensor, found = device.tensor(NUMBERS.shape), np.zeros_like(NUMBERS)
    start.record(other)
    other.copy_in(tensor, NUMBERS)
    end.record(other)
    device.stream.wait(end)
    device.stream.copy_out(found, tensor)
    device.stream.synchronize()
    end.synchronize()
    assert np.array_equal(found, NUMBERS)
    assert end.since(start) >= 0
    other.copy_in(tensor, 2 * NUMBERS)
    device.wait_for(other.handle)
    device.stream.copy_out(found, tensor)
    device.stream.synchronize()
    assert np.array_equal(found, 2 * NUMBERS)
    assert device.adopt_stream(other) is other
    if device.driver.foreign_streams:
        assert device.adopt_stream(other.handle).handle == other.handle  # of this context


def check_graph(device: Device) -> None:
    tensor, found = device.tensor(NUMBERS.shape), np.zeros_like(NUMBERS)
    source = NUMBERS.copy()

    def capture() -> Any:
        with device.stream.capture() as made:
            device.stream.copy_in(tensor, source)
            device.stream.copy_out(found, tensor)
        return made[0]

    if not device.driver.graphs:
        raises(EngineUnavailableError, "no CUDA graphs", capture)
        return
    graph = capture()
    device.stream.synchronize()
    assert not found.any(), "recording ran the work"
    for value in (1.0, 2.0):
        source[:] = value
        graph.launch(device.stream)
        device.stream.synchronize()
        assert (found == value).all()


def check_kernel(device: Device) -> None:
    kernels = device.load_kernels(FILL)
    tensor, found = device.tensor((1000,), np.uint8), np.zeros(1000, np.uint8)
    device.stream.fill(tensor, 7)
    arguments = (ctypes.c_uint64(tensor.address), ctypes.c_uint32(999), ctypes.c_uint32(42))
    kernels.launch("fill_bytes", (4, 1, 1), (256, 1, 1), arguments, device.stream)
    device.stream.copy_out(found, tensor)
    device.stream.synchronize()
    assert (found[:999] == 42).all()
    assert found[999] == 7
    raises(
        EngineRunError,
        "not found",
        lambda: kernels.launch("none", (1, 1, 1), (1, 1, 1), (), device.stream),
    )
    raises(EngineRunError, "kernels", lambda: device.load_kernels(b"no kernels\0"))


def check_adopted(device: Device) -> None:
    mine = device.tensor((4, 5))
    theirs = SimpleNamespace(__cuda_array_interface__=mine.__cuda_array_interface__)
    tensor = adopt_tensor(theirs, device)
    assert (tensor.address, tensor.shape) == (mine.address, (4, 5))

    def bad(**change: Any) -> Callable[[], object]:
        interface = {**mine.__cuda_array_interface__, **change}
        array = SimpleNamespace(__cuda_array_interface__=interface)
        return lambda: adopt_tensor(array, device)

    raises(InputError, "freed", bad(data=(0, False)))
    raises(InputError, "misaligned", bad(data=(mine.address + 2, False)))
    raises(InputError, "contiguous", bad(strides=(40, 8)))
    raises(InputError, "belongs to no GPU", bad(data=(1 << 20, False)))
    raises(InputError, "incomplete", bad(typestr=None, data=None))


def check_memory(device: Device) -> None:
    buffer = device.allocate(1 << 20)
    assert device.live_bytes >= 1 << 20
    before = device.allocations
    buffer.close()
    raises(EngineRunError, "closed", lambda: buffer.address)
    assert device.allocations == before
    much = 4 * device.facts.memory
    raises(DeviceMemoryError, "MiB are free", lambda: device.allocate(much))
    device.allocate(1 << 10).close()  # goes on


def check_threads(device: Device) -> None:
    """A thread that worked on the device ends, and nothing of the process ends with it."""
    found = [np.zeros_like(NUMBERS) for _ in range(3)]

    def work(out: Any) -> None:
        device.enter()
        tensor = device.tensor(NUMBERS.shape)
        stream = device.new_stream()
        stream.copy_in(tensor, NUMBERS)
        stream.copy_out(out, tensor)
        stream.synchronize()

    for out in found:
        thread = Thread(target=work, args=(out,))
        thread.start()
        thread.join()
        assert np.array_equal(out, NUMBERS)
    check_copies(device)  # this thread's context is what it was


CHECKS = {name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")}


def main(provider: Any) -> int:
    late: list[Device] = []
    # Runs after whatever the provider registers.
    atexit.register(lambda: [device.enter() for device in late])
    device = open_device(provider)
    passed = []
    for name, check in CHECKS.items():
        check(device)
        passed.append(name)
    gc.collect()
    assert device.live_bytes == 0, device.live_bytes
    late.append(device)
    print(
        json.dumps({"provider": device.driver.name, "passed": passed, "device": str(device.facts)})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
