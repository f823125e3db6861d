"""Ways to round matrices: greenroom's formats as packing takes them, and llama.cpp's by its own quantisers.

llama.cpp's K- and IQ-types have blocks of 256 weights, which must not cross rows. Rows that are no whole blocks get
another type from `llama-quantize`, a wider one (`FALLBACK`). So that the types themselves can be compared on such rows,
as many rows as make whole blocks are joined to one: no group of 16 or 32 weights crosses a row that way, only a block's
float16 scale serves parts of two rows.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch

from benchmarks.turns import Worker
from greenroom.checkpoint import Checkpoint
from greenroom.errors import ConfigError
from greenroom.evaluate.rounding import rounded
from greenroom.packing import balanced
from greenroom.quant import Format, Layout
from greenroom.seam import ExpertsModule

Kind = gguf.GGMLQuantizationType
Parameters = dict[str, torch.Tensor]

FALLBACK = {
    Kind.Q6_K: Kind.Q8_0, Kind.Q5_K: Kind.Q5_1, Kind.Q4_K: Kind.Q5_0, Kind.Q3_K: Kind.Q4_0, Kind.Q2_K: Kind.Q4_0,
    Kind.IQ4_XS: Kind.IQ4_NL, Kind.IQ3_S: Kind.IQ4_NL,
}  # fmt: skip
"""What llama-quantize gives rows that are no whole blocks: `tensor_type_fallback` in llama.cpp's llama-quant.cpp."""

_LARGEST = 1 << 27
"""Weights of the largest matrix that can be handed over; the file is sparse."""


class Way(Protocol):
    """A way to round, by its name in tables."""

    name: str
    greenrooms: bool

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, weights: Parameters) -> Parameters:
        """What is done to an expert before its matrices are rounded."""

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [rows, cols] rounded, float32."""

    def nbytes(self, rows: int, cols: int) -> int:
        """What a matrix takes, scales and all."""


class Packed:
    """A format of greenroom's, "4g64", with the column scales that packing folds."""

    greenrooms = True

    def __init__(self, name: str) -> None:
        bits, _, group_size = name.partition("g")
        self.name, self._format = name, Format(bits=int(bits), group_size=int(group_size))

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, weights: Parameters) -> Parameters:
        """Column scales of the second matrix, in the first."""
        return balanced(checkpoint, module, weights, self._format)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """As packed."""
        return rounded(weight, self._format)

    def nbytes(self, rows: int, cols: int) -> int:
        """Of the packed matrix."""
        return Layout(rows, cols, self._format).nbytes


class Ggml:
    """A type of llama.cpp's, "Q4_K"; "Q4_K/Q5_0" is what llama-quantize makes of it: the fallback where rows demand."""

    greenrooms = False

    def __init__(self, name: str, peer: "Peer") -> None:
        kind, _, fallback = name.partition("/")
        self.name, self._peer, self._kind = name, peer, Kind[kind]
        if fallback and FALLBACK.get(self._kind) != Kind[fallback]:
            raise ConfigError(f"llama-quantize does not fall back so: {name}")
        self._fallback = Kind[fallback] if fallback else None

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, weights: Parameters) -> Parameters:
        """As it is."""
        return weights

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """By llama.cpp."""
        kind, columns = self._cut(*weight.shape)
        out, nbytes = self._peer.round(kind, weight.float().reshape(-1, columns))
        assert nbytes == self.nbytes(*weight.shape), "llama.cpp wrote another number of bytes"
        return out.view(weight.shape)

    def nbytes(self, rows: int, cols: int) -> int:
        """Of all blocks."""
        block, nbytes = gguf.GGML_QUANT_SIZES[self._cut(rows, cols)[0]]
        return rows * cols // block * nbytes

    def _cut(self, rows: int, cols: int) -> "tuple[Kind, int]":
        """The type for such a matrix, and the length of the rows that llama.cpp is shown."""
        block = gguf.GGML_QUANT_SIZES[self._kind][0]
        if cols % block == 0:
            return self._kind, cols
        if self._fallback is not None:
            return self._fallback, cols
        columns = math.lcm(block, cols)
        if rows * cols % columns:
            raise ConfigError(f"{rows} x {cols} weights are no whole blocks of {self._kind.name}")
        return self._kind, columns


class Peer:
    """llama.cpp's process; see `ggml_worker`."""

    def __init__(self, worker: Worker, matrix: "np.ndarray[Any, Any]") -> None:
        self.engine = str(worker.about["engine"])
        self._worker, self._matrix = worker, matrix

    def round(self, kind: Kind, weight: torch.Tensor) -> "tuple[torch.Tensor, int]":
        """float32 [rows, columns] rounded, and its bytes."""
        rows, columns = weight.shape
        place = self._matrix[: rows * columns].reshape(rows, columns)
        place[:] = weight.numpy()
        nbytes = self._worker.trial({"kind": int(kind), "rows": rows, "columns": columns, "importance": None})["nbytes"]
        return torch.from_numpy(place.copy()), nbytes


@contextmanager
def peer(python: Path) -> "Iterator[Peer]":
    """Run llama.cpp under the interpreter `python`."""
    worker = Path(__file__).with_name("ggml_worker.py")
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * _LARGEST)
        with Worker("llama.cpp", [str(python), str(worker), file.name]) as process:
            yield Peer(process, np.memmap(file.name, np.float32, "r+"))


def way(name: str, peer: "Peer") -> Way:
    """The way of this name. Raises ConfigError where there is none."""
    try:
        return Packed(name) if name[:1].isdigit() else Ggml(name, peer)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"no format is called {name}: give one such as 4g64, Q4_K or Q4_K/Q5_0") from error
