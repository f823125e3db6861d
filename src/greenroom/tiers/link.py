"""The link between RAM and a device: copies under way, the host buffers they use, and how fast they were."""

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch

from greenroom.device import Device, Event
from greenroom.smoothing import smoothed


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    event: Event
    buffer: int
    """of the host"""
    nbytes: int


class Link:
    """Queues copies on `device` and notices, without waiting, when they are done."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._up, self._down = deque[_Copy](), deque[_Copy]()  # under way
        self._rates: list[float] = []
        self.seconds_per_byte: float | None = None
        """of the latest uploads, smoothed; None before the first"""
        self.bytes_up = 0
        """sent to the device"""

    @property
    def using(self) -> "set[int]":
        """Host buffers that copies under way read or write."""
        return {copy.buffer for queue in (self._up, self._down) for copy in queue}

    @property
    def writing(self) -> "set[int]":
        """Host buffers that copies under way write."""
        return {copy.buffer for copy in self._down}

    def events_on(self, buffer: int) -> "list[Event]":
        """When the copies under way that use a host buffer are done."""
        return [copy.event for queue in (self._up, self._down) for copy in queue if copy.buffer == buffer]

    @property
    def queued_s(self) -> float:
        """Seconds that the uploads under way will take, about."""
        return sum(copy.nbytes for copy in self._up) * (self.seconds_per_byte or 0.0)

    def new_rates(self) -> "list[float]":
        """Seconds per byte of the uploads that were done since the last call."""
        self.settle()
        found, self._rates = self._rates, []
        return found

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[Event]", buffer: int) -> Event:
        """Copy `source`, filled bytes of host `buffer`, to the device's `target`, when what is computed now is done."""
        event = self.device.upload(target, source, [self.device.mark(), *after])
        self._up.append(_Copy(event, buffer, source.numel()))
        self.bytes_up += source.numel()
        return event

    def download(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[Event]", buffer: int) -> Event:
        """Copy the device's `source` to `target`, bytes of host `buffer`, when what is computed now is done."""
        event = self.device.download(target, source, [self.device.mark(), *after])
        self._down.append(_Copy(event, buffer, source.numel()))
        return event

    def settle(self) -> None:
        """Notice what is done: each queue's copies end in their order."""
        while self._down and self.device.reached(self._down[0].event):
            self._down.popleft()
        while self._up and self.device.reached(self._up[0].event):
            copy = self._up.popleft()
            self._time(copy.nbytes, self.device.seconds(copy.event))

    def wait(self) -> bool:
        """Wait for the oldest upload under way, or else download; False where there is neither."""
        queue = self._up or self._down
        if not queue:
            return False
        self.device.synchronise(queue[0].event)
        self.settle()
        return True

    def _time(self, nbytes: int, seconds: float) -> None:
        rate = seconds / nbytes
        self._rates.append(rate)
        self.seconds_per_byte = smoothed(self.seconds_per_byte, rate, 1 / 8)
