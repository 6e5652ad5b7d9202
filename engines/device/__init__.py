"""A GPU behind one small interface: memory, streams, events, graphs, kernels, errors.

Two providers reach the driver: NVIDIA's ``cuda-bindings`` and PyCUDA. Everything above them is the
same code, and runs on the tests' ``FakeDriver`` as well, on any machine.
"""

from recallseg.engines.device.device import Device, DeviceFacts, open_device
from recallseg.engines.device.memory import (
    DeviceBuffer,
    DeviceTensor,
    PinnedBuffer,
    adopt_tensor,
    on_gpu,
)
from recallseg.engines.device.queues import Event, Graph, Kernels, Stream

__all__ = [
    "Device",
    "DeviceBuffer",
    "DeviceFacts",
    "DeviceTensor",
    "Event",
    "Graph",
    "Kernels",
    "PinnedBuffer",
    "Stream",
    "adopt_tensor",
    "on_gpu",
    "open_device",
]
