"""Readers in C++: `native/readers.cpp`. A thread of Python's that is to begin a read, or to say that it has ended,
waits for whoever holds Python's lock: on two cores that took 0.3 ms beside a read of 1 ms."""

from types import ModuleType

from greenroom.cache import Load
from greenroom.readers.arrival import PIECE_NBYTES, Arrival
from greenroom.store import Arena, DiskStore


def extension() -> "ModuleType | None":
    """The extension, or None where it was not built or does not load."""
    try:
        import greenroom.readers._readers as readers
    except ImportError:
        return None
    return readers


class CompiledReaders:
    """Threads that read the files of `store` themselves."""

    def __init__(self, store: DiskStore, arena: Arena, count: int) -> None:
        self._store, self._arena = store, arena
        self._keys: dict[int, tuple[int, int]] = {}  # buffer → the (layer, expert) that was read into it last
        native = extension()
        assert native is not None
        self._ended, self._differs = native.ENDED, native.DIFFERS
        memory = arena.memory
        self._native = native.Readers(memory, memory.data_ptr(), memory.numel(), count, PIECE_NBYTES)

    @property
    def bytes_read(self) -> int:
        """Bytes of all records that have come whole."""
        return int(self._native.bytes_read())

    @property
    def left_nbytes(self) -> int:
        """Bytes of all records under way."""
        return int(self._native.left_nbytes())

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `arrivals` has still to report."""
        return set(self._native.under_way())

    def start(self, load: Load, access: int) -> None:
        """Begin to read; closed readers do not."""
        place = self._store.place(*load.key)
        self._keys[load.buffer] = load.key
        start = self._arena.touch(load.buffer)
        crc32 = -1 if place.crc32 is None else place.crc32
        self._native.start(
            load.buffer,
            access,
            place.file,
            place.offset,
            place.nbytes,
            start,
            load.speculative,
            not self._store.direct,
            crc32,
        )

    def arrivals(self, wait: bool) -> "list[Arrival]":
        """What has come since the last call; with `wait`, none only where the readers are closed."""
        found = []
        for buffer, access, nbytes, left_nbytes, ago_s, error, at in self._native.arrivals(wait):
            key = self._keys[buffer]
            if not error:
                self._store.trust(*key)
            found.append(Arrival(buffer, access, nbytes, left_nbytes, ago_s, self._error(key, error, at)))
        return found

    def close(self) -> None:
        """Drop what has not begun, finish the rest, and end the threads."""
        self._native.close()

    def _error(self, key: "tuple[int, int]", error: int, at: int) -> "BaseException | None":
        if not error:
            return None
        if error == self._differs:
            return self._store.corrupted(*key)
        return self._store.ended(key[0], at) if error == self._ended else self._store.unreadable(key[0], at, error)
