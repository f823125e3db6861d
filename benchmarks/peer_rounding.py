"""Ways to round matrices: greenroom's formats as packing takes them, and llama.cpp's by its own quantisers.

llama.cpp's K- and IQ-types have blocks of 256 weights, which must not cross rows. Rows that are no whole blocks get
another type from `llama-quantize`, a wider one (`FALLBACK`). So that the types themselves can be compared on such rows,
as many rows as make whole blocks are joined to one: no group of 16 or 32 weights crosses a row that way, only a block's
float16 scale serves parts of two rows.
"""

import functools
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
from greenroom.calibration import Calibration, Given, Inputs
from greenroom.checkpoint import Checkpoint
from greenroom.errors import ConfigError
from greenroom.evaluate.rounding import rounded
from greenroom.expert_records import balanced
from greenroom.quant import Format, Layout, dequantize, quantize_for
from greenroom.seam import ExpertsModule

Kind = gguf.GGMLQuantizationType
Parameters = dict[str, torch.Tensor]

FALLBACK = {
    Kind.Q6_K: Kind.Q8_0, Kind.Q5_K: Kind.Q5_1, Kind.Q4_K: Kind.Q5_0, Kind.Q3_K: Kind.Q4_0, Kind.Q2_K: Kind.Q4_0,
    Kind.IQ4_XS: Kind.IQ4_NL, Kind.IQ3_S: Kind.IQ4_NL,
}  # fmt: skip
"""What llama-quantize gives rows that are no whole blocks: `tensor_type_fallback` in llama.cpp's llama-quant.cpp."""

CALIBRATED = "+"
_LARGEST = 1 << 27
"""Weights of the largest matrix that can be handed over; the file is sparse."""


class Way(Protocol):
    """A way to round, by its name in tables."""

    name: str
    greenrooms: bool

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, expert: int, weights: Parameters) -> Parameters:
        """An expert's matrices rounded, float32."""

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [rows, cols] rounded, float32."""

    def nbytes(self, rows: int, cols: int) -> int:
        """What a matrix takes, scales and all."""


class Packed:
    """A format of greenroom's, "4g64", with the column scales that packing folds; "4g64+" has codes for the inputs."""

    greenrooms = True

    def __init__(self, name: str, calibration: "Calibration | None") -> None:
        bits, _, group_size = name.removesuffix(CALIBRATED).partition("g")
        self.name, self._format = name, Format(bits=int(bits), group_size=int(group_size))
        self._calibration = calibration

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, expert: int, weights: Parameters) -> Parameters:
        """With column scales of the second matrix in the first."""
        weights = {name: value.float() for name, value in balanced(checkpoint, module, weights, self._format).items()}
        given = _given(self._calibration, checkpoint, module, expert, weights)
        return {name: self._rounded(value, given.get(name)) for name, value in weights.items()}

    def _rounded(self, weight: torch.Tensor, given: "Given | None") -> torch.Tensor:
        if given is None:
            return rounded(weight, self._format)
        packed = torch.empty(self.nbytes(*weight.shape), dtype=torch.uint8)
        quantize_for(weight, self._format, packed, *given)
        return dequantize(packed, *weight.shape, self._format)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """As packed."""
        return rounded(weight, self._format)

    def nbytes(self, rows: int, cols: int) -> int:
        """Of the packed matrix."""
        return Layout(rows, cols, self._format).nbytes


class Ggml:
    """A type of llama.cpp's, "Q4_K"; "Q4_K/Q5_0" is what llama-quantize makes of it: the fallback where rows demand.
    "Q4_K+" has an importance matrix: the mean squares of what each column of an expert's matrix is given."""

    greenrooms = False

    def __init__(self, name: str, peer: "Peer", calibration: "Calibration | None") -> None:
        kind, _, fallback = name.removesuffix(CALIBRATED).partition("/")
        self._calibration = calibration
        self.name, self._peer, self._kind = name, peer, Kind[kind]
        if fallback and FALLBACK.get(self._kind) != Kind[fallback]:
            raise ConfigError(f"llama-quantize does not fall back so: {name}")
        self._fallback = Kind[fallback] if fallback else None

    def of_expert(self, checkpoint: Checkpoint, module: ExpertsModule, expert: int, weights: Parameters) -> Parameters:
        """By llama.cpp."""
        weights = {name: value.float() for name, value in weights.items()}
        given = _given(self._calibration, checkpoint, module, expert, weights)
        return {
            name: self.round(value, given[name].inputs if name in given else None) for name, value in weights.items()
        }

    def round(self, weight: torch.Tensor, inputs: "torch.Tensor | None" = None) -> torch.Tensor:
        """By llama.cpp."""
        kind, columns = self._cut(*weight.shape)
        importance = None if inputs is None else inputs.square().mean(0).repeat(columns // weight.shape[1])
        out, nbytes = self._peer.round(kind, weight.float().reshape(-1, columns), importance)
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

    def round(self, kind: Kind, weight: torch.Tensor, importance: "torch.Tensor | None") -> "tuple[torch.Tensor, int]":
        """float32 [rows, columns] rounded, and its bytes; importance: float32 [columns]."""
        rows, columns = weight.shape
        place = self._matrix[: rows * columns].reshape(rows, columns)
        place[:] = weight.numpy()
        weights = None if importance is None else importance.tolist()
        job = {"kind": int(kind), "rows": rows, "columns": columns, "importance": weights}
        nbytes = self._worker.trial(job)["nbytes"]
        return torch.from_numpy(place.copy()), nbytes


@contextmanager
def peer(python: Path) -> "Iterator[Peer]":
    """Run llama.cpp under the interpreter `python`."""
    worker = Path(__file__).with_name("ggml_worker.py")
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * _LARGEST)
        with Worker("llama.cpp", [str(python), str(worker), file.name]) as process:
            yield Peer(process, np.memmap(file.name, np.float32, "r+"))


def _given(
    calibration: "Calibration | None", checkpoint: Checkpoint, module: ExpertsModule, expert: int, weights: Parameters
) -> "dict[str, Given]":
    """What each matrix of an expert is given on the calibration's text; nothing without one."""
    inputs = None if calibration is None else _inputs(calibration, module)
    return {} if inputs is None else inputs.of_matrices(expert, checkpoint.model.get_submodule(module.name), weights)


@functools.lru_cache(maxsize=1)  # an expert of a layer after the other asks
def _inputs(calibration: Calibration, module: ExpertsModule) -> "Inputs | None":
    return calibration.inputs(module)


def way(name: str, peer: "Peer", calibration: "Calibration | None" = None) -> Way:
    """The way of this name; one that ends in "+" sees what the experts are given on a text. Raises ConfigError where
    there is none."""
    if not name.endswith(CALIBRATED):
        calibration = None
    elif calibration is None:
        raise ConfigError(f"{name} sees a text: give one with --calibrate")
    try:
        return Packed(name, calibration) if name[:1].isdigit() else Ggml(name, peer, calibration)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"no format is called {name}: give one such as 4g64, Q4_K or Q4_K/Q5_0") from error
