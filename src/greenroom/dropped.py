"""Stop what somebody dropped without closing it.

The garbage collector may run in any thread, also in one that would have to be waited for, or that holds a lock which is
needed: what it finds is stopped on a thread of its own.
"""

import functools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_found: "queue.SimpleQueue[Callable[[], None]]" = queue.SimpleQueue()  # its put may be called from a finalizer


def when_dropped(owner: Any, stop: "Callable[[], None]") -> "weakref.finalize[..., Any]":
    """Call `stop`, which must not hold `owner`, once that is gone; not where the program ends, which need not wait."""
    _thread()
    found = weakref.finalize(owner, _found.put, stop)
    found.atexit = False
    return found


def stop_all(timeout_s: float = 10.0) -> None:
    """Wait until what has been found so far is stopped."""
    done = threading.Event()
    _found.put(done.set)
    if _thread().is_alive():  # a forked child has none
        done.wait(timeout_s)


@functools.cache
def _thread() -> threading.Thread:
    thread = threading.Thread(target=_stop, name="greenroom-dropped", daemon=True)
    thread.start()
    return thread


def _stop() -> None:
    while True:
        _found.get()()  # no name holds it while the next is waited for
