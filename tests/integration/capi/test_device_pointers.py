"""Device pointers through librecallseg, on stand-ins for the driver and for ONNX Runtime's GPU.

The library is loaded into this process, so that what it calls can be stood in for; the device's
memory lies on the host, and its addresses are checked as the driver checks them.
"""

from __future__ import annotations

import ctypes as c
import json
import math
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
from numpy.typing import NDArray
from support.emulated_gpu import KERNELS, emulated_kernels
from support.fake_driver import FakeDriver
from support.fake_onnxruntime import FakeSession
from support.fake_tensorrt import HostGpu
from support.native import Installed
from support.pictures import disc

from recallseg.benchmarks.makers.capi import UINT8, _Image, _Output, _SegmenterOptions
from recallseg.engines.device import Device
from recallseg.engines.device.driver import DriverError
from recallseg.runtime.model import device as device_model
from recallseg.runtime.services import c_interface

OK, ARGUMENT, INPUT = 0, 1, 7
CUDA = 1
UINT16 = 3


class Image(_Image):
    _fields_ = (("location", c.c_int32), ("reserved2", c.c_int32), ("stream", c.c_void_p))


class Output(_Output):
    _fields_ = (("location", c.c_int32), ("reserved2", c.c_int32), ("stream", c.c_void_p))


class GpuOptions(c.Structure):
    _fields_ = (
        ("struct_size", c.c_uint32),
        ("ordinal", c.c_int32),
        ("stream", c.c_void_p),
        ("provider", c.c_char_p),
        ("cuda_graphs", c.c_int32),
        ("reserved", c.c_int32),
        ("cache_bytes", c.c_uint64),
    )


class SegmenterOptions(_SegmenterOptions):
    _fields_ = (("audit", c.c_void_p), ("gpu", c.POINTER(GpuOptions)))


class Score(c.Structure):
    _fields_ = (
        *(("struct_size", c.c_uint32), ("label", c.c_int32), ("structure", c.c_char_p)),
        *(("present", c.c_int32), ("reserved", c.c_int32), ("iou", c.c_double)),
        *(("object_score", c.c_double), ("distance", c.c_double), ("pixels", c.c_uint64)),
        *(("area_mm2", c.c_double), ("recalled_count", c.c_size_t), ("reasons", c.c_size_t)),
        ("presence", c.c_double),
    )


class Host:
    """A C program, as far as these tests need one."""

    def __init__(self, file: Path, folder: Path, driver: FakeDriver) -> None:
        self.c, self.driver = c.CDLL(str(file)), driver
        self.c.recallseg_last_error.restype = c.c_char_p
        assert self.c.recallseg_init(c.c_uint32(2), None) == OK
        self.library = c.c_void_p()
        self.passed(
            self.c.recallseg_library_open(str(folder).encode(), None, c.byref(self.library))
        )
        self.image: NDArray[np.uint8] = disc(0.45).image
        self.rows, self.columns = self.image.shape

    def passed(self, status: int) -> None:
        assert status == OK, (status, self.said)

    @property
    def said(self) -> str:
        return str(self.c.recallseg_last_error().decode())

    def put(self, array: NDArray[Any]) -> int:
        address = self.driver.allocate(array.nbytes)
        c.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def segmenter(
        self, engine: str, *, expected: int = OK, audit: Any = None, **gpu: Any
    ) -> c.c_void_p:
        options = SegmenterOptions(
            c.sizeof(SegmenterOptions), 2, engine=engine.encode(), reach=math.inf, audit=audit
        )
        if engine != "onnxruntime-cpu" or gpu:
            options.gpu = c.pointer(GpuOptions(c.sizeof(GpuOptions), **gpu))
        made = c.c_void_p()
        found = self.c.recallseg_segmenter_open(self.library, c.byref(options), c.byref(made))
        assert found == expected, self.said
        return made

    def on_host(self) -> tuple[Image, Output, NDArray[np.uint8], NDArray[np.uint8]]:
        labels = np.full((self.rows, self.columns), 99, np.uint8)
        masks = np.full((2, self.rows, self.columns), 99, np.uint8)
        image = Image(c.sizeof(Image), UINT8, self.image.ctypes.data, 2)
        image.shape[:2] = (self.rows, self.columns)
        output = Output(c.sizeof(Output), 0, self.rows, self.columns, labels.ctypes.data)
        output.masks, output.mask_count = masks.ctypes.data, 2
        return image, output, labels, masks

    def on_device(self) -> tuple[Image, Output]:
        image, output, labels, masks = self.on_host()
        image.data, image.location = self.put(self.image), CUDA
        output.label_map, output.masks = self.put(labels), self.put(masks)
        output.location = CUDA
        return image, output

    def segment(
        self, segmenter: c.c_void_p, image: Image, output: Output, expected: int = OK
    ) -> c.c_void_p:
        result = c.c_void_p()
        status = self.c.recallseg_segment(
            segmenter, c.byref(image), c.byref(output), c.c_double(0), c.byref(result)
        )
        assert status == expected, (status, self.said)
        return result

    def pixels(self, result: c.c_void_p, structure: int) -> int:
        score = Score(c.sizeof(Score))
        self.passed(self.c.recallseg_result_score(result, c.c_size_t(structure), c.byref(score)))
        return int(score.pixels)

    def read(self, address: int, *shape: int) -> NDArray[np.uint8]:
        return np.frombuffer(c.string_at(address, math.prod(shape)), np.uint8).reshape(shape)


def start(
    capi: Installed,
    library: Path,
    emulator: c.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    **facts: Any,
) -> Any:
    driver = FakeDriver(kernels=emulated_kernels(emulator), **facts)
    HostGpu.driver = driver
    Device(driver)  # makes its context current, as a host's would be
    monkeypatch.setattr(c_interface, "_devices", WeakValueDictionary())
    monkeypatch.setattr(device_model, "kernel_image", lambda: " ".join(KERNELS).encode())
    monkeypatch.setattr(
        c_interface, "open_device", lambda _, ordinal, stream: Device(driver, ordinal, stream)
    )
    return Host(capi.file, library, driver)


@pytest.fixture
def host(
    capi: Installed,
    real_library: Path,
    emulator: c.CDLL,
    session: type[FakeSession],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    made = start(capi, real_library, emulator, monkeypatch)
    yield made
    assert made.c.recallseg_shutdown() == OK


def test_pixels_and_masks_may_lie_on_the_gpu(host: Host) -> None:
    segmenter = host.segmenter("onnxruntime-cuda")
    image, output, labels, masks = host.on_host()
    expected = host.segment(segmenter, image, output)
    assert set(np.unique(labels)) == {0, 1, 2}

    there, into = host.on_device()
    result = host.segment(segmenter, there, into)
    assert np.array_equal(host.read(into.label_map, *labels.shape), labels)
    assert np.array_equal(host.read(into.masks, *masks.shape), masks)
    for structure in range(2):
        assert host.pixels(result, structure) == host.pixels(expected, structure) > 0
        assert host.pixels(result, structure) == masks[structure].sum()
    labels[:] = 0
    host.segment(segmenter, there, output)  # in there, out here
    assert np.array_equal(host.read(into.label_map, *labels.shape), labels)


def test_segmenters_with_equal_options_share_a_model(
    host: Host, session: type[FakeSession]
) -> None:
    host.segmenter("onnxruntime-cuda", cache_bytes=1 << 20)
    made = len(session.made)
    host.segmenter("onnxruntime-cuda", cache_bytes=1 << 20)
    assert len(session.made) == made
    host.segmenter("onnxruntime-cuda", cache_bytes=1 << 21)
    assert len(session.made) > made


def test_work_is_queued_on_the_callers_stream(host: Host, session: type[FakeSession]) -> None:
    mine = host.driver.create_stream()
    host.segmenter("onnxruntime-cuda", stream=mine)
    assert str(mine) in {options["user_compute_stream"] for _, options, _ in session.made}


def test_pixels_that_are_still_on_their_way_are_waited_for(
    capi: Installed,
    real_library: Path,
    emulator: c.CDLL,
    session: type[FakeSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = start(capi, real_library, emulator, monkeypatch, deferred=True)
    segmenter = host.segmenter("onnxruntime-cuda")
    image, output, labels, _ = host.on_host()
    host.segment(segmenter, image, output)
    mine = host.driver.create_stream()
    there, into = host.on_device()
    wanted, blank = there.data, host.put(np.zeros_like(host.image))
    host.driver.copy(blank, wanted, host.image.nbytes, mine)  # queued, not done
    there.data, there.stream = blank, mine
    host.segment(segmenter, there, into)
    assert np.array_equal(host.read(into.label_map, *labels.shape), labels)
    host.passed(host.c.recallseg_shutdown())


def test_pointers_that_cannot_be_used_are_told_apart(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = host.segmenter("onnxruntime-cuda")
    good = host.on_device()

    def refused(status: int, *words: str, **change: Any) -> None:
        image, output = Image.from_buffer_copy(good[0]), Output.from_buffer_copy(good[1])
        for name, value in change.items():
            of, _, member = name.partition("__")
            setattr({"image": image, "output": output}[of], member, value)
        host.segment(segmenter, image, output, status)
        for word in words:
            assert word in host.said

    freed = host.put(host.image)
    place = host.driver._blocks[freed]
    host.driver.free(freed)
    refused(INPUT, "belongs to no GPU", "freed", image__data=freed)
    refused(INPUT, "belongs to no GPU", output__label_map=freed)
    del place  # until here nothing else could get it
    refused(INPUT, "belongs to no GPU", image__data=host.image.ctypes.data)  # the host's
    odd = host.put(np.zeros(4096, np.uint8)) + 1
    refused(ARGUMENT, "aligned", image__data=odd, image__dtype=UINT16)
    refused(ARGUMENT, "null", image__data=None)
    refused(ARGUMENT, "unknown location 7", image__location=7)
    refused(ARGUMENT, "lies on the host", image__location=0, image__stream=5)
    refused(3, "reserved2", output__reserved2=1)
    padded = (c.c_int64 * 3)(host.columns + 8, 1, 0)
    refused(INPUT, "contiguous", image__strides=padded)

    # A stream of another context, one that is none, and the default ones.
    context = host.driver.current_context()
    host.driver.set_context(77)
    foreign = host.driver.create_stream()
    host.driver.set_context(context)
    refused(INPUT, "another context", image__stream=foreign)
    refused(INPUT, "another context", output__stream=foreign)
    host.segmenter("onnxruntime-cuda", expected=INPUT, stream=foreign)
    assert "another context" in host.said
    gone = host.driver.create_stream()
    host.driver.destroy_stream(gone)
    refused(INPUT, "was destroyed", image__stream=gone)
    for default in (1, 2):
        refused(OK, image__stream=default)

    # Memory of another GPU.
    other = host.put(host.image)
    here = host.driver.ordinal_of
    monkeypatch.setattr(host.driver, "ordinal_of", lambda a: 1 if a == other else here(a))
    refused(INPUT, "belongs to GPU 1", "runs on GPU 0", image__data=other)
    refused(OK)  # goes on


def test_a_lost_device_is_not_called_a_bad_stream(host: Host) -> None:
    segmenter = host.segmenter("onnxruntime-cuda")
    image, output = host.on_device()
    image.stream = host.driver.create_stream()
    host.driver.fail("context_of", 700)
    host.segment(segmenter, image, output, 10)
    assert "the GPU was lost" in host.said


def test_engines_on_the_cpu_refuse_device_pointers_and_gpu_options(host: Host) -> None:
    segmenter = host.segmenter("onnxruntime-cpu")
    there, into = host.on_device()
    _, output, _, _ = host.on_host()
    host.segment(segmenter, there, output, INPUT)
    assert "runs on the CPU" in host.said
    image, *_ = host.on_host()
    host.segment(segmenter, image, into, INPUT)
    assert "the output lies on a GPU" in host.said
    host.segmenter("onnxruntime-cpu", expected=INPUT, ordinal=0, cache_bytes=1)
    assert "leave gpu null" in host.said
    host.segmenter("onnxruntime-cuda", expected=9, ordinal=3)
    assert "GPU 3 was asked for" in host.said
    stream = c.c_void_p()
    ignored = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p)(lambda frame, user: None)
    host.passed(host.c.recallseg_stream_open(segmenter, None, ignored, None, c.byref(stream)))
    assert host.c.recallseg_stream_push(stream, c.byref(there), None) == INPUT
    assert "runs on the CPU" in host.said


def test_frames_on_the_gpu_are_streamed(host: Host) -> None:
    segmenter = host.segmenter("onnxruntime-cuda")
    image, output, labels, _ = host.on_host()
    host.segment(segmenter, image, output)

    class Frame(c.Structure):
        _fields_ = (
            *(("struct_size", c.c_uint32), ("status", c.c_int32), ("number", c.c_uint64)),
            *(("waited", c.c_double), ("latency", c.c_double), ("rows", c.c_int64)),
            *(("columns", c.c_int64), ("label_map", c.c_void_p)),
        )

    told: list[Any] = []

    def tell(frame: Any, user: Any) -> None:
        found = frame.contents
        told.append((found.status, found.label_map and host.read(found.label_map, *labels.shape)))

    callback = c.CFUNCTYPE(None, c.POINTER(Frame), c.c_void_p)(
        lambda frame, user: tell(frame, user)
    )
    stream = c.c_void_p()
    host.passed(host.c.recallseg_stream_open(segmenter, None, callback, None, c.byref(stream)))
    there, _ = host.on_device()
    host.passed(host.c.recallseg_stream_push(stream, c.byref(there), None))
    c.memset(there.data, 0, host.image.nbytes)  # it was copied
    host.passed(host.c.recallseg_stream_drain(stream, c.c_double(60e3)))
    host.passed(host.c.recallseg_stream_close(stream))
    [(status, found)] = told
    assert status == OK
    assert np.array_equal(found, labels)


def test_an_audited_result_on_the_gpu_has_the_entry_of_the_same_on_the_host(
    host: Host, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    audit = c.c_void_p()
    host.passed(host.c.recallseg_audit_open(str(log).encode(), None, c.byref(audit)))
    segmenter = host.segmenter("onnxruntime-cuda", audit=audit)
    image, output, *_ = host.on_host()
    host.segment(segmenter, image, output)
    there, into = host.on_device()
    host.segment(segmenter, there, into)
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    for name in ("image", "label_map", "pixels", "provenance"):
        assert first[name] == second[name]
    log.rename(tmp_path / "aside")
    host.segment(segmenter, there, into, 21)
    assert not host.read(into.label_map, host.rows, host.columns).any()
    assert not host.read(into.masks, 2, host.rows, host.columns).any()


def test_exemplars_come_from_the_host(host: Host) -> None:
    class Exemplar(c.Structure):
        _fields_ = (
            *(("struct_size", c.c_uint32), ("reserved", c.c_uint32), ("masks", c.c_void_p)),
            *(("mask_count", c.c_size_t), ("absent", c.c_void_p), ("absent_count", c.c_size_t)),
            *(("tags", c.c_void_p), ("tag_count", c.c_size_t), ("key", c.c_char_p)),
        )

    there, _ = host.on_device()
    exemplar = Exemplar(c.sizeof(Exemplar))
    status = host.c.recallseg_library_add(
        host.library, c.byref(there), c.byref(exemplar), None, c.c_size_t(0)
    )
    assert status == INPUT
    assert "copy it to the host" in host.said


def test_the_stand_in_refuses_what_it_never_made() -> None:
    driver = FakeDriver()
    Device(driver)
    with pytest.raises(DriverError):
        driver.context_of(123456)
