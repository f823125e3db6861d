"""A model of a benchmark's shape as greenroom packs it, without a checkpoint: written as `greenroom.packed` does."""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.shapes import Pairing, Shape
from greenroom import seam
from greenroom.buffers import byte_view
from greenroom.expert_records import experts_entry, record_entries
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
from greenroom.quant import Format, Layout

_DENSE = Format.of(4, 64)
_HALF = "bfloat16"
"""Of what is not packed."""
_DENSE_FILE = "dense-00000.safetensors"


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

    def write(self) -> None:
        experts = [experts_entry(n, module, self.format, _HALF) for n, module in enumerate(self.modules)]
        linears = self._linears()
        largest = max([e.record_nbytes for e in experts] + [Layout(*size, _DENSE).nbytes for size in linears.values()])
        self.weights = self.shape.weights(largest)
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
        records = map(byte_view, self.weights.records(entry))
        return dataclasses.replace(entry, crc32=tuple(self._write_file(entry.file, record_entries(entry), records)))

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
        sizes = {name: tuple(seam.tensor(self.model, name).shape) for name in plain}
        entries = []
        for path, (rows, cols) in linears.items():
            nbytes = Layout(rows, cols, _DENSE).nbytes
            entries.append(Entry(name=path, dtype="U8", shape=(nbytes,), nbytes=nbytes))
        for name, size in sizes.items():
            entries.append(Entry(name=name, dtype="BF16", shape=size, nbytes=2 * math.prod(size)))

        def data() -> "Iterator[memoryview]":
            for path, (rows, cols) in linears.items():
                yield byte_view(self.weights.linear(path, rows, cols, _DENSE))
            for name, size in sizes.items():
                yield byte_view(self.weights.plain(name, size))

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

    def _write_file(self, name: str, entries: "list[Entry]", data: "Iterator[memoryview]") -> "list[int]":
        checksums = write_file(self.folder / name, entries, data)
        header, size = header_of(entries)[0], (self.folder / name).stat().st_size
        self.files[name] = FileEntry(nbytes=size, header_nbytes=len(header), header_crc32=zlib.crc32(header))
        return checksums
