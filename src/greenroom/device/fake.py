"""A device in this process's memory: its clocks are simulated, and its copies move bytes as late as they may.

So a missing wait shows as wrong bytes, and times follow from the rates that a test sets, not from the machine.
"""

import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from greenroom.device.protocol import T, tensors
from greenroom.device.rules import Rules, told_of_capture


@dataclasses.dataclass(slots=True)
class FakeEvent:
    """When a queue gets there, in simulated seconds, and the copy (target, source) that ends there."""

    end_s: float
    start_s: float = 0.0
    queue: "deque[FakeEvent] | None" = None
    copy: "tuple[torch.Tensor, torch.Tensor] | None" = None
    after: "Sequence[FakeEvent]" = ()
    """what comes first: no byte moves before these have moved theirs"""

    def settle(self) -> None:
        """Move the bytes of all copies of the queue up to this one."""
        while self.copy is not None and self.queue is not None:
            first = self.queue.popleft()
            for event in first.after:
                event.settle()
            assert first.copy is not None
            (target, source), first.copy, first.after = first.copy, None, ()
            target.copy_(source)


class FakeCaptured:
    """Repeats a function by calling it, puts what it gives where it was first given, and holds it to what was noted."""

    def __init__(
        self, device: "FakeDevice", function: "Callable[[], Any]", told: "Callable[[Any], Sequence[torch.Tensor]]"
    ) -> None:
        self._device, self._function = device, function
        self._noted, self.result = self._call()
        self._told = list(told(self.result))
        with torch.inference_mode(False):  # it is written when somebody waits, in whatever mode
            self.back = [torch.empty(one.shape, dtype=one.dtype) for one in self._told]
        for leaf in tensors(self.result):
            if leaf.untyped_storage().data_ptr() not in self._noted.outside:
                leaf.fill_(-7)  # captured is not computed

    def replay(self) -> FakeEvent:
        """Call it again. Raises AssertionError where anything but values differs. Like a graph's kernels, it writes
        past torch, whose count of a tensor's versions stays."""
        noted, result = self._call()
        for number, (one, other) in enumerate(zip(noted.noted, self._noted.noted, strict=False)):
            assert one == other, f"operation {number} was {other} when it was captured and is {one} now"
        assert len(noted.noted) == len(self._noted.noted), "operations are missing"
        targets = tensors(self.result)
        versions = tuple(target for target in targets if not target.is_inference())
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(versions):
            for found, target in zip(tensors(result), targets, strict=True):
                target.copy_(found)
        return self._device.copy_back(self.back, self._told)

    def _call(self) -> "tuple[Rules, Any]":
        with self._device.ruled() as rules:
            return rules, self._function()


class _Memory(bytearray):
    """What a tensor's memory is, so that it can be seen to go."""


class FakeDevice:
    """`nbytes` of memory behind a link of `link_bytes_per_s` each way. Only what is allocated takes any of it, until
    nobody holds it any more.

    `spend(seconds)` is a kernel's time on the queue that computes, `work(seconds)` the host's. Computing itself runs
    when it is launched.
    """

    def __init__(self, nbytes: int = 1 << 30, link_bytes_per_s: float = 1e9) -> None:
        self.place, self.dtype = torch.device("cpu"), torch.float32
        self.nbytes, self.link_bytes_per_s = nbytes, link_bytes_per_s
        self.host_s, self.compute_s = 0.0, 0.0
        self._queues: dict[str, deque[FakeEvent]] = {"up": deque(), "down": deque()}
        self._free_at = {"up": 0.0, "down": 0.0}
        self.downloaded = self.allocated = 0
        """bytes"""
        self._rules: Rules | None = None

    def spend(self, seconds: float) -> None:
        """A kernel that takes so long is launched."""
        self.compute_s = max(self.compute_s, self.host_s) + seconds

    def work(self, seconds: float) -> None:
        """The host is busy for so long."""
        self.host_s += seconds

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Raises torch.OutOfMemoryError where it has less."""
        free, total = self.memory()
        if nbytes > free:
            raise torch.OutOfMemoryError(f"of the fake device's {total} bytes {free} are free, not {nbytes}")
        memory = _Memory(max(nbytes, 1))
        self._hold(nbytes)
        weakref.finalize(memory, self._hold, -nbytes)
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)

    def _hold(self, nbytes: int) -> None:
        self.allocated += nbytes

    def trim(self) -> None:
        """Nothing is kept."""

    def pin(self, memory: torch.Tensor) -> None:
        """All of this memory is alike."""

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[FakeEvent]") -> FakeEvent:
        """Takes its bytes' time on the link, and moves them when somebody waits for it."""
        return self._copy("up", target, source, after)

    def download(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[FakeEvent]") -> FakeEvent:
        """The same, the other way."""
        self.downloaded += source.numel()
        return self._copy("down", target, source, after)

    def _copy(self, way: str, target: torch.Tensor, source: torch.Tensor, after: "Sequence[FakeEvent]") -> FakeEvent:
        start_s = max([self.host_s, self._free_at[way], *(event.end_s for event in after)])
        self._free_at[way] = start_s + source.numel() / self.link_bytes_per_s
        queue = self._queues[way]
        queue.append(FakeEvent(self._free_at[way], start_s, queue, (target, source), after))
        return queue[-1]

    def mark(self) -> FakeEvent:
        """When everything launched so far is computed."""
        return FakeEvent(self.compute_s)

    def wait(self, event: FakeEvent) -> None:
        """Computing goes on when the event has come."""
        self.compute_s = max(self.compute_s, event.end_s)
        event.settle()

    def reached(self, event: FakeEvent) -> bool:
        """By the host's clock."""
        if self.host_s < event.end_s:
            return False
        event.settle()
        return True

    def synchronise(self, event: FakeEvent) -> None:
        """The host's clock goes on to the event."""
        self.host_s = max(self.host_s, event.end_s)
        event.settle()

    def seconds(self, event: FakeEvent) -> float:
        """Simulated."""
        return event.end_s - event.start_s

    def send_back(self, *tensors: torch.Tensor) -> "tuple[list[torch.Tensor], FakeEvent]":
        """There when what is being computed is; before somebody has waited for that they hold anything."""
        found = [torch.empty_like(tensor) for tensor in tensors]
        return found, self.copy_back(found, tensors)

    def copy_back(self, targets: "Sequence[torch.Tensor]", sources: "Sequence[torch.Tensor]") -> FakeEvent:
        """The same, to memory that is there."""
        queue: deque[FakeEvent] = deque()
        for target, source in zip(targets, sources, strict=True):
            target.fill_(-1)
            queue.append(FakeEvent(self.compute_s, self.compute_s, queue, (target, source.clone())))
        return queue[-1] if queue else self.mark()

    def fetch(self, *tensors: torch.Tensor) -> "list[torch.Tensor]":
        """The host waits for what is being computed."""
        found, event = self.send_back(*tensors)
        self.synchronise(event)
        return found

    def launch(self, kernel: "Callable[..., T]", *arguments: Any) -> T:
        """Computes at once; one operation among those that are captured."""
        return kernel(*arguments) if self._rules is None else self._rules.kernel(kernel, arguments)

    @contextlib.contextmanager
    def ruled(self) -> "Iterator[Rules]":
        """Within it, the rules of capture hold."""
        assert self._rules is None, "captured while capturing"
        try:
            with Rules() as self._rules, told_of_capture():
                yield self._rules
        finally:
            self._rules = None

    def capture(
        self, function: "Callable[[], T]", told: "Callable[[T], Sequence[torch.Tensor]]" = lambda result: ()
    ) -> FakeCaptured:
        """Keeps the function, and what it did."""
        return FakeCaptured(self, function, told)

    def memory(self) -> "tuple[int, int]":
        """All that is not allocated is free."""
        return self.nbytes - self.allocated, self.nbytes

    def clock(self) -> float:
        """The host's."""
        return self.host_s

    def close(self) -> None:
        """Nothing to release."""

    def title(self) -> str:
        """For people."""
        return "a fake device"
