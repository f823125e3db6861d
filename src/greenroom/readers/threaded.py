"""Readers in Python, for any store."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from greenroom.cache import Load
from greenroom.readers.arrival import PIECE_NBYTES, Arrival
from greenroom.store import Arena, Store


class _Record:
    """A record being read: for which access, how many pieces are still missing, and what has gone wrong."""

    __slots__ = ("access", "error", "left", "load", "nbytes")

    def __init__(self, load: Load, access: int, nbytes: int, pieces: int) -> None:
        self.load, self.access, self.nbytes, self.left = load, access, nbytes, pieces
        self.error: BaseException | None = None


class ThreadedReaders:
    """`count` threads that ask `store` for pieces."""

    def __init__(self, store: Store, arena: Arena, count: int) -> None:
        self._store, self._arena = store, arena
        self._state = threading.Lock()
        self._wanted = threading.Condition(self._state)  # readers wait for pieces
        self._arrived = threading.Condition(self._state)  # `arrivals` waits for records
        self._queue: list[tuple[bool, int, _Record, int, int]] = []  # (speculative, order, record, start, length)
        self._order = itertools.count()
        self._arrivals: list[tuple[_Record, int, float]] = []  # with the bytes left, and when
        self._reading: set[int] = set()  # buffers whose records have not come
        self._closing = False
        self.bytes_read = self.left_nbytes = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"greenroom-reader-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `arrivals` has still to report."""
        with self._state:
            return self._reading | {record.load.buffer for record, _, _ in self._arrivals}

    def start(self, load: Load, access: int) -> None:
        """Begin to read; closed readers do not."""
        nbytes = self._store.nbytes(load.key[0])
        pieces = [(start, min(PIECE_NBYTES, nbytes - start)) for start in range(0, nbytes, PIECE_NBYTES)]
        with self._state:
            if self._closing:
                return
            record = _Record(load, access, nbytes, len(pieces))
            self._reading.add(load.buffer)
            self.left_nbytes += nbytes
            for start, length in pieces:
                heapq.heappush(self._queue, (load.speculative, next(self._order), record, start, length))
            self._wanted.notify(len(pieces))  # no more: each reader that wakes takes a core from the kernels

    def arrivals(self, wait: bool) -> "list[Arrival]":
        """What has come since the last call; with `wait`, none only where the readers are closed."""
        with self._state:
            while wait and not self._arrivals and not self._closing:
                self._arrived.wait()
            found, self._arrivals = self._arrivals, []
        now = time.perf_counter()
        return [
            Arrival(record.load.buffer, record.access, record.nbytes, left, now - when_s, record.error)
            for record, left, when_s in found
        ]

    def close(self) -> None:
        """Drop what has not begun, finish the rest, and end the threads."""
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
            error = _error_of(self._read, record, start, length)
            with self._state:
                record.error, record.left = record.error or error, record.left - 1
                last = record.left == 0
            if last:  # checksums take milliseconds: whoever read the last piece compares them
                self._report(record, record.error or _error_of(self._check, record))

    def _read(self, record: _Record, start: int, length: int) -> None:
        target = self._arena.view(record.load.buffer, record.nbytes)
        self._store.read(*record.load.key, start, target[start : start + length])

    def _check(self, record: _Record) -> None:
        self._store.check(*record.load.key, self._arena.view(record.load.buffer, record.nbytes))

    def _report(self, record: _Record, error: "BaseException | None") -> None:
        with self._state:
            record.error = error
            self.left_nbytes -= record.nbytes
            if error is None:
                self.bytes_read += record.nbytes
            self._reading.remove(record.load.buffer)
            self._arrivals.append((record, self.left_nbytes, time.perf_counter()))
            self._arrived.notify()


def _error_of(action: "Callable[..., None]", *arguments: Any) -> "BaseException | None":
    """What it raises, for the thread that waits."""
    try:
        action(*arguments)
    except BaseException as error:
        return error
    return None
