"""Scales and zeros of a row in 8 bits each, between four bfloat16 numbers of that row.

    scale = scale_min + scale_step * scale_code        zero = zero_min + zero_step * zero_code

A minimum is rounded down and a step up to bfloat16, so that codes 0..255 reach every value of the row.
"""

from typing import NamedTuple

import torch

LEVELS = 255


class RowParams(NamedTuple):
    """One range of values for each row: float32 [rows, 1] each, exact in bfloat16."""

    minimum: torch.Tensor
    step: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "RowParams":
        """The range of each row of float32 [rows, groups]."""
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        minimum = _bfloat16_towards(low, down=True)
        return cls(minimum, _bfloat16_towards((high - minimum) / LEVELS, down=False))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as float32 integers in 0..255, of float32 [rows, groups]."""
        inverse = torch.where(self.step > 0, 1 / self.step, 0.0)
        return ((values - self.minimum) * inverse).nan_to_num_(0.0).round_().clamp_(0, LEVELS)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Values float32 [rows, groups] of codes of any dtype; the arithmetic of the format."""
        return codes.to(torch.float32) * self.step + self.minimum


def _bfloat16_towards(values: torch.Tensor, *, down: bool) -> torch.Tensor:
    """float32 values rounded to bfloat16's precision towards minus or plus infinity."""
    bits = values.view(torch.int32)
    cut = bits & -65536  # bfloat16 is the upper half of a float32: cutting rounds towards zero
    away = (values < 0) if down else (values > 0)
    return torch.where(away & (cut != bits), cut + 65536, cut).view(torch.float32)
