"""Open a packed model: sizes are checked at once, checksums whenever a record is read or verified."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from greenroom.buffers import allocate, byte_view, read_into
from greenroom.checksum import checksum
from greenroom.errors import PackedModelError
from greenroom.packed.manifest import MANIFEST_NAME, Manifest, TensorEntry
from greenroom.packed.receipt import Receipt
from greenroom.packed.writer import replace_text
from greenroom.progress import Progress


class PackedModel:
    """A packed model's folder and manifest.

    Raises PackedModelError at construction where a file is missing, truncated or of another size than the manifest
    says. Reading a damaged record raises it too: a wrong byte never becomes a wrong token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        for name, entry in self.manifest.files.items():
            path, size = folder / name, entry.nbytes
            if not path.is_file():
                raise PackedModelError(f"{folder} lacks {name}: delete the packed folder and pack again")
            if path.stat().st_size != size:
                raise PackedModelError(
                    f"{path} has {path.stat().st_size} bytes instead of {size}: delete the packed folder and pack again"
                )
        if not self._is_as_packed("config.json"):  # a number in it changes what the weights compute
            raise PackedModelError(
                f"{folder / 'config.json'} is missing or not what was packed: delete the packed folder and pack again"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all files the manifest lists."""
        return sum(entry.nbytes for entry in self.manifest.files.values())

    def read_linears(self) -> "dict[str, torch.Tensor]":
        """The packed bytes of every dense linear by module, uint8 [nbytes], side by side in one piece of memory."""
        entries = self.manifest.linears
        starts = [0, *itertools.accumulate(-(-entry.nbytes // 64) * 64 for entry in entries)]
        memory = allocate(starts[-1])
        found = {}
        for start, entry in zip(starts, entries, strict=False):
            found[entry.module] = memory[start : start + entry.nbytes]
            self._read(entry.file, entry.offset, found[entry.module], entry.crc32, entry.module)
        return found

    def read_tensor(self, entry: TensorEntry) -> torch.Tensor:
        """A plain tensor in its stored dtype."""
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._read(entry.file, entry.offset, raw, entry.crc32, entry.name)
        return raw.view(getattr(torch, entry.dtype)).view(entry.shape)

    def check_tensor(self, entry: TensorEntry, piece: int = 16 << 20) -> None:
        """Compare a plain tensor's checksum without holding it, as `read_tensor` does for one that is held."""
        crc32, path = 0, self.folder / entry.file
        with path.open("rb", buffering=0) as handle:
            for start in range(0, entry.nbytes, piece):
                raw = bytearray(min(piece, entry.nbytes - start))
                read_into(handle.fileno(), memoryview(raw), entry.offset + start)
                crc32 = checksum(raw, crc32)
            os.posix_fadvise(handle.fileno(), entry.offset, entry.nbytes, os.POSIX_FADV_DONTNEED)
        if crc32 != entry.crc32:
            raise corrupted(path, entry.name)

    def add_receipt(self, receipt: Receipt) -> None:
        """Put the receipt into the manifest, in the place of an earlier one; a reader sees the old or the new.

        Raises PackError where the folder cannot be written."""
        as_read = Receipt.of_body(receipt.to_body())  # figures are rounded
        self.manifest = dataclasses.replace(self.manifest, receipt=as_read)
        replace_text(self.folder / MANIFEST_NAME, self.manifest.to_json())

    def records(self) -> "Iterator[tuple[str, int, int, int, str]]":
        """(file, offset, nbytes, crc32, what it is) of every checksummed piece, in file order."""
        pieces = [
            (e.file, e.offset + i * e.record_nbytes, e.record_nbytes, e.crc32[i], f"expert {i} of {e.module}")
            for e in self.manifest.experts
            for i in range(e.num_experts)
        ]
        pieces += [(e.file, e.offset, e.nbytes, e.crc32, e.module) for e in self.manifest.linears]
        pieces += [(e.file, e.offset, e.nbytes, e.crc32, e.name) for e in self.manifest.tensors]
        pieces += [(f, 0, e.header_nbytes, e.header_crc32, "the header") for f, e in self.manifest.files.items()]
        return iter(sorted(pieces))

    def verify(self, progress: "Progress | None" = None) -> "list[str]":
        """Read everything and compare checksums; one line per damaged record, none if all is well."""
        damaged = []
        for name in self.manifest.sidecars:
            if not self._is_as_packed(name):
                damaged.append(
                    f"{self.folder / name} is missing or not what was packed: delete the packed folder and pack again"
                )
        for file, offset, nbytes, crc32, what in self.records():
            try:
                self._read(file, offset, torch.empty(nbytes, dtype=torch.uint8), crc32, what)
            except PackedModelError as error:
                damaged.append(str(error))
            if progress is not None:
                progress.advance(nbytes)
        return damaged

    def _is_as_packed(self, sidecar: str) -> bool:
        path = self.folder / sidecar
        return path.is_file() and checksum(path.read_bytes()) == self.manifest.sidecars.get(sidecar)

    def _read(self, file: str, offset: int, into: torch.Tensor, crc32: int, what: str) -> None:
        view, nbytes = byte_view(into), into.numel()
        with (self.folder / file).open("rb", buffering=0) as handle:
            done = read_into(handle.fileno(), view, offset)
            if done < nbytes:
                raise ended(self.folder / file, offset + done)
            os.posix_fadvise(handle.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
        if checksum(view) != crc32:
            raise corrupted(self.folder / file, what)


def ended(path: Path, at: int) -> PackedModelError:
    """What to say of a file that is too short."""
    return PackedModelError(f"{path} ended at byte {at}: delete the packed folder and pack again")


def corrupted(path: Path, what: str) -> PackedModelError:
    """What to say of bytes that do not have their checksum."""
    return PackedModelError(
        f"{path}: {what} is corrupted (its checksum does not match): delete the packed folder and pack again"
    )
