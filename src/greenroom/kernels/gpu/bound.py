"""Launches of Triton's kernels whose numbers are bound once.

Triton looks at every argument of every launch: thirty take the host longer than a small kernel takes the device. What
it compiled for addresses that are multiples of 16 takes tensors of the same dtypes and the same numbers as they are, as
long as theirs are such, too.
"""

from collections.abc import Sequence
from typing import Any

import torch

ALIGNED = 16
"""Bytes: a multiple of it as an address is what Triton compiles code of its own for."""


class Bound:
    """One kernel on one grid, everything bound but `tensors`, the names of what differs from launch to launch."""

    def __init__(
        self, kernel: Any, grid: "tuple[int, ...]", tensors: "Sequence[str]", numbers: "dict[str, Any]", **options: Any
    ) -> None:
        self._kernel, self._tensors = kernel, tuple(tensors)
        self._grid = (*grid, 1, 1)[:3]
        self._numbers, self._options = numbers, options
        self._arguments = [numbers.get(name) for name in kernel.arg_names]
        self._places = [kernel.arg_names.index(name) for name in tensors]
        self._compiled: Any = None

    def __call__(self, *tensors: "torch.Tensor | None") -> None:
        """Launch it on the current stream. Tensors are of the same dtypes every time, and None where they were."""
        aligned = all(tensor is None or tensor.data_ptr() % ALIGNED == 0 for tensor in tensors)
        if self._compiled is None or not aligned:
            given = dict(zip(self._tensors, tensors, strict=True))
            made = self._kernel[self._grid](**given, **self._numbers, **self._options)
            if made is not None and aligned:  # the interpreter makes nothing
                self._compiled = made[self._grid]
            return
        arguments = self._arguments.copy()
        for place, tensor in zip(self._places, tensors, strict=True):
            arguments[place] = tensor
        self._compiled(*arguments)
