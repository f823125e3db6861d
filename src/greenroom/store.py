"""Read an expert's record into a given buffer.

`DiskStore` reads from the packed files with direct I/O, so that the page cache does not hold a second copy;
`MemoryStore` is the in-memory one for tests and for models that fit. Neither knows which expert deserves a place.
"""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import torch

from greenroom.buffers import allocate, byte_view, open_direct, read_into
from greenroom.checksum import checksum
from greenroom.errors import PackedModelError
from greenroom.packed import PackedModel, corrupted, ended


class Store(Protocol):
    """Where experts come from. Layers are numbered by MoE layer; `read` is called from several threads at once."""

    record_nbytes: int
    """size of the largest record: what a buffer must hold"""

    def nbytes(self, layer: int) -> int:
        """Size of one record of `layer`, a multiple of RECORD_ALIGNMENT."""
        ...

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        """Fill `into` with the record's bytes from `start` on. Both are multiples of RECORD_ALIGNMENT."""
        ...

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        """Raise PackedModelError unless the whole `record` is what was packed."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a record are."""

    file: int
    """descriptor"""
    offset: int
    nbytes: int
    crc32: "int | None"
    """of a record that nobody has compared yet"""


class DiskStore:
    """Records straight from the packed model's files."""

    def __init__(self, packed: PackedModel, direct: bool = True) -> None:
        self._folder = packed.folder
        self._layers = packed.manifest.experts
        self._files: dict[str, int] = {}
        self.direct = direct
        """Whether reads bypass the page cache; False where the file system cannot."""
        for entry in self._layers:
            self._files[entry.file] = self._open(packed.folder / entry.file)
        self.record_nbytes = max(entry.record_nbytes for entry in self._layers)
        self._trusted: set[tuple[int, int]] = set()

    def _open(self, path: Path) -> int:
        try:
            if not self.direct:
                return os.open(path, os.O_RDONLY)
            file, self.direct = open_direct(path)
        except FileNotFoundError as error:
            raise PackedModelError(f"{path} is missing: delete the packed folder and pack again") from error
        except OSError as error:
            raise PackedModelError(f"cannot open {path} ({error.strerror}): let this process read it") from error
        return file

    def nbytes(self, layer: int) -> int:
        """Size of one record of `layer`."""
        return self._layers[layer].record_nbytes

    def place(self, layer: int, expert: int) -> Place:
        """Where a record is, for whoever reads it without `read` and `check`."""
        entry = self._layers[layer]
        offset = entry.offset + expert * entry.record_nbytes
        crc32 = None if (layer, expert) in self._trusted else entry.crc32[expert]
        return Place(self._files[entry.file], offset, entry.record_nbytes, crc32)

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        """Fill `into` from the record. Raises PackedModelError where the file ends early or the disk fails."""
        place = self.place(layer, expert)
        offset = place.offset + start
        try:
            done = read_into(place.file, into, offset)
        except OSError as error:
            raise self.unreadable(layer, offset, error.errno or 0) from error
        if done < len(into):
            raise self.ended(layer, offset + done)
        if not self.direct:
            os.posix_fadvise(place.file, offset, len(into), os.POSIX_FADV_DONTNEED)

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        """Compare the checksum the first time a record is read; later reads trust the file."""
        crc32 = self.place(layer, expert).crc32
        if crc32 is not None and checksum(record) != crc32:
            raise self.corrupted(layer, expert)
        self.trust(layer, expert)

    def trust(self, layer: int, expert: int) -> None:
        """A record has the checksum that it should have."""
        self._trusted.add((layer, expert))

    def unreadable(self, layer: int, at: int, number: int) -> PackedModelError:
        """The system's error `number` came at byte `at` of a layer's file."""
        return PackedModelError(f"{self._path(layer)}: {os.strerror(number)} at byte {at}: check the disk")

    def ended(self, layer: int, at: int) -> PackedModelError:
        """A layer's file is too short."""
        return ended(self._path(layer), at)

    def corrupted(self, layer: int, expert: int) -> PackedModelError:
        """A record's checksum is another."""
        return corrupted(self._path(layer), f"expert {expert} of {self._layers[layer].module}")

    def _path(self, layer: int) -> Path:
        return self._folder / self._layers[layer].file

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])


class MemoryStore:
    """Records held in memory: one bytes object per expert, layers of equal experts."""

    def __init__(self, records: "list[list[bytes]]") -> None:
        self._records = records
        self.record_nbytes = max(len(record) for layer in records for record in layer)

    def nbytes(self, layer: int) -> int:
        """Size of one record of `layer`."""
        return len(self._records[layer][0])

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        """Copy from memory."""
        into[:] = self._records[layer][expert][start : start + len(into)]

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        """Memory is trusted."""

    def close(self) -> None:
        """Nothing to release."""


class Arena:
    """Buffers for records in one page-aligned mapping: what direct I/O reads into and kernels compute from."""

    def __init__(self, count: int, record_nbytes: int) -> None:
        self.count, self.record_nbytes = count, record_nbytes
        self.memory = allocate(max(count * record_nbytes, 1))
        """all buffers, uint8 [count · record_nbytes]"""
        self._view = byte_view(self.memory)
        self._touched = bytearray(count)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.count * self.record_nbytes

    @property
    def untouched_nbytes(self) -> int:
        """Bytes of the buffers that nothing was read into yet: the system counts them as free."""
        return (self.count - sum(self._touched)) * self.record_nbytes

    def touch(self, buffer: int) -> int:
        """A buffer is to be read into: where it starts in `memory`."""
        self._touched[buffer] = 1
        return buffer * self.record_nbytes

    def view(self, buffer: int, nbytes: int) -> memoryview:
        """The first `nbytes` of a buffer, to read into."""
        start = self.touch(buffer)
        return self._view[start : start + nbytes]

    def address(self, buffer: int) -> int:
        """Where a buffer starts in memory."""
        return self.memory.data_ptr() + buffer * self.record_nbytes

    def record(self, buffer: int) -> torch.Tensor:
        """A buffer as uint8 [record_nbytes], sharing memory."""
        start = self.touch(buffer)
        return self.memory[start : start + self.record_nbytes]
