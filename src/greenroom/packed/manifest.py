"""The manifest: one JSON file that says what every byte of a packed model is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from greenroom.checksum import checksum
from greenroom.errors import PackedModelError
from greenroom.packed.receipt import Receipt
from greenroom.quant import Format, Layout

MANIFEST_NAME = "greenroom.json"
VERSION = 1
WITH_RECEIPT = 2
"""The version of a manifest that has a receipt; the same in all else."""
RECORD_ALIGNMENT = 4096
"""Records start at and are padded to multiples of this many bytes: what direct I/O asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordTensor:
    """One parameter inside an expert's record, at `offset` bytes. A bias is a 16-bit row."""

    name: str
    rows: int
    cols: int
    offset: int
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor."""
        return Layout(self.rows, self.cols, self.format).nbytes

    def part(self, record: torch.Tensor) -> torch.Tensor:
        """This parameter's bytes of a `record` uint8 [record_nbytes], sharing memory."""
        return record[self.offset : self.offset + self.nbytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsEntry:
    """One MoE layer: expert e is the `record_nbytes` bytes at `offset + e * record_nbytes` of `file`."""

    module: str
    num_experts: int
    file: str
    offset: int
    record_nbytes: int
    tensors: "tuple[RecordTensor, ...]"
    crc32: "tuple[int, ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearEntry:
    """One packed dense linear: `nbytes` bytes at `offset` of `file`, laid out by `format`."""

    module: str
    file: str
    offset: int
    nbytes: int
    rows: int
    cols: int
    format: Format
    crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One plain tensor (norm, router, embedding, bias): raw values of `dtype` (a torch name).

    `mappable`: an embedding of which a token touches one row, so that it need not be held in memory.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: "tuple[int, ...]"
    mappable: bool
    crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A weight file: its size, and the checksum of its first `header_nbytes` bytes (the safetensors header)."""

    nbytes: int
    header_nbytes: int
    header_crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a packed model that is not a weight."""

    architecture: str
    model_type: str
    settings: "dict[str, Any]"
    source: "dict[str, Any]"
    files: "dict[str, FileEntry]"
    sidecars: "dict[str, int]"
    """configuration and tokenizer files → crc32"""
    experts: "tuple[ExpertsEntry, ...]"
    linears: "tuple[LinearEntry, ...]"
    tensors: "tuple[TensorEntry, ...]"
    tied: "dict[str, str]"
    """tied weight → the weight it shares"""
    receipt: "Receipt | None" = None
    """what was measured of the packed model's quality, where it was"""

    def to_json(self) -> str:
        """The manifest as text, with sorted keys so that equal models have equal files."""
        version = VERSION if self.receipt is None else WITH_RECEIPT
        body = {"format": "greenroom", "version": version, **dataclasses.asdict(self)}
        del body["receipt"]
        if self.receipt is not None:
            body["receipt"] = self.receipt.to_body()
        return json.dumps({**body, "crc32": _checksum(body)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder`'s manifest. Raises PackedModelError where it is missing, foreign, newer or damaged."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise PackedModelError(f"{folder} is no packed model (no {MANIFEST_NAME}): run greenroom pack first")
        try:
            body = json.loads(path.read_text())
            crc32 = body.pop("crc32", None)
            intact = crc32 == _checksum(body)
            kind, version = body.pop("format"), body.pop("version")
            remedy = "delete the packed folder and pack again"
            if kind != "greenroom" or version not in (VERSION, WITH_RECEIPT):
                raise PackedModelError(
                    f"{path} has format {kind!r} version {version!r}, this greenroom reads {VERSION} and "
                    f"{WITH_RECEIPT}: {remedy}"
                )
            if not intact:
                raise PackedModelError(
                    f"{path} is corrupted (its checksum does not match): delete the packed folder and pack again"
                )
            if ("receipt" in body) != (version == WITH_RECEIPT):
                raise ValueError(f"version {version} and a receipt do not go together")
            return cls._parse(body)
        except PackedModelError:
            raise
        except Exception as error:  # any shape of damage: the file is outside our control
            raise PackedModelError(
                f"{path} is damaged ({type(error).__name__}: {error}): delete the packed folder and pack again"
            ) from error

    @classmethod
    def _parse(cls, body: "dict[str, Any]") -> "Manifest":
        experts = [_experts_entry(entry) for entry in body.pop("experts")]
        linears = [
            LinearEntry(**{**entry, "format": Format.from_json(entry["format"])}) for entry in body.pop("linears")
        ]
        tensors = [TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in body.pop("tensors")]
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        receipt = Receipt.of_body(body.pop("receipt")) if "receipt" in body else None
        manifest = cls(
            files=files, receipt=receipt, experts=tuple(experts), linears=tuple(linears), tensors=tuple(tensors), **body
        )
        manifest._check_extents()
        return manifest

    def _check_extents(self) -> None:
        extents: list[tuple[str, int, int]] = [
            (e.file, e.offset, e.record_nbytes * e.num_experts) for e in self.experts
        ]
        extents += [(entry.file, entry.offset, entry.nbytes) for entry in self.linears]
        extents += [(entry.file, entry.offset, entry.nbytes) for entry in self.tensors]
        for name in (*self.files, *self.sidecars):
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no plain file name")
        for linear in self.linears:
            if linear.nbytes != Layout(linear.rows, linear.cols, linear.format).nbytes:
                raise ValueError(f"the bytes of {linear.module} do not fit its shape")
        for file, offset, nbytes in extents:
            if offset < 0 or nbytes < 0 or offset + nbytes > self.files[file].nbytes:
                raise ValueError(f"bytes {offset}+{nbytes} lie outside {file!r}")


def _checksum(body: "dict[str, Any]") -> int:
    return checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _experts_entry(entry: "dict[str, Any]") -> ExpertsEntry:
    tensors = tuple(RecordTensor(**{**t, "format": Format.from_json(t["format"])}) for t in entry["tensors"])
    made = ExpertsEntry(**{**entry, "tensors": tensors, "crc32": tuple(entry["crc32"])})
    if made.offset % RECORD_ALIGNMENT or made.record_nbytes % RECORD_ALIGNMENT:
        raise ValueError(f"the records of {made.module} are not aligned to {RECORD_ALIGNMENT} bytes")
    if len(made.crc32) != made.num_experts or any(
        t.offset < 0 or t.offset + t.nbytes > made.record_nbytes for t in tensors
    ):
        raise ValueError(f"the records of {made.module} do not add up")
    return made
