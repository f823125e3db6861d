"""A device with memory of its own behind a link: what copies, orders and waits, and nothing of what is copied.

`Device` is the boundary; `CudaDevice` drives a GPU through torch, `FakeDevice` is a device in this process's memory
with clocks of its own, so that everything above can be tested where there is no GPU.
"""

from greenroom.device.cuda import CudaDevice, check_gpu, find_gpu
from greenroom.device.fake import FakeDevice
from greenroom.device.protocol import Captured, CaptureError, Device, Event

__all__ = ["CaptureError", "Captured", "CudaDevice", "Device", "Event", "FakeDevice", "check_gpu", "find_gpu"]
