"""A packed model of true shape without a source: random codes with sane scales, written as `greenroom.packed` does."""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import routing
from benchmarks.shapes import Pairing, Shape
from greenroom import seam
from greenroom.buffers import byte_view
from greenroom.packed import (
    MANIFEST_NAME,
    Entry,
    ExpertsEntry,
    FileEntry,
    LinearEntry,
    Manifest,
    TensorEntry,
    header_of,
    replace_text,
    write_file,
)
from greenroom.packing import experts_entry, record_entries
from greenroom.quant import Format, Layout, quantize_into

_DENSE = Format.of(4, 64)
_HALF = "bfloat16"
"""Of what is not packed."""
_DENSE_FILE = "dense-00000.safetensors"
_POOL_SPARE = 32 << 20
"""Windows into the pool of random bytes start at this many places."""


def write(folder: Path, shape: Shape, pairing: Pairing, distinct: "int | None" = None) -> None:
    """Write the packed model; nothing is at `folder` unless all of it is. Raises PackError where it cannot.

    `distinct`: how many layers (≥ 1) have experts of their own. The files of the others are links to these, in turn, so
    that a deep model costs the time and the disk of a shallow one; in memory every layer's experts are its own. Their
    safetensors headers, which only other tools read, name the layer that is repeated.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _Writer(partial, shape, pairing, distinct).write()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Pool:
    """Random bytes to take windows from: as fast as copying, and different at every place."""

    def __init__(self, largest: int) -> None:
        self._rng = np.random.default_rng(0)
        self._bytes = torch.from_numpy(np.frombuffer(self._rng.bytes(largest + _POOL_SPARE), dtype=np.uint8).copy())

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], a copy."""
        start = int(self._rng.integers(0, (len(self._bytes) - nbytes) // 64 + 1)) * 64
        return self._bytes[start : start + nbytes].clone()


class _Writer:
    """One packed model being written."""

    def __init__(self, folder: Path, shape: Shape, pairing: Pairing, distinct: "int | None") -> None:
        self.folder, self.shape, self.distinct = folder, shape, distinct
        self.format = Format.of(pairing.bits, pairing.group_size)
        self.settings = {
            "expert_bits": pairing.bits, "attention_bits": 4, "head_bits": 4, "group_size": pairing.group_size
        }  # fmt: skip
        config = json.dumps(shape.config(), indent=1)
        (folder / "config.json").write_text(config)
        self.sidecars = {"config.json": zlib.crc32(config.encode())}
        self.model = seam.skeleton(seam.load_config(folder))
        self.modules = seam.experts_modules(self.model)
        self.files: dict[str, FileEntry] = {}
        self.random = torch.Generator().manual_seed(0)

    def write(self) -> None:
        experts = [experts_entry(n, module, self.format, _HALF) for n, module in enumerate(self.modules)]
        linears = self._linears()
        largest = max([e.record_nbytes for e in experts] + [Layout(*size, _DENSE).nbytes for size in linears.values()])
        self.pool = _Pool(largest)
        written = [self._write_experts(entry) for entry in experts[: self.distinct]]
        written += [self._repeat(entry, written[n % len(written)]) for n, entry in enumerate(experts[len(written) :])]
        dense = self._write_dense(linears)
        manifest = Manifest(
            architecture=type(self.model).__name__,
            model_type=self.shape.family,
            settings=self.settings,
            source={"fingerprint": f"synthetic {self.shape.name}"},
            files=self.files,
            sidecars=self.sidecars,
            experts=tuple(written),
            linears=tuple(entry for entry in dense if isinstance(entry, LinearEntry)),
            tensors=tuple(entry for entry in dense if isinstance(entry, TensorEntry)),
            tied={},
        )
        replace_text(self.folder / MANIFEST_NAME, manifest.to_json())

    def _write_experts(self, entry: ExpertsEntry) -> ExpertsEntry:
        def records() -> "Iterator[memoryview]":
            for _ in range(entry.num_experts):
                record = self.pool.take(entry.record_nbytes)
                for tensor in entry.tensors:
                    part, into_residual = tensor.part(record), "down" in tensor.name
                    if tensor.name.endswith("_bias"):
                        bias = routing.bias(tensor.cols, self.random, into_residual=into_residual)
                        quantize_into(bias[None], tensor.format, part)
                    else:
                        _scale(part, tensor.rows, tensor.cols, tensor.format, into_residual)
                yield byte_view(record)

        return dataclasses.replace(entry, crc32=tuple(self._write_file(entry.file, record_entries(entry), records())))

    def _repeat(self, entry: ExpertsEntry, written: ExpertsEntry) -> ExpertsEntry:
        """The entry with the bytes of one that is written: a link to its file, or a copy where there are no links."""
        source, target = self.folder / written.file, self.folder / entry.file
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        self.files[entry.file] = self.files[written.file]
        return dataclasses.replace(entry, offset=written.offset, crc32=written.crc32)

    def _linears(self) -> "dict[str, tuple[int, int]]":
        """Path of each linear that runs from packed bits → (rows, cols)."""
        paths = [*seam.packable_linears(self.model, self.modules), seam.output_head(self.model)]
        found = {path: self.model.get_submodule(path) for path in paths if path is not None}
        return {path: (linear.out_features, linear.in_features) for path, linear in found.items()}

    def _write_dense(self, linears: "dict[str, tuple[int, int]]") -> "list[LinearEntry | TensorEntry]":
        served = {f"{path}.weight" for path in linears}
        served |= {f"{module.name}.{parameter.name}" for module in self.modules for parameter in module.parameters}
        plain = [name for name in seam.required_weights(self.model) if name not in served]
        entries = []
        for path, (rows, cols) in linears.items():
            nbytes = Layout(rows, cols, _DENSE).nbytes
            entries.append(Entry(name=path, dtype="U8", shape=(nbytes,), nbytes=nbytes))
        for name in plain:
            size = tuple(seam.tensor(self.model, name).shape)
            entries.append(Entry(name=name, dtype="BF16", shape=size, nbytes=2 * math.prod(size)))

        def data() -> "Iterator[memoryview]":
            for path, (rows, cols) in linears.items():
                packed = self.pool.take(Layout(rows, cols, _DENSE).nbytes)
                _scale(packed, rows, cols, _DENSE, path.endswith("o_proj"))
                yield byte_view(packed)
            for name in plain:
                yield byte_view(self._plain(name))

        checksums = self._write_file(_DENSE_FILE, entries, data())
        offsets = header_of(entries)[1]
        made: list[LinearEntry | TensorEntry] = []
        for entry, crc32 in zip(entries, checksums, strict=True):
            place: dict[str, Any] = {
                "file": _DENSE_FILE, "offset": offsets[entry.name], "nbytes": entry.nbytes, "crc32": crc32
            }  # fmt: skip
            if entry.name in linears:
                rows, cols = linears[entry.name]
                made.append(LinearEntry(module=entry.name, rows=rows, cols=cols, format=_DENSE, **place))
            else:
                mappable = entry.name.removesuffix(".weight") in seam.plain_embeddings(self.model)
                made.append(TensorEntry(name=entry.name, dtype=_HALF, shape=entry.shape, mappable=mappable, **place))
        return made

    def _plain(self, name: str) -> torch.Tensor:
        """Embedding, routers with biases of zero, norms of ones; the biases of attention, and its sinks."""
        size = tuple(seam.tensor(self.model, name).shape)
        if size == (self.shape.vocab, self.shape.hidden):
            return routing.embedding(*size)
        if size == (self.shape.experts, self.shape.hidden):
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            return routing.router(layer, *size)
        assert len(size) == 1, f"{name} {size} is neither norm nor bias"
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=torch.bfloat16)
        if name.endswith("router.bias"):
            return torch.zeros(size, dtype=torch.bfloat16)
        return routing.bias(size[0], self.random, into_residual=name.endswith("o_proj.bias"))

    def _write_file(self, name: str, entries: "list[Entry]", data: "Iterator[memoryview]") -> "list[int]":
        checksums = write_file(self.folder / name, entries, data)
        header, size = header_of(entries)[0], (self.folder / name).stat().st_size
        self.files[name] = FileEntry(nbytes=size, header_nbytes=len(header), header_crc32=zlib.crc32(header))
        return checksums


def _scale(packed: torch.Tensor, rows: int, cols: int, format: Format, into_residual: bool) -> None:
    """Give random codes the deviation that `routing` wants: scales within a quarter, zeros in the middle."""
    step = routing.deviation(cols, into_residual=into_residual) * math.sqrt(12) / (1 << format.bits)
    params = torch.tensor([step, step / 1024, format.top / 2 - 0.5, 1 / 256])
    Layout(rows, cols, format).view(packed, "row_params")[:] = params.to(torch.bfloat16)
