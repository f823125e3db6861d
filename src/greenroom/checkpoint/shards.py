"""Read safetensors shards with plain positioned reads.

Not through a memory map: mapped pages count towards the process, and a 90 GB checkpoint would look like 90 GB of
memory. Every header is checked against its file's size when the shards are opened, so a truncated download is
refused before any work is done.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from greenroom.buffers import byte_view, read_into
from greenroom.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_HEADER_LIMIT = 100 << 20  # the safetensors format's own limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: `offset` and `nbytes` in bytes from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: "tuple[int, ...]"
    offset: int
    nbytes: int


class Shards:
    """All tensors of a checkpoint folder by their Hugging Face names. Close it, or use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = _shard_paths(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for path in self.paths:
            self.tensors.update(read_header(path))
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the dtype of the file."""
        info = self.tensors[name]
        return self._read(info, info.offset, info.nbytes, info.shape)

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """`tensor[index : index + 1]` of a tensor stacked along its first dimension."""
        info = self.tensors[name]
        if not 0 <= index < info.shape[0]:
            raise CheckpointError(f"{info.path}: {name} has {info.shape[0]} entries, no number {index}")
        size = info.nbytes // info.shape[0]
        return self._read(info, info.offset + index * size, size, (1, *info.shape[1:]))

    def sample(self, name: str, nbytes: int = 4096) -> bytes:
        """Some bytes from the middle of the tensor's data."""
        info = self.tensors[name]
        nbytes = min(nbytes, info.nbytes)
        return os.pread(self._file(info.path), nbytes, info.offset + (info.nbytes - nbytes) // 2)

    def _read(self, info: TensorInfo, offset: int, nbytes: int, shape: "tuple[int, ...]") -> torch.Tensor:
        if nbytes == 0:
            return torch.empty(shape, dtype=info.dtype)
        raw = torch.empty(nbytes, dtype=torch.uint8)
        file = self._file(info.path)
        done = read_into(file, byte_view(raw), offset)
        if done < nbytes:
            raise CheckpointError(f"{info.path} ended at byte {offset + done}: fetch this shard again")
        os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_DONTNEED)  # each byte is read once
        return raw.view(info.dtype).view(shape)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def _shard_paths(folder: Path) -> "list[Path]":
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}): fetch it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{folder} lacks the shard {missing[0]}{more} that {index.name} lists: fetch it again"
            )
        return [folder / name for name in names]
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if len(paths) > 1:
        raise CheckpointError(f"{folder} has {len(paths)} shards but no {index.name}: fetch that file too")
    if not paths:
        others = [path.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth") for path in folder.glob(pattern)]
        found = f" (only {others[0]})" if others else ""
        raise CheckpointError(f"{folder} holds no safetensors weights{found}: give a folder that does")
    return paths


def read_header(path: Path) -> "dict[str, TensorInfo]":
    """All tensors of one safetensors file. Raises CheckpointError where header and file size disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes): fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor_info(path, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error!r}): fetch it again") from error
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes where its header says {end}: fetch this shard again")
    return tensors


def _tensor_info(path: Path, entry: "dict[str, Any]", start: int) -> TensorInfo:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"offsets {begin}–{end} do not fit the shape {shape}")
    return TensorInfo(path=path, dtype=dtype, shape=shape, offset=start + begin, nbytes=end - begin)
