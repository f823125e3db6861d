"""Carry out what the cache decided: read records into buffers, several at a time, demand before guesses.

Owns the reader threads. Large records are read in pieces so that one expert's read is spread over all readers.
Does not decide anything: which expert goes where is `cache`'s, when to wait is `engine`'s.
"""

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from greenroom.cache import Load
from greenroom.errors import ClosedError
from greenroom.smoothing import smoothed
from greenroom.store import Arena, Store

PIECE_NBYTES = 2 << 20
"""One read. The disk here gives 1.2 GB/s from 512 KB on; pieces let several readers share a large record."""


class _Record:
    """A record being read: how many pieces are still missing, whether one has failed, and for which access."""

    __slots__ = ("access", "failed", "left", "load", "nbytes")

    def __init__(self, load: Load, nbytes: int, pieces: int, access: int) -> None:
        self.load, self.nbytes, self.left, self.failed, self.access = load, nbytes, pieces, False, access


class Transfer:
    """Reads records from `store` into `arena` on `readers` threads.

    `shuffle`, for tests, reorders finished buffers before they are reported.
    """

    def __init__(
        self, store: Store, arena: Arena, readers: int, shuffle: "Callable[[list[int]], None] | None" = None
    ) -> None:
        self._store, self._arena, self._shuffle = store, arena, shuffle
        self._state = threading.Lock()
        self._wanted = threading.Condition(self._state)  # readers wait for pieces
        self._arrived = threading.Condition(self._state)  # `poll` waits for records
        self._queue: list[tuple[bool, int, _Record, int, int]] = []  # (speculative, order, record, start, length)
        self._order = itertools.count()
        self._finished: deque[int] = deque()
        self._errors: list[BaseException] = []
        self._unreported: set[int] = set()  # buffers started and not yet given out by poll
        self._access = 0
        self._closing, self._process = False, os.getpid()
        self.bytes_read = 0
        """Bytes of all records read so far."""
        self.seconds_per_byte: float | None = None
        """Of the latest reads, smoothed; None before the first."""
        self._busy_since, self._busy_nbytes, self._left_nbytes = 0.0, 0, 0  # since nothing was being read
        self._threads = [
            threading.Thread(target=self._work, name=f"greenroom-reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, load: Load) -> None:
        """Begin reading; `poll` reports `load.buffer` when it is done."""
        self._check_process()
        layer, _ = load.key
        nbytes = self._store.nbytes(layer)
        pieces = [(start, min(PIECE_NBYTES, nbytes - start)) for start in range(0, nbytes, PIECE_NBYTES)]
        with self._state:
            self._check_open()
            record = _Record(load, nbytes, len(pieces), self._access)
            self._unreported.add(load.buffer)
            if not self._left_nbytes:
                self._busy_since, self._busy_nbytes = time.perf_counter(), 0
            self._left_nbytes += nbytes
            for start, length in pieces:
                heapq.heappush(self._queue, (load.speculative, next(self._order), record, start, length))
            self._wanted.notify(len(pieces))  # no more: each reader that wakes takes a core from the kernels

    def poll(self, wait: bool) -> "list[int]":
        """Buffers that have been filled since the last call; with `wait`, at least one.

        Raises the error of a read that failed; its buffer is reported later, so that it can be reused.
        """
        self._check_process()
        with self._state:
            while wait and not self._finished and not self._errors:
                self._check_open()
                self._arrived.wait()
            if self._errors:
                raise self._errors.pop(0)
            done = list(self._finished)
            self._finished.clear()
            self._unreported.difference_update(done)
        if self._shuffle is not None:
            self._shuffle(done)
        return done

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `poll` still has to report."""
        with self._state:
            return set(self._unreported)

    @property
    def queued_s(self) -> float:
        """Seconds that the reads under way will take, about."""
        return self._left_nbytes * (self.seconds_per_byte or 0.0)

    def abandon(self) -> None:
        """Forget errors, also those of reads under way: the access that wanted them has been given up."""
        with self._state:
            self._access += 1
            self._errors.clear()

    def _check_open(self) -> None:
        if self._closing:
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
        if not self.ours:
            return
        with self._state:
            self._closing = True
            self._queue.clear()
            self._wanted.notify_all()
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._state:
                while not self._queue and not self._closing:
                    self._wanted.wait()
                if self._closing:
                    return
                _, _, record, start, length = heapq.heappop(self._queue)
            error = self._read(record, start, length)
            with self._state:
                self._settle(record, error)

    def _read(self, record: _Record, start: int, length: int) -> "BaseException | None":
        layer, expert = record.load.key
        try:
            target = self._arena.view(record.load.buffer, record.nbytes)
            self._store.read(layer, expert, start, target[start : start + length])
        except BaseException as error:  # handed to the thread that waits
            return error
        return None

    def _settle(self, record: _Record, error: "BaseException | None") -> None:
        """Count a piece; the last one checks the record and reports it. The lock is held."""
        record.left -= 1
        if error is not None:
            self._fail(record, error)
        if record.left == 0:
            if not record.failed:
                self._check(record)
                self.bytes_read += record.nbytes
            self._time(record.nbytes)
            self._finished.append(record.load.buffer)
            self._arrived.notify()

    def _time(self, nbytes: int) -> None:
        """A record is there; when nothing else is under way, learn how long it all took. The lock is held."""
        self._left_nbytes -= nbytes
        self._busy_nbytes += nbytes
        if self._left_nbytes == 0:
            rate = (time.perf_counter() - self._busy_since) / self._busy_nbytes
            self.seconds_per_byte = smoothed(self.seconds_per_byte, rate, 1 / 8)

    def _check(self, record: _Record) -> None:
        layer, expert = record.load.key
        self._state.release()  # checksums take milliseconds: other readers go on
        try:
            self._store.check(layer, expert, self._arena.view(record.load.buffer, record.nbytes))
        except BaseException as error:
            failure: BaseException | None = error
        else:
            failure = None
        finally:
            self._state.acquire()
        if failure is not None:
            self._fail(record, failure)

    def _fail(self, record: _Record, error: BaseException) -> None:
        """Report one error a record, and none that a later access would take for its own. The lock is held."""
        if not record.failed and record.access == self._access:
            self._errors.append(error)
            self._arrived.notify()
        record.failed = True


__all__ = ["PIECE_NBYTES", "Transfer"]
