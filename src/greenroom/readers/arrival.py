"""What readers are asked for, and what they report."""

from typing import NamedTuple, Protocol

from greenroom.cache import Load

PIECE_NBYTES = 2 << 20
"""One read. The disk here gives 1.2 GB/s from 512 KB on; pieces let several readers share a large record."""


class Arrival(NamedTuple):
    """A record that has been read, or has failed."""

    buffer: int
    access: int
    """what `start` was told"""
    nbytes: int
    left_nbytes: int
    """of all records that were under way when it came"""
    ago_s: float
    """since when it is there"""
    error: "BaseException | None"


class Readers(Protocol):
    """Read records into the buffers of an arena. One thread at a time asks; `close` may come from any."""

    @property
    def bytes_read(self) -> int:
        """Bytes of all records that have come whole."""
        ...

    @property
    def left_nbytes(self) -> int:
        """Bytes of all records under way."""
        ...

    @property
    def under_way(self) -> "set[int]":
        """Buffers that `arrivals` has still to report."""
        ...

    def start(self, load: Load, access: int) -> None:
        """Begin to read; closed readers do not."""
        ...

    def arrivals(self, wait: bool) -> "list[Arrival]":
        """What has come since the last call; with `wait`, none only where the readers are closed."""
        ...

    def close(self) -> None:
        """Drop what has not begun, finish the rest, and end the threads."""
        ...
