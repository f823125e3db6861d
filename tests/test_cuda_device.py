"""What `CudaDevice` asks of torch.cuda, which is a stand-in here: there need be no GPU."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from greenroom.device import CaptureError, CudaDevice
from greenroom.device import cuda as room


class Graph:
    """Ends where it is told to."""

    def __init__(self) -> None:
        self.begun = self.ended = self.replayed = 0
        self.fails: dict[str, BaseException] = {}

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.begun += 1
        if "begin" in self.fails:
            raise self.fails["begin"]

    def replay(self) -> None:
        self.replayed += 1

    def capture_end(self) -> None:
        self.ended += 1
        if "end" in self.fails:
            raise self.fails["end"]


class Happening:
    """An event that notes when it is recorded and waited for."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def record(self) -> None:
        self.noted.append("record")

    def synchronize(self) -> None:
        self.noted.append("wait")


class Runtime:
    """Registers pages, up to a number of ranges; keeps an error until somebody asks, as CUDA's does."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most, self.registered, self.latched, self.trimmed = most, set[int](), 0, 0
        self.graph, self.happening = Graph(), Happening()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if address in self.registered or len(self.registered) == self.most:
            self.latched = 712 if address in self.registered else 2
            return self.latched
        self.registered.add(address)
        return 0

    def empty_cache(self) -> None:
        self.trimmed += 1

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.remove(address)
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_in = SimpleNamespace(
        get_device_capability=lambda place: (7, 5), Stream=lambda place: stream, cudart=lambda: made,
        synchronize=lambda place: None, stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda place: stream, graph_pool_handle=lambda: (0, 1), CUDAGraph=lambda: made.graph,
        get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: None, Event=lambda: made.happening,
        empty_cache=made.empty_cache,
    )  # fmt: skip
    monkeypatch.setattr(room, "cuda", stand_in)
    monkeypatch.setattr(room, "_pinned", lambda like: torch.zeros_like(like))

    def allocate(device: CudaDevice, nbytes: int) -> Any:
        """Memory whose first kernel asks for errors."""

        def zero_() -> None:
            error, made.latched = made.latched, 0
            if error:
                raise RuntimeError("CUDA error: out of memory")

        return SimpleNamespace(zero_=zero_)

    monkeypatch.setattr(CudaDevice, "allocate", allocate)
    return made


def test_pages_are_registered_once_and_given_up(runtime: Runtime) -> None:
    device, memory = CudaDevice(0), torch.zeros(8, dtype=torch.uint8)
    for _ in range(2):
        device.pin(memory)
    assert runtime.registered == {memory.data_ptr()} and not runtime.latched
    device.close()
    assert not runtime.registered
    device.pin(memory)
    del device
    gc.collect()
    assert not runtime.registered, "a device that is gone leaves registered pages behind"


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(runtime: Runtime) -> None:
    runtime.most = 1
    device, memory = CudaDevice(0), torch.zeros(3, 8, dtype=torch.uint8)
    device.pin(memory[0])
    with pytest.warns(RuntimeWarning, match="and no more"):
        device.pin(memory[1])
    device.pin(memory[2])  # and says so once
    assert runtime.registered == {memory[0].data_ptr()} and not runtime.latched, "the next launch would fail"
    device.close()
    assert not runtime.registered


@pytest.mark.parametrize("where", ["begin", "end", "function"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory\nmore"), torch.OutOfMemoryError("none")])
def test_a_capture_that_fails_says_why(runtime: Runtime, where: str, error: RuntimeError) -> None:
    """The driver's memory for graphs is not torch's: a layer without one is taken as before. Torch's can be freed."""
    device, calls = CudaDevice(0), []
    runtime.graph.fails = {where: error}

    def function() -> torch.Tensor:
        calls.append(gc.isenabled())
        if where == "function" and len(calls) > 1:
            raise error
        return torch.ones(1)

    wanted = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else CaptureError
    with pytest.raises(wanted) as caught:
        device.capture(function)
    assert "more" not in str(caught.value)
    tries = 1 + (wanted is torch.OutOfMemoryError)  # torch gives nothing back that it keeps while it captures
    assert runtime.graph.begun == tries == runtime.trimmed + 1
    assert runtime.graph.ended == tries * (where != "begin") and gc.isenabled()
    assert calls == [True, False, False][: len(calls)], "a collection would call CUDA in a capture"


def test_a_capture_that_finds_no_memory_has_what_torch_keeps(runtime: Runtime) -> None:
    device = CudaDevice(0)

    def function() -> torch.Tensor:
        if runtime.graph.begun and not runtime.trimmed:
            raise torch.OutOfMemoryError("none")
        return torch.ones(1)

    device.capture(function).replay()
    assert (runtime.graph.begun, runtime.graph.ended, runtime.trimmed) == (2, 2, 1)


def test_what_is_tried_before_a_capture_goes_the_same_way(runtime: Runtime) -> None:
    """transformers asks."""
    asked, real = [], torch.cuda.is_current_stream_capturing
    CudaDevice(0).capture(lambda: asked.append(torch.cuda.is_current_stream_capturing))
    assert asked[0]() and asked[1:] == [real]


def test_what_is_captured_stays_where_it_was_first(runtime: Runtime) -> None:
    made = [torch.ones(1), torch.full((1,), 2.0)]
    captured = CudaDevice(0).capture(lambda: (made[0] if runtime.graph.begun == 0 else made[1], "other"))
    assert captured.result[0] is made[0] and made[0] == 2 and captured.result[1] == "other"


def test_what_is_told_is_copied_last_and_held_until_it_is_there(runtime: Runtime) -> None:
    made = [torch.ones(1), torch.full((1,), 2.0)]
    captured = CudaDevice(0).capture(lambda: made[runtime.graph.begun], told=lambda result: [result])
    assert captured.back[0] == 2, "the graph copies what it has just computed"
    event = captured.replay()
    assert runtime.graph.replayed == 1 and event.end is runtime.happening
    memory = weakref.ref(captured.back[0])
    del captured, event
    gc.collect()
    assert runtime.happening.noted == ["record", "wait"] and memory() is None
