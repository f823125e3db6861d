"""Who reads records into buffers, several at a time, demand before guesses.

Two ways with one meaning: `compiled` threads, which read a packed model's files without asking for Python's lock, and
`threaded`, which reads from any store and where nothing was compiled. Neither decides what is read, or into what.
"""

from greenroom import environment
from greenroom.readers.arrival import PIECE_NBYTES, Arrival, Readers
from greenroom.readers.compiled import CompiledReaders, extension
from greenroom.readers.threaded import ThreadedReaders
from greenroom.store import Arena, DiskStore, Store

__all__ = ["PIECE_NBYTES", "Arrival", "Readers", "open_readers"]


def open_readers(store: Store, arena: Arena, count: int) -> Readers:
    """`count` readers from `store` into `arena`."""
    # not a subclass: whoever reads in another way wants to be asked
    if type(store) is DiskStore and extension() is not None and environment.isa() != "none":
        return CompiledReaders(store, arena, count)
    return ThreadedReaders(store, arena, count)
