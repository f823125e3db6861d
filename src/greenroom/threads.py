"""Who computes on how many threads.

The compiled kernels share their work out to threads of their own. torch keeps to one meanwhile: its threads wait for
each other at every operation, and where a core is busy with something else that turns microseconds into milliseconds.
"""

import contextlib
from collections.abc import Iterator

import torch

_ours = 0
_users = 0


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


@contextlib.contextmanager
def _set(threads: int) -> "Iterator[None]":
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
