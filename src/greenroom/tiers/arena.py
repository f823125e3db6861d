"""Buffers for records in a device's memory, and when each is filled."""

from collections.abc import Collection, Iterable

import torch

from greenroom.device import Device, Event
from greenroom.errors import ClosedError


class DeviceArena:
    """`count` buffers, uint8 [count, record_nbytes]. Raises torch.OutOfMemoryError.

    Whoever reads a buffer on the device has to let the device wait for what fills it: `record` and `wait` do. The host
    never waits.
    """

    def __init__(self, device: Device, count: int, record_nbytes: int) -> None:
        self.count, self.record_nbytes, self._device = count, record_nbytes, device
        self._memory: torch.Tensor | None = device.allocate(count * record_nbytes).view(count, record_nbytes)
        self._arrivals: dict[int, Event] = {}

    @property
    def memory(self) -> torch.Tensor:
        """All buffers; `wait` before a kernel reads any. Raises ClosedError where they have been given back: kernels
        do not look where they read."""
        if self._memory is None:
            raise ClosedError("the engine is closed: load the model again")
        return self._memory

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.count * self.record_nbytes

    def release(self) -> None:
        """Give the memory back; the arena is of no more use."""
        self._memory = None
        self._arrivals.clear()

    def filled_at(self, buffer: int, event: Event) -> None:
        """A copy into the buffer has been queued; it is done at `event`."""
        self._arrivals.pop(buffer, None)
        self._arrivals[buffer] = event  # the latest is last

    def arrival(self, buffer: int) -> "list[Event]":
        """What the buffer waits for, if nothing on the device has waited for it."""
        return [self._arrivals[buffer]] if buffer in self._arrivals else []

    def first(self, buffers: "Collection[int]") -> "set[int]":
        """Those of `buffers` that nothing has to wait for; if there are none, the one that is filled first."""
        there = set(buffers) - self._arrivals.keys()
        return there or set([buffer for buffer in self._arrivals if buffer in buffers][:1])

    def wait(self, buffers: "Iterable[int]") -> None:
        """Let what is computed from now on come after the copies into `buffers`."""
        for buffer in buffers:
            event = self._arrivals.pop(buffer, None)
            if event is not None:
                self._device.wait(event)

    def record(self, buffer: int) -> torch.Tensor:
        """A buffer as uint8 [record_nbytes] on the device, for what is computed from now on."""
        self.wait([buffer])
        return self.memory[buffer]
