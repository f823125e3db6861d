"""What fills a benchmark's models: the weights of one of them, in either engine's formats."""

from collections.abc import Iterator
from typing import Protocol

import gguf
import numpy as np
import torch

from greenroom.packed import ExpertsEntry
from greenroom.quant import Format


class Weights(Protocol):
    """Asked in the order of the files, each piece once. `synthetic` makes them up, `upcycled` takes a checkpoint's."""

    def records(self, entry: ExpertsEntry) -> "Iterator[torch.Tensor]":
        """A layer's experts as greenroom packs them, each uint8 [entry.record_nbytes]."""

    def linear(self, path: str, rows: int, cols: int, format: Format) -> torch.Tensor:
        """The dense linear at transformers' `path`, [rows, cols], packed: uint8 [Layout.nbytes]."""

    def plain(self, name: str, size: "tuple[int, ...]") -> torch.Tensor:
        """What is not packed, by transformers' name for it: bfloat16 of `size`."""

    def ggml(self, name: str, size: "tuple[int, ...]", kind: gguf.GGMLQuantizationType) -> "Iterator[np.ndarray]":
        """A tensor by llama.cpp's name, of `size` (slowest first), as values or blocks of `kind`, in pieces."""


def layer_of(name: str) -> int:
    """The layer that a tensor or module belongs to, by either engine's name for it."""
    return next(int(part) for part in name.split(".") if part.isdigit())
