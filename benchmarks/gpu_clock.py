"""How long calls take on a GPU, without what launching them costs."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Times calls that differ in their inputs, so that together they touch more than any cache holds."""

    def seconds(self, calls: "Sequence[Callable[[], Any]]", *, graph: bool = True) -> float:
        """The median time of a call; with `graph`, replayed from a CUDA graph of all of them."""
        ...


class GpuClock:
    """Events around replays: a few to warm up, then a tenth of a second, but at least five."""

    def seconds(self, calls: "Sequence[Callable[[], Any]]", *, graph: bool = True) -> float:
        """See `Clock`."""
        for call in calls:  # compiles, and fills caches of the allocator
            call()
        torch.cuda.synchronize()
        turn = _captured(calls) if graph else lambda: [call() for call in calls]
        first = _timed(turn)
        trials = [_timed(turn) for _ in range(max(5, min(200, int(0.1 / max(first, 1e-5)))))]
        return statistics.median(trials) / len(calls)


def _captured(calls: "Sequence[Callable[[], Any]]") -> "Callable[[], Any]":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def _timed(turn: "Callable[[], Any]") -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    turn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
