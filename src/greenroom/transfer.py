"""Carry out what the cache decided: have records read into buffers, demand before guesses.

Keeps what `readers` report until it is asked for, whose errors still matter, and how fast bytes come. Does not decide
anything: which expert goes where is `cache`'s, when to wait is `engine`'s.
"""

import os
import time
from collections.abc import Callable

from greenroom.cache import Load
from greenroom.errors import ClosedError
from greenroom.readers import Arrival, open_readers
from greenroom.smoothing import smoothed
from greenroom.store import Arena, Store


class Transfer:
    """Reads records from `store` into `arena` with so many `readers`. One thread at a time asks; `close` may come from
    any.

    `shuffle`, for tests, reorders finished buffers before they are reported.
    """

    def __init__(
        self, store: Store, arena: Arena, readers: int, shuffle: "Callable[[list[int]], None] | None" = None
    ) -> None:
        self._readers, self._shuffle = open_readers(store, arena, readers), shuffle
        self._finished: list[int] = []
        self._errors: list[BaseException] = []
        self._access = 0
        self._process, self._closed = os.getpid(), False
        self.seconds_per_byte: float | None = None
        """Of the latest reads, smoothed; None before the first."""
        self._busy_since, self._busy_nbytes = 0.0, 0  # since nothing was being read

    def start(self, load: Load) -> None:
        """Begin reading; `poll` reports `load.buffer` when it is done."""
        self._check_process()
        self._check_open()
        self._collect(wait=False)
        if not self._readers.left_nbytes:
            self._busy_since, self._busy_nbytes = time.perf_counter(), 0
        self._readers.start(load, self._access)

    def poll(self, wait: bool) -> "list[int]":
        """Buffers that have been filled since the last call; with `wait`, at least one.

        Raises the error of a read that failed; its buffer is reported later, so that it can be reused.
        """
        self._check_process()
        self._collect(wait=False)
        while wait and not self._finished and not self._errors:
            self._check_open()
            self._collect(wait=True)
        if self._errors:
            raise self._errors.pop(0)
        done, self._finished = self._finished, []
        if self._shuffle is not None:
            self._shuffle(done)
        return done

    @property
    def bytes_read(self) -> int:
        """Bytes of all records read so far."""
        return self._readers.bytes_read

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `poll` still has to report."""
        return self._readers.under_way.union(self._finished)

    @property
    def queued_s(self) -> float:
        """Seconds that the reads under way will take, about."""
        return self._readers.left_nbytes * (self.seconds_per_byte or 0.0)

    def abandon(self) -> None:
        """Forget errors, also those of reads under way: the access that wanted them has been given up."""
        self._access += 1
        self._errors.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed: load the model again")

    @property
    def ours(self) -> bool:
        """Whether the readers are this process's."""
        return os.getpid() == self._process

    def _check_process(self) -> None:
        """A forked child has no readers, and perhaps a lock that nobody will give back."""
        if not self.ours:
            raise ClosedError("this process was forked after the model was loaded: load it here")

    def close(self) -> None:
        """Finish what is being read and stop the threads; in a forked child there are none."""
        if self.ours:
            self._closed = True
            self._readers.close()

    def _collect(self, wait: bool) -> None:
        """Take in what has come; with `wait`, at least one record, or the end."""
        for arrival in self._readers.arrivals(wait):
            self._finished.append(arrival.buffer)
            if arrival.error is not None and arrival.access == self._access:
                self._errors.append(arrival.error)
            self._time(arrival)

    def _time(self, arrival: Arrival) -> None:
        """When nothing else is under way, learn how long it all took."""
        self._busy_nbytes += arrival.nbytes
        if not arrival.left_nbytes:
            rate = (time.perf_counter() - arrival.ago_s - self._busy_since) / self._busy_nbytes
            self.seconds_per_byte = smoothed(self.seconds_per_byte, rate, 1 / 8)
