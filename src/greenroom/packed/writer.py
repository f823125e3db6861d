"""Write the files of a packed model so that a kill at any moment loses at most the file being written.

Each file is written under a temporary name, flushed to disk and renamed; a journal then notes its checksums. Bytes
depend on the inputs alone, so a resumed run ends with the same files as an undisturbed one.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from greenroom.checksum import checksum
from greenroom.errors import PackError
from greenroom.packed.manifest import RECORD_ALIGNMENT

JOURNAL_NAME = "packing.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One safetensors entry: `dtype` is the safetensors name, `nbytes` what its data must have."""

    name: str
    dtype: str
    shape: "tuple[int, ...]"
    nbytes: int


def header_of(entries: "Iterable[Entry]") -> "tuple[bytes, dict[str, int]]":
    """The padded safetensors header for `entries` in order, and each entry's absolute offset.

    The header is padded with spaces to a multiple of RECORD_ALIGNMENT, so that the first entry is aligned; entries
    that must be aligned have sizes that are multiples of it, and come first.
    """
    table: dict[str, Any] = {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % RECORD_ALIGNMENT)
    start = 8 + len(text)
    offsets = {name: start + item["data_offsets"][0] for name, item in table.items()}
    return len(text).to_bytes(8, "little") + text, offsets


def write_file(path: Path, entries: "list[Entry]", data: "Iterable[memoryview]") -> "list[int]":
    """Write one safetensors file and return the crc32 of each entry. Nothing is at `path` unless all of it is."""
    temporary = path.with_name(path.name + ".partial")
    header, _ = header_of(entries)
    checksums = []
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for entry, chunk in zip(entries, data, strict=True):
                if chunk.nbytes != entry.nbytes:
                    raise AssertionError(f"{entry.name}: {chunk.nbytes} bytes where {entry.nbytes} were announced")
                file.write(chunk)
                checksums.append(checksum(chunk))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # the remedy is often to make room; what is complete stays
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    return checksums


class Journal:
    """Notes of an unfinished pack: which files are complete, with their checksums.

    `plan` identifies source and settings: a journal of another plan is refused, never mixed.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        self.path = self.path_in(folder)
        self.done: dict[str, list[int]] = {}
        self._plan = plan
        if self.path.is_file():
            self._read(folder)

    @staticmethod
    def path_in(folder: Path) -> Path:
        """Where a folder's journal lies while packing is unfinished."""
        return folder / JOURNAL_NAME

    @staticmethod
    def may_start_in(folder: Path) -> bool:
        """Whether the folder is empty but for what a kill while the journal was first written left."""
        return all(path.name == JOURNAL_NAME + ".partial" for path in folder.iterdir())

    def start(self) -> None:
        """Mark the folder as an unfinished pack, before its first file."""
        self._write()

    def _write(self) -> None:
        replace_text(self.path, json.dumps({"plan": self._plan, "done": self.done}))

    def _read(self, folder: Path) -> None:
        try:
            notes = json.loads(self.path.read_text())
            plan, done = notes["plan"], {name: list(crcs) for name, crcs in notes["done"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackError(f"{self.path} is damaged: delete {folder} and pack again") from error
        if plan != self._plan:
            raise PackError(
                f"{folder} holds an unfinished pack of another source or settings: delete it or choose another"
            )
        self.done = {name: crc for name, crc in done.items() if (folder / name).is_file()}

    def note(self, name: str, checksums: "list[int]") -> None:
        """Record a complete file; survives a kill right after."""
        self.done[name] = checksums
        self._write()

    def remove(self) -> None:
        """The pack is complete."""
        self.path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> PackError:
    return PackError(f"cannot write {path} ({error.strerror or error}): make room and run the same command again")
