"""Pack a checkpoint: an expert for each core, or one dense tensor, in memory at a time.

Everything about the output except the weights' bits is known before the first byte is written: file names, sizes and
offsets follow from the shapes. So free disk is checked first, and a resumed run makes the same files.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from greenroom import seam
from greenroom.buffers import byte_view
from greenroom.calibration import Calibration, scratch_nbytes, windows_of
from greenroom.checkpoint import Checkpoint, DenseGroup, resolve, sidecars
from greenroom.checksum import checksum
from greenroom.config import PackSettings
from greenroom.errors import ConfigError, PackedModelError, PackError
from greenroom.expert_records import experts_entry, pack_weight, record_entries, record_of
from greenroom.machine import available_memory, free_disk
from greenroom.original import Text
from greenroom.packed import (
    MANIFEST_NAME,
    Entry,
    ExpertsEntry,
    FileEntry,
    Journal,
    LinearEntry,
    Manifest,
    PackedModel,
    TensorEntry,
    header_of,
    locked,
    replace_text,
    write_file,
)
from greenroom.progress import Progress
from greenroom.quant import Format, Layout
from greenroom.sizes import format_bytes
from greenroom.threads import in_order

_DENSE_FILE_NBYTES = 1 << 30  # a kill loses at most one file
_EXPERT_NBYTES = 16  # for each weight of an expert that is being packed: as read, in float32, balanced, rounded
_SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL", torch.uint8: "U8",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DenseOutput:
    """One entry made of dense tensor `source`: packed as a linear where `format` is set, plain otherwise."""

    name: str
    source: str
    shape: "tuple[int, ...]"
    dtype: torch.dtype
    format: "Format | None"

    @property
    def entry(self) -> Entry:
        if self.format is not None:
            nbytes = Layout(self.shape[0], self.shape[1], self.format).nbytes
            return Entry(name=self.name, dtype="U8", shape=(nbytes,), nbytes=nbytes)
        nbytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        return Entry(name=self.name, dtype=_SAFETENSORS_NAMES[self.dtype], shape=self.shape, nbytes=nbytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """One file to write: its entries, the source bytes they cost, and what makes their data."""

    name: str
    entries: "list[Entry]"
    source_nbytes: int
    data: "Callable[[Progress], Iterator[memoryview]]"

    @property
    def nbytes(self) -> int:
        return len(header_of(self.entries)[0]) + sum(entry.nbytes for entry in self.entries)


def pack(
    src: "str | Path",
    dst: "str | Path",
    *,
    expert_bits: int = 4,
    attention_bits: int = 8,
    head_bits: int = 8,
    group_size: "int | None" = None,
    calibrate: "str | Path | None" = None,
) -> PackedModel:
    """Quantise and pack the checkpoint `src` (a folder or hub id) into the folder `dst`.

    `expert_bits`, `attention_bits` (all dense linears of the decoder layers) and `head_bits` are 2, 3, 4, 8 or 16;
    `group_size` is the experts' (default: the paper's for their bits). Routers, norms and embeddings stay 16-bit.
    `calibrate` is a text file: experts of 2 to 8 bits then get the codes that compute best with the inputs that this
    text gives them, in the same bytes; for that the original is run on 16,384 tokens of it first.
    A killed run resumes and ends with the same bytes. `dst` holds a readable model only when all is written.

    Raises ConfigError, CheckpointError, UnsupportedModelError or PackError (disk space, interrupted, other settings,
    another process packs into `dst`).
    """
    settings = PackSettings(
        expert_bits=expert_bits, attention_bits=attention_bits, head_bits=head_bits, group_size=group_size
    )
    dst = Path(dst)
    text = None if calibrate is None else Text.read(Path(calibrate))
    if text is not None and expert_bits == 16:
        raise ConfigError("experts of 16 bits have no codes to choose: pack them without --calibrate")
    checkpoint = Checkpoint(resolve(src, dst, settings.bits_per_weight))
    with checkpoint.shards:
        try:
            return _Packing(checkpoint, dst, settings, text).run()
        except KeyboardInterrupt:
            raise PackError(f"interrupted: run the same command again and packing into {dst} resumes") from None


def preview(checkpoint: Checkpoint, settings: "Mapping[str, Any]") -> Manifest:
    """The manifest that packing would write, with zeros for checksums: all sizes, no weights read.

    A dense model, which `pack` refuses, is treated as if its MLPs were its experts.
    """
    packing = _Packing(checkpoint, checkpoint.folder, PackSettings(**settings))
    return packing.manifest({file.name: [0] * len(file.entries) for file in packing.files}, {})


class _Packing:
    """One run of `pack`."""

    def __init__(self, checkpoint: Checkpoint, dst: Path, settings: PackSettings, text: "Text | None" = None) -> None:
        self.checkpoint, self.dst, self.settings = checkpoint, dst, settings
        self._windows = None if text is None else windows_of(checkpoint.folder, text)
        self._calibration: Calibration | None = None
        self._head = seam.output_head(checkpoint.model)
        self._embeddings = {f"{name}.weight" for name in seam.plain_embeddings(checkpoint.model)}
        self._linears = set(seam.packable_linears(checkpoint.model, checkpoint.experts))
        self._dense_model = not checkpoint.experts
        self.experts = [self._experts_file(i, module) for i, module in enumerate(checkpoint.experts)]
        self.dense = self._dense_files()
        self.files = [file for file, _ in self.experts] + [file for file, _ in self.dense]
        self.source = {"fingerprint": checkpoint.fingerprint(), **({"calibration": text.sha256} if text else {})}

    def run(self) -> PackedModel:
        if not self.dst.exists():
            self._check_space({})
            self._make_folder()
        elif not self.dst.is_dir():
            raise PackError(f"{self.dst} exists and is no packed model: choose another folder")
        with locked(self.dst):
            return self._already_packed() if (self.dst / MANIFEST_NAME).is_file() else self._write()

    def _make_folder(self) -> None:
        try:
            self.dst.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PackError(f"cannot make {self.dst} ({error.strerror or error}): choose another folder") from error

    def _write(self) -> PackedModel:
        if not Journal.path_in(self.dst).is_file() and not Journal.may_start_in(self.dst):
            raise PackError(f"{self.dst} exists and is no packed model: choose another folder")
        journal = Journal(self.dst, json.dumps([self.source, dataclasses.asdict(self.settings)], sort_keys=True))
        self._check_space(journal.done)
        journal.start()
        with self._calibrated(journal.done), Progress("packing", self.checkpoint.nbytes) as progress:
            for file in self.files:
                if file.name in journal.done:
                    progress.skip(file.source_nbytes)
                else:
                    journal.note(file.name, write_file(self.dst / file.name, file.entries, file.data(progress)))
        replace_text(self.dst / MANIFEST_NAME, self.manifest(journal.done, self._copy_sidecars()).to_json())
        journal.remove()
        return PackedModel(self.dst)

    @contextlib.contextmanager
    def _calibrated(self, done: "Collection[str]") -> "Iterator[None]":
        """While experts are packed for a text, what it gives them is at hand."""
        if self._windows is None or all(file.name in done for file, _ in self.experts):
            yield
            return
        room = available_memory() // 2
        with Calibration(self.checkpoint.folder, self._windows, self.dst, room) as self._calibration:
            yield

    def _already_packed(self) -> PackedModel:
        try:
            packed = PackedModel(self.dst)
        except PackedModelError as error:
            raise PackError(f"{self.dst} is damaged ({error}): delete this folder and pack again") from error
        if (packed.manifest.source, packed.manifest.settings) != (self.source, dataclasses.asdict(self.settings)):
            raise PackError(f"{self.dst} holds a packed model of another source or settings: choose another folder")
        Journal.path_in(self.dst).unlink(missing_ok=True)  # a kill may have come between the manifest and this
        return packed

    def _check_space(self, done: "Collection[str]") -> None:
        needed = sum(file.nbytes for file in self.files if file.name not in done)
        needed += 0 if self._windows is None else scratch_nbytes(self.checkpoint, self._windows.numel())
        free = free_disk(self.dst)
        if needed > free:
            raise PackError(
                f"{self.dst} needs {format_bytes(needed)} of disk and {format_bytes(free)} are free: make room, or "
                "choose fewer bits or another disk"
            )

    def _experts_file(self, number: int, module: seam.ExpertsModule) -> "tuple[_File, ExpertsEntry]":
        dtype = _name(_half(self.checkpoint.expert_dtype(module)))
        format = self.settings.format(self.settings.expert_bits, dtype, self.settings.group_size)
        entry = experts_entry(number, module, format, dtype)
        source_nbytes = self.checkpoint.experts_nbytes(module)

        def data(progress: Progress) -> "Iterator[memoryview]":
            inputs = None if self._calibration is None else self._calibration.inputs(module)
            read = ((expert, self.checkpoint.expert(module, expert)) for expert in range(module.num_experts))
            records = in_order(
                lambda item: record_of(self.checkpoint, module, entry, inputs, *item), read, _workers(module)
            )
            for record in records:
                progress.advance(source_nbytes // module.num_experts)
                yield byte_view(record)

        file = _File(name=entry.file, entries=record_entries(entry), source_nbytes=source_nbytes, data=data)
        return file, entry

    def _dense_files(self) -> "list[tuple[_File, list[_DenseOutput]]]":
        batches: list[list[DenseGroup]] = [[]]
        for group in self.checkpoint.dense_groups():
            if sum(other.nbytes for other in batches[-1]) + group.nbytes > _DENSE_FILE_NBYTES and batches[-1]:
                batches.append([])
            batches[-1].append(group)
        return [self._dense_file(number, batch) for number, batch in enumerate(batches) if batch]

    def _dense_file(self, number: int, groups: "list[DenseGroup]") -> "tuple[_File, list[_DenseOutput]]":
        outputs = {group.number: self._outputs(group) for group in groups}

        def data(progress: Progress) -> "Iterator[memoryview]":
            for group in groups:
                tensors = self.checkpoint.dense(group)
                for output in outputs[group.number]:
                    yield _bytes_of(tensors[output.source], output, self.checkpoint)
                progress.advance(group.nbytes)

        flat = [output for group in groups for output in outputs[group.number]]
        file = _File(
            name=f"dense-{number:05d}.safetensors",
            entries=[output.entry for output in flat],
            source_nbytes=sum(group.nbytes for group in groups),
            data=data,
        )
        return file, flat

    def _outputs(self, group: DenseGroup) -> "list[_DenseOutput]":
        """What becomes of a group's tensors; a tied embedding is also packed as the output head."""
        outputs = []
        for name, shape in group.shapes.items():
            half = _half(group.dtype)
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and (module == self._head or module in self._linears):
                format = self._format(module, _name(half))
                outputs.append(_DenseOutput(name=module, source=name, shape=shape, dtype=half, format=format))
                continue
            dtype = _plain_dtype(group.dtype, shape)
            outputs.append(_DenseOutput(name=name, source=name, shape=shape, dtype=dtype, format=None))
            if self._head is not None and self.checkpoint.tied.get(f"{self._head}.weight") == name:
                format = self.settings.format(self.settings.head_bits, _name(half))
                outputs.append(_DenseOutput(name=self._head, source=name, shape=shape, dtype=half, format=format))
        return outputs

    def _format(self, linear: str, dtype: str) -> Format:
        """How the linear at this path is packed. The MLPs of a dense model count as its experts."""
        settings = self.settings
        if linear == self._head:
            return settings.format(settings.head_bits, dtype)
        if self._dense_model and not seam.in_attention(linear):
            return settings.format(settings.expert_bits, dtype, settings.group_size)
        return settings.format(settings.attention_bits, dtype)

    def _copy_sidecars(self) -> "dict[str, int]":
        copied = {}
        for path in sidecars(self.checkpoint.folder):
            if path.name in (MANIFEST_NAME, Journal.path_in(self.dst).name):
                continue
            try:
                shutil.copyfile(path, self.dst / path.name)
            except OSError as error:
                reason = f"{path} cannot be copied to {self.dst} ({error.strerror or error})"
                raise PackError(f"{reason}: make room and run the same command again") from error
            copied[path.name] = checksum(path.read_bytes())
        return copied

    def manifest(self, done: "dict[str, list[int]]", sidecars: "dict[str, int]") -> Manifest:
        """What to write last, from the checksums of each file's entries."""
        files = {}
        for file in self.files:
            header = header_of(file.entries)[0]
            files[file.name] = FileEntry(nbytes=file.nbytes, header_nbytes=len(header), header_crc32=checksum(header))
        linears, tensors = [], []
        for file, outputs in self.dense:
            offsets = header_of(file.entries)[1]
            for output, crc32 in zip(outputs, done[file.name], strict=True):
                place: dict[str, Any] = {
                    "file": file.name, "offset": offsets[output.name], "nbytes": output.entry.nbytes, "crc32": crc32
                }  # fmt: skip
                if output.format is not None:
                    rows, cols = output.shape
                    linears.append(LinearEntry(module=output.name, rows=rows, cols=cols, format=output.format, **place))
                else:
                    mappable = output.name in self._embeddings and output.dtype.itemsize == 2
                    tensors.append(
                        TensorEntry(
                            name=output.name, dtype=_name(output.dtype), shape=output.shape, mappable=mappable, **place
                        )
                    )
        served = {f"{entry.module}.weight" for entry in linears}
        return Manifest(
            architecture=type(self.checkpoint.model).__name__,
            model_type=self.checkpoint.config.model_type,
            settings=dataclasses.asdict(self.settings),
            source=self.source,
            files=files,
            sidecars=sidecars,
            experts=tuple(dataclasses.replace(entry, crc32=tuple(done[file.name])) for file, entry in self.experts),
            linears=tuple(linears),
            tensors=tuple(tensors),
            tied={name: other for name, other in self.checkpoint.tied.items() if name not in served},
        )


def _workers(module: seam.ExpertsModule) -> int:
    """How many of a module's experts are packed at a time."""
    weights = sum(parameter.rows * parameter.cols for parameter in module.parameters)
    return max(1, min(torch.get_num_threads(), available_memory() // 2 // (_EXPERT_NBYTES * weights)))


def _bytes_of(tensor: torch.Tensor, output: _DenseOutput, checkpoint: Checkpoint) -> memoryview:
    if output.format is not None:
        packed = torch.zeros(output.entry.nbytes, dtype=torch.uint8)
        pack_weight(tensor, output.format, packed, checkpoint, output.source)
        return byte_view(packed)
    plain = tensor.to(output.dtype).contiguous().view(-1)
    return byte_view(plain)


def _plain_dtype(dtype: torch.dtype, shape: "tuple[int, ...]") -> torch.dtype:
    """Float matrices are kept at 16 bits, float32 vectors (norms, biases, corrections) and integers as they are."""
    vector = dtype == torch.float32 and len(shape) < 2
    return dtype if vector or not dtype.is_floating_point else _half(dtype)


def _half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype a float tensor is kept in: its own, or bfloat16."""
    return dtype if dtype == torch.float16 else torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
