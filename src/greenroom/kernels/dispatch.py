"""Which kernel computes: the compiled ones where they can, else the reference.

The choice for a linear or an expert's task depends on it alone, never on what else is computed.
"""

from collections.abc import Sequence

import torch

from greenroom.kernels import device, native, products, reference
from greenroom.kernels.reference import Activation, ExpertTask
from greenroom.packed import RecordTensor
from greenroom.quant import Format
from greenroom.threads import lent_to_torch


def experts(
    x: torch.Tensor,
    tasks: "Sequence[ExpertTask]",
    layout: "Sequence[RecordTensor]",
    activation: Activation,
    rough: bool = False,
) -> "list[torch.Tensor]":
    """An `ExpertsKernel`: what the compiled kernels take in one call, the others by the reference. `rough`: see
    `native.experts`."""
    taken = native.taken(x, tasks, layout)
    if all(taken) and tasks:
        return native.experts(x, tasks, layout, activation, rough)
    if not any(taken):
        with lent_to_torch():
            return reference.experts(x, tasks, layout, activation)
    left = [task for task, takes in zip(tasks, taken, strict=True) if not takes]
    mine = [task for task, takes in zip(tasks, taken, strict=True) if takes]
    ours = iter(native.experts(x, mine, layout, activation, rough))
    with lent_to_torch():
        theirs = iter(reference.experts(x, left, layout, activation))
    return [next(ours if takes else theirs) for takes in taken]


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """x [n, cols] times the packed [rows, cols] matrix, transposed: [n, rows] in x's dtype, plus `bias` [rows]."""
    out = native.linear(x, packed, rows, cols, format, bias)
    if out is not None:
        return out
    if x.device.type != "cpu" and not device.unusable(x.device):
        multiply = device.linear if device.multiplies(len(x), x.device) else products.linear
        return multiply(x, packed, rows, cols, format, bias)
    with lent_to_torch():
        return reference.linear(x, packed, rows, cols, format, bias)


def describe(dtype: torch.dtype = torch.float32) -> str:
    """Which kernel serves activations of `dtype`: "native (AVX-512 VNNI, 2 threads)", "reference (torch): …".

    Raises ConfigError where GREENROOM_ISA names what this machine lacks.
    """
    if reason := native.unusable():
        return f"reference (torch): {reason}"
    if dtype != torch.float32:
        return f"reference (torch): the compiled kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    return native.describe()
