"""Many vectors times packed matrices on a device whose matrix units Triton does not use: dequantise some rows, multiply
with torch, forget them. Computes in the activations' dtype, or in float32 where the device has no bfloat16.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from greenroom.kernels import device
from greenroom.kernels.reference import Activation
from greenroom.packed import RecordTensor
from greenroom.quant import Format

TILE = 1 << 23
"""Weights dequantised at a time: 16 MiB in float16."""


def prompt(
    x: torch.Tensor,
    arena: torch.Tensor,
    spans: "Sequence[tuple[int, int, int]]",
    rows: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """See `slots.prompt`."""
    first, second, *biases = layout
    inner, outer = biases or (None, None)
    for slot, start, count in spans:
        record, vectors = arena[slot], _multiplied(x[rows[start : start + count].long()])
        made = activation.gate(_times(vectors, first.part(record), first, _bias(record, inner)))
        made = _times(made, second.part(record), second, _bias(record, outer))
        out[start : start + count] = made if activation.after is None else activation.after(made)


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """See `device.linear`."""
    matrix = RecordTensor(name="", rows=rows, cols=cols, offset=0, format=format)
    vectors = _multiplied(x)
    return _times(vectors, packed, matrix, bias).to(x.dtype)


def _times(x: torch.Tensor, packed: torch.Tensor, matrix: RecordTensor, bias: "torch.Tensor | None") -> torch.Tensor:
    """x [n, cols] times the matrix, transposed, plus bias [rows]: [n, rows]."""
    out = torch.empty((len(x), matrix.rows), dtype=x.dtype, device=x.device)
    step = max(TILE // matrix.cols, 1)
    for start in range(0, matrix.rows, step):
        count = min(step, matrix.rows - start)
        out[:, start : start + count] = F.linear(x, device.dequantised(packed, matrix, start, count, x.dtype))
    return out if bias is None else out.add_(bias)


def _bias(record: torch.Tensor, bias: "RecordTensor | None") -> "torch.Tensor | None":
    return None if bias is None else device.dequantised(bias.part(record), bias, 0, 1, torch.float32)[0]


def _multiplied(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32) if x.dtype == torch.bfloat16 else x
