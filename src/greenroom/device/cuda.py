"""A GPU through torch: a stream for each queue, events with times."""

import contextlib
import dataclasses
import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from greenroom.device.protocol import CaptureError, T, tensors
from greenroom.device.rules import told_of_capture
from greenroom.errors import ConfigError, first_line

cuda: Any = torch.cuda  # its types are incomplete


@dataclasses.dataclass(slots=True)
class CudaEvent:
    """A point in a stream; `start` is where its copy began, None for a mark."""

    end: Any
    start: Any = None


class CudaCaptured:
    """A CUDA graph, what its function gave, and the pinned memory to which it copies what it tells the host."""

    def __init__(self, graph: Any, result: Any, back: "list[torch.Tensor]") -> None:
        self.result, self.back, self._graph = result, back, graph
        self._event = CudaEvent(cuda.Event())
        # torch knows of no replay that still writes there
        weakref.finalize(self, _wait_and_drop, self._event.end, back).atexit = False

    def replay(self) -> CudaEvent:
        """On the current stream."""
        self._graph.replay()
        self._event.end.record()
        return self._event


def check_gpu() -> None:
    """Raises ConfigError, saying what would help, where there is no GPU. Takes none of its memory."""
    if torch.version.cuda is None:
        raise ConfigError(
            f"--vram needs a torch that is built for CUDA, and {torch.__version__} is not: "
            "install one as pytorch.org/get-started says, or give --ram alone"
        )
    if not cuda.is_available():
        raise ConfigError("--vram needs an NVIDIA GPU and torch sees none: look at nvidia-smi, or give --ram alone")


def find_gpu() -> "CudaDevice":
    """The current GPU. Raises ConfigError as `check_gpu`."""
    check_gpu()
    return CudaDevice(cuda.current_device())


class CudaDevice:
    """One GPU. Computing runs on torch's current stream."""

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        modern = cuda.get_device_capability(self.place) >= (8, 0)
        self.dtype = torch.bfloat16 if modern else torch.float16
        self._uploads, self._downloads = cuda.Stream(self.place), cuda.Stream(self.place)
        self._pinned: dict[int, torch.Tensor] = {}
        self._pinnable = True
        # pages that are unmapped while they are registered spoil their addresses for whoever is given them next
        weakref.finalize(self, _unpin, self.place, self._pinned).atexit = False
        self._capturing: Any = None
        self._graphs: weakref.WeakSet[CudaCaptured] = weakref.WeakSet()
        self._pool: Any = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Raises torch.OutOfMemoryError."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.place)

    def trim(self) -> None:
        """Empty torch's cache of blocks."""
        cuda.empty_cache()

    def pin(self, memory: torch.Tensor) -> None:
        """Register the pages with the driver; they stay registered as long as this object lives.

        Where it takes no more of them (some containers, WSL) copies go through the driver's own pinned memory: slower,
        and the host waits for them.
        """
        if not self._pinnable or memory.data_ptr() in self._pinned:
            return
        error = int(cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if not error:
            self._pinned[memory.data_ptr()] = memory
            return
        self._pinnable = False
        pinned = sum(map(len, self._pinned.values()))
        warnings.warn(
            f"the driver pins {pinned >> 20} MiB of RAM and no more (error {error}): copies of the rest are slower; a "
            "smaller --ram may help",
            RuntimeWarning,
            stacklevel=2,
        )
        with contextlib.suppress(RuntimeError):  # the runtime keeps the error for whoever asks next: a launch does
            self.allocate(1).zero_()

    def close(self) -> None:
        """Wait for all copies and release pinned pages."""
        _unpin(self.place, self._pinned)

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[CudaEvent]") -> CudaEvent:
        """On the stream for uploads."""
        return self._copy(self._uploads, target, source, after)

    def download(self, target: torch.Tensor, source: torch.Tensor, after: "Sequence[CudaEvent]") -> CudaEvent:
        """On the stream for downloads: links carry both ways at once."""
        return self._copy(self._downloads, target, source, after)

    def _copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor, after: "Sequence[CudaEvent]") -> CudaEvent:
        for event in after:
            stream.wait_event(event.end)
        done = CudaEvent(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True))
        assert done.start is not None
        with cuda.stream(stream):
            done.start.record(stream)
            target.copy_(source, non_blocking=True)
            done.end.record(stream)
        return done

    def mark(self) -> CudaEvent:
        """On the current stream."""
        event = CudaEvent(cuda.Event())
        event.end.record(cuda.current_stream(self.place))
        return event

    def wait(self, event: CudaEvent) -> None:
        """The current stream waits; the host does not."""
        cuda.current_stream(self.place).wait_event(event.end)

    def reached(self, event: CudaEvent) -> bool:
        """Ask without waiting."""
        return bool(event.end.query())

    def synchronise(self, event: CudaEvent) -> None:
        """The host waits."""
        event.end.synchronize()

    def seconds(self, event: CudaEvent) -> float:
        """By the stream's own clock."""
        assert event.start is not None
        return float(event.start.elapsed_time(event.end)) / 1000

    def send_back(self, *tensors: torch.Tensor) -> "tuple[list[torch.Tensor], CudaEvent]":
        """On the current stream, into pinned memory."""
        found = [_pinned(one) for one in tensors]
        for target, source in zip(found, tensors, strict=True):
            target.copy_(source, non_blocking=True)
        return found, self.mark()

    def fetch(self, *tensors: torch.Tensor) -> "list[torch.Tensor]":
        """All on their way before the host waits."""
        found, event = self.send_back(*tensors)
        self.synchronise(event)
        return found

    def launch(self, kernel: "Callable[..., T]", *arguments: Any) -> T:
        """Kernels queue themselves."""
        return kernel(*arguments)

    def capture(
        self, function: "Callable[[], T]", told: "Callable[[T], Sequence[torch.Tensor]]" = lambda result: ()
    ) -> CudaCaptured:
        """As a CUDA graph; all share a pool of memory, in which nothing outlasts a replay.

        The function is called twice: first to compile its kernels, to make memory for what it gives outside of the
        pool, and to let torch refuse what waits, since a capture that fails leaves the allocator with an open pool.
        """
        with _nothing_waits(), told_of_capture():
            result = function()
        back = [_pinned(one) for one in told(result)]
        if not self._graphs:
            self._pool = cuda.graph_pool_handle()
        self._capturing = self._capturing or cuda.Stream(self.place)
        self._capturing.wait_stream(cuda.current_stream(self.place))
        with cuda.stream(self._capturing), _nothing_collected():
            try:
                graph = self._recorded(lambda: (made := function(), told(made)), result, back)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CaptureError(first_line(error)) from error
        cuda.current_stream(self.place).wait_stream(self._capturing)
        captured = CudaCaptured(graph, result, back)
        self._graphs.add(captured)
        return captured

    def _recorded(self, *what: Any) -> Any:
        """`_record`; if there is no memory, once more without what torch keeps for others, which it does not give back
        while it captures."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._record(*what)
        self.trim()
        return self._record(*what)

    def _record(
        self, function: "Callable[[], tuple[Any, Sequence[torch.Tensor]]]", result: Any, back: "list[torch.Tensor]"
    ) -> Any:
        """A graph of the function on the current stream: its results go into those that it gave before, what it tells
        to `back`."""
        graph = cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            found, told = function()
            for target, source in zip(back, told, strict=True):
                target.copy_(source, non_blocking=True)
            for kept, made in zip(tensors(result), tensors(found), strict=True):
                if not any(made is one for one in told):
                    kept.copy_(made)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph

    def memory(self) -> "tuple[int, int]":
        """As the driver counts, other processes included."""
        free, total = cuda.mem_get_info(self.place)
        return int(free), int(total)

    def clock(self) -> float:
        """The host's."""
        return time.perf_counter()

    def title(self) -> str:
        """As the driver calls it."""
        return str(cuda.get_device_name(self.place))


def _unpin(place: torch.device, pinned: "dict[int, torch.Tensor]") -> None:
    cuda.synchronize(place)
    runtime = cuda.cudart()
    while pinned:
        address, memory = pinned.popitem()  # which is held until it is unregistered
        runtime.cudaHostUnregister(address)
        del memory


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _wait_and_drop(event: Any, memory: "list[torch.Tensor]") -> None:
    event.synchronize()
    memory.clear()


@contextlib.contextmanager
def _nothing_collected() -> "Iterator[None]":
    """Within it, Python collects no cycles: what they hold may call CUDA when it goes, which spoils a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _nothing_waits() -> "Iterator[None]":
    """Within it, operations that let the host wait for the device raise CaptureError."""
    before = cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see all of them
        cuda.set_sync_debug_mode("error")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CaptureError(first_line(error)) from error
    finally:
        cuda.set_sync_debug_mode(before)
