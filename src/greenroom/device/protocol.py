"""The boundary to a device: three queues (computing, uploads, downloads) that run beside the host and each other.

Work within a queue runs in order. Between queues, and between a queue and the host, only events order anything: bytes
that are copied must not be read, nor their source written, before the copy's event; and a copy must not start before
the events that it is told to come after.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Event = Any
"""A point in a queue; each device has its own kind."""

T = TypeVar("T")


class CaptureError(Exception):
    """What a function does cannot be repeated without the host."""


class Captured(Protocol):
    """What a function queued on the device, to be queued again as a whole."""

    result: Any
    """what the function gave; its tensors hold values after the first `replay`, and others after the next, but for
    those that are sent back"""
    back: "list[torch.Tensor]"
    """on the host, what is sent back: it may be read from the event of a `replay` until the next one"""

    def replay(self) -> Event:
        """Queue it once more: the same kernels on the same memory, whatever that holds by now, then the copies to
        `back`, which are done at the event. Tensors' `_version` does not count what they write."""
        ...


class Device(Protocol):
    """Memory, queues and events of one device. Not for several threads at once."""

    place: torch.device
    """where torch finds its tensors"""
    dtype: torch.dtype
    """of activations, unless another is asked for"""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8 [nbytes]. Raises torch.OutOfMemoryError."""
        ...

    def trim(self) -> None:
        """Give memory that nobody holds any more back for other uses."""
        ...

    def pin(self, memory: torch.Tensor) -> None:
        """Fix host memory in place, so that copies run beside the host; pinned memory is left alone. Fill it first:
        pinning touches every page."""
        ...

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[Event]") -> Event:
        """Copy host bytes to the device, after `after`; the event comes when it is done."""
        ...

    def download(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[Event]") -> Event:
        """Copy device bytes to the host, after `after`; the event comes when it is done."""
        ...

    def mark(self) -> Event:
        """An event after all computing launched so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let computing launched from now on come after `event`; the host goes on."""
        ...

    def reached(self, event: Event) -> bool:
        """Whether the event has come."""
        ...

    def synchronise(self, event: Event) -> None:
        """Let the host wait for the event."""
        ...

    def seconds(self, event: Event) -> float:
        """How long the copy before a reached event took."""
        ...

    def send_back(self, *tensors: torch.Tensor) -> "tuple[list[torch.Tensor], Event]":
        """Copies of device tensors on the host, there to be read when the event has come."""
        ...

    def fetch(self, *tensors: torch.Tensor) -> "list[torch.Tensor]":
        """The values of device tensors on the host: waits for what computes them, once for all of them."""
        ...

    def launch(self, kernel: "Callable[..., T]", *arguments: Any) -> T:
        """Call `kernel`, whose code is the device's own: it reads and writes tensors among its arguments there."""
        ...

    def capture(
        self, function: "Callable[[], T]", told: "Callable[[T], Sequence[torch.Tensor]]" = lambda result: ()
    ) -> Captured:
        """What `function` queues; it may be called more than once for that, and must not mind. Each replay sends the
        tensors back that `told` finds in the result.

        Raises CaptureError where it waits for the device, or sends or fetches values: its kernels have to be the same
        whatever tensors hold. All that lies outside and is read has to stay where it is as long as the answer is used.
        """
        ...

    def memory(self) -> "tuple[int, int]":
        """(bytes free, bytes in all)."""
        ...

    def clock(self) -> float:
        """Seconds of a clock that also rules the host."""
        ...

    def close(self) -> None:
        """Wait for all copies and unpin memory."""
        ...

    def title(self) -> str:
        """The device, for people."""
        ...


def tensors(result: Any) -> "list[torch.Tensor]":
    """All tensors in a structure of tuples, lists and dictionaries, in order."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
