"""Read an expert's record into a given buffer.

`DiskStore` reads from the packed files with direct I/O, so that the page cache does not hold a second copy;
`MemoryStore` is the in-memory one for tests and for models that fit. Neither knows which expert deserves a place.
"""

import os
import threading
from pathlib import Path
from typing import Protocol

import torch

from greenroom.buffers import allocate, byte_view, open_direct, read_into
from greenroom.errors import PackedModelError
from greenroom.packed import PackedModel, check_bytes


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
        self._checked: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

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

    def read(self, layer: int, expert: int, start: int, into: memoryview) -> None:
        """Fill `into` from the record. Raises PackedModelError where the file ends early or the disk fails."""
        entry = self._layers[layer]
        path, file = self._folder / entry.file, self._files[entry.file]
        offset = entry.offset + expert * entry.record_nbytes + start
        try:
            done = read_into(file, into, offset)
        except OSError as error:
            raise PackedModelError(f"{path}: {error.strerror} at byte {offset}: check the disk") from error
        if done < len(into):
            raise PackedModelError(f"{path} ended at byte {offset + done}: delete the packed folder and pack again")
        if not self.direct:
            os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_DONTNEED)

    def check(self, layer: int, expert: int, record: memoryview) -> None:
        """Compare the checksum the first time a record is read; later reads trust the file."""
        with self._lock:
            if (layer, expert) in self._checked:
                return
        entry = self._layers[layer]
        check_bytes(self._folder / entry.file, record, entry.crc32[expert], f"expert {expert} of {entry.module}")
        with self._lock:
            self._checked.add((layer, expert))

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
        self._tensor = allocate(max(count * record_nbytes, 1))
        self._view = byte_view(self._tensor)
        self._touched = bytearray(count)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.count * self.record_nbytes

    @property
    def untouched_nbytes(self) -> int:
        """Bytes of the buffers that nothing was read into yet: the system counts them as free."""
        return (self.count - sum(self._touched)) * self.record_nbytes

    def view(self, buffer: int, nbytes: int) -> memoryview:
        """The first `nbytes` of a buffer, to read into."""
        start = buffer * self.record_nbytes
        self._touched[buffer] = 1
        return self._view[start : start + nbytes]

    def address(self, buffer: int) -> int:
        """Where a buffer starts in memory."""
        return self._tensor.data_ptr() + buffer * self.record_nbytes

    def record(self, buffer: int) -> torch.Tensor:
        """A buffer as uint8 [record_nbytes], sharing memory."""
        start = buffer * self.record_nbytes
        self._touched[buffer] = 1
        return self._tensor[start : start + self.record_nbytes]
