"""Where the time and the bytes went: plain counters that the engine fills."""

import dataclasses
import time
from pathlib import Path


@dataclasses.dataclass(slots=True)
class Metrics:
    """Running totals of one engine; seconds and bytes."""

    calls: int = 0
    """layers served"""
    stall_s: float = 0.0
    """waiting for experts while nothing else was left to compute"""
    compute_s: float = 0.0
    """inside the expert kernels"""
    dense_s: float = 0.0
    """inside the compiled kernels of other linears, of all engines of the process; where an expert's activation has no
    compiled form, its products count in both"""
    bytes_read: int = 0
    """experts read from the store"""
    bytes_up: int = 0
    """experts sent over the link to a device"""
    requests: int = 0
    hits: int = 0
    prefetched: int = 0
    late: int = 0
    misses: int = 0
    guesses: int = 0

    def __sub__(self, earlier: "Metrics") -> "Metrics":
        """What was added since `earlier`, a copy taken before."""
        return Metrics(
            **{
                field.name: getattr(self, field.name) - getattr(earlier, field.name)
                for field in dataclasses.fields(Metrics)
            }
        )

    @property
    def hit_rate(self) -> float:
        """Share of requested experts that were resident; 0 without requests."""
        return self.hits / self.requests if self.requests else 0.0


class Stopwatch:
    """Adds the time spent in its `with` block to one field of a Metrics."""

    __slots__ = ("_field", "_metrics", "_start_s")

    def __init__(self, metrics: Metrics, field: str) -> None:
        self._metrics, self._field = metrics, field

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        spent_s = time.perf_counter() - self._start_s
        setattr(self._metrics, self._field, getattr(self._metrics, self._field) + spent_s)


def process_memory() -> "dict[str, int]":
    """This process's memory in bytes: `resident`, its `peak`, and `anonymous` (what cannot be dropped and reread)."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            fields[name] = int(value.split()[0]) * 1024
    return {"resident": fields["VmRSS"], "peak": fields["VmHWM"], "anonymous": fields["RssAnon"]}
