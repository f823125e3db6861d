"""The definition of packed arithmetic, in torch: dequantise a tile of rows, multiply, forget it.

A tile bounds the working set whatever the size of the expert. Tiles and row counts depend on shapes alone, so a
token's result does not depend on what else is in memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from greenroom.packed import RecordTensor
from greenroom.quant import Format, dequantize

TILE = 1 << 20
"""Weights dequantised at a time: 4 MiB in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """What happens between and after the two products of an expert.

    `gate` maps the first product [n, 2·I] (or [n, I] where experts have no gate) to [n, I]; `after` is applied to the
    second product [n, H], or None. `kind` names what `gate` computes, for kernels that can do it themselves; empty is
    anything:

        F                                  F(x), without a gate; F is silu, gelu, gelu_tanh, relu or relu2 (its square)
        F_and_mul                          F(g) · u, where g is the first half of x and u the second
        clamped_silu_and_mul:LIMIT         silu(g) · u, after g = min(g, limit) and −limit ≤ u ≤ limit
        swigluoai:ALPHA:LIMIT              the same clamps, then g · sigmoid(alpha · g) · (u + 1), as in gpt-oss
        swigluoai_interleaved:ALPHA:LIMIT  the same, where x is g and u in turns
    """

    gate: "Callable[[torch.Tensor], torch.Tensor]"
    after: "Callable[[torch.Tensor], torch.Tensor] | None" = None
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertTask:
    """One expert at work: its `record` uint8 [record_nbytes] and the `rows` int64 [n] of x that are routed to it."""

    record: torch.Tensor
    rows: torch.Tensor


class ExpertsKernel(Protocol):
    """One call computes any number of a layer's experts; results are per expert, unweighted, so that the order of
    computing never shows in their sum."""

    def __call__(
        self, x: torch.Tensor, tasks: "Sequence[ExpertTask]", layout: "Sequence[RecordTensor]", activation: Activation
    ) -> "list[torch.Tensor]":
        """x [T, H], and per task the expert's output [n, H] in x's dtype."""
        ...


def experts(
    x: torch.Tensor, tasks: "Sequence[ExpertTask]", layout: "Sequence[RecordTensor]", activation: Activation
) -> "list[torch.Tensor]":
    """The reference `ExpertsKernel`."""
    return [_expert(x[task.rows], task.record, layout, activation) for task in tasks]


def _expert(
    x: torch.Tensor, record: torch.Tensor, layout: "Sequence[RecordTensor]", activation: Activation
) -> torch.Tensor:
    first, second, *biases = layout
    inner, outer = [_unpack(record, tensor, x.dtype)[0] for tensor in biases] or (None, None)
    hidden = activation.gate(_product(x, record, first, inner))
    out = _product(hidden, record, second, outer)
    return out if activation.after is None else activation.after(out)


def _product(x: torch.Tensor, record: torch.Tensor, tensor: RecordTensor, bias: "torch.Tensor | None") -> torch.Tensor:
    return linear(x, tensor.part(record), tensor.rows, tensor.cols, tensor.format, bias)


def _unpack(record: torch.Tensor, tensor: RecordTensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(tensor.part(record), tensor.rows, tensor.cols, tensor.format, dtype)


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """x [n, cols] times the packed [rows, cols] matrix, transposed: [n, rows] in x's dtype, plus `bias` [rows]."""
    step = max(1, TILE // cols)
    if step >= rows:
        return F.linear(x, dequantize(packed, rows, cols, format, x.dtype), bias)
    out = x.new_empty(x.shape[0], rows)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        weight = dequantize(packed, rows, cols, format, x.dtype, start, end)
        out[:, start:end] = F.linear(x, weight, None if bias is None else bias[start:end])
    return out
