"""Who computes on how many threads.

The compiled kernels share their work out to threads of their own. torch keeps to one meanwhile: its threads wait for
each other at every operation, and where a core is busy with something else that turns microseconds into milliseconds.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_ours = 0
_users = 0

Item = TypeVar("Item")
Result = TypeVar("Result")


def count() -> int:
    """Threads that the compiled kernels use."""
    return _ours or torch.get_num_threads()


def take_over() -> None:
    """Give the threads that torch is set to use to the kernels, and leave torch one, until `give_back`."""
    global _ours, _users
    _users += 1
    if torch.get_num_threads() > 1 or not _ours:
        _ours = torch.get_num_threads()
    torch.set_num_threads(1)


def give_back() -> None:
    """As often as `take_over`: let torch use the threads again that it was set to use."""
    global _ours, _users
    _users -= 1
    if _users:
        return
    if torch.get_num_threads() == 1:  # or somebody has set it since
        torch.set_num_threads(_ours)
    _ours = 0


@contextlib.contextmanager
def lent_to_torch() -> "Iterator[None]":
    """Let torch use all threads: for large products and attention of its own."""
    with _set(count()):
        yield


@contextlib.contextmanager
def kept_from_torch() -> "Iterator[None]":
    """Leave torch one thread: for many small operations between the kernels' calls. torch's threads spin for a while
    after each, on the cores that the kernels' threads want."""
    with _set(1):
        yield


def in_order(function: "Callable[[Item], Result]", items: "Iterable[Item]", workers: int) -> "Iterator[Result]":
    """`function` of each item, in their order, on so many threads with one of torch's each: for items that take many
    small operations. Items are taken from the calling thread, one more than there are workers at a time."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        under_way: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                del item  # else it outlasts its turn, while the next one is read
                if len(under_way) > workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # threads that start later get what was set last


@contextlib.contextmanager
def _set(threads: int) -> "Iterator[None]":
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
