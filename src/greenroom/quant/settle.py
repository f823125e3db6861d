"""From the grids a search found to the grids the record can hold.

Eight bits for scale and zero move every grid a little. So each group tries the three nearest scale codes, each with
the zero that keeps the grid's middle in place and with the zero that fits the resulting codes best, against the
decoded values; the metadata's rounding then costs a fraction of a percent instead of several.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from greenroom.quant.metadata import RowParams
from greenroom.quant.rtn import SMALLEST_SCALE
from greenroom.quant.scratch import Scratch


class Metadata(NamedTuple):
    """What is stored besides codes: row ranges, and float32 [rows, groups] integer codes 0..255."""

    scales: RowParams
    zeros: RowParams
    scale_codes: torch.Tensor
    zero_codes: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """Decoded scales, float32 [rows * groups]."""
        return self.scales.decode(self.scale_codes).view(-1)

    @property
    def zero(self) -> torch.Tensor:
        """Decoded zeros, float32 [rows * groups]."""
        return self.zeros.decode(self.zero_codes).view(-1)


@dataclass
class _Best:
    loss: torch.Tensor
    scale_codes: torch.Tensor
    zero_codes: torch.Tensor

    def meet(self, loss: torch.Tensor, scale_codes: torch.Tensor, zero_codes: torch.Tensor) -> None:
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.scale_codes = torch.where(better, scale_codes, self.scale_codes)
        self.zero_codes = torch.where(better, zero_codes, self.zero_codes)


def assign(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, out: torch.Tensor) -> torch.Tensor:
    """The nearest codes, float32 integers [group_size, n], of groups [group_size, n] on grids [n], into out."""
    return torch.mul(weights, 1 / scale, out=out).add_(zero).round_().clamp_(0, top)


def settle(
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    rows: int,
    top: int,
    scratch: Scratch,
    costs: "torch.Tensor | None" = None,
) -> Metadata:
    """Metadata for groups float32 [group_size, rows * groups] whose ideal scale and zero are float32 [rows * groups].

    The scratch has the shape of weights, and so have `costs`, the search's.
    """
    scale, zero = scale.view(rows, -1), _out_of_the_way(scale.view(rows, -1), zero.view(rows, -1))
    scales, zeros = RowParams.of(scale), RowParams.of(zero)
    scratch.first.copy_(weights)
    mean = (scratch.fold() / weights.shape[0]).view(rows, -1)
    middle = scale * (top / 2 - zero)
    nearest = scales.encode(scale)
    best: _Best | None = None
    for shift in (0, -1, 1):
        scale_codes = (nearest + shift).clamp_(0, 255)
        tried = scales.decode(scale_codes)
        zero_codes = zeros.encode(top / 2 - middle / tried)
        for _ in range(2):
            loss, codes_mean = _loss(weights, tried, zeros.decode(zero_codes), scale, top, scratch, costs)
            if best is None:
                best = _Best(loss, scale_codes, zero_codes)
            else:
                best.meet(loss, scale_codes, zero_codes)
            zero_codes = zeros.encode(codes_mean - mean / tried)
    assert best is not None
    return Metadata(scales, zeros, best.scale_codes, best.zero_codes)


def _out_of_the_way(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Zeros [rows, groups] in which a group of nothing but zeros does not widen its row's range.

    Its scale makes any zero point do. A row of zeros keeps zero 0, which is exact.
    """
    empty = scale <= SMALLEST_SCALE
    largest = torch.where(empty, -torch.inf, zero).amax(1, keepdim=True)
    return torch.where(empty, torch.where(largest.isinf(), 0.0, largest), zero)


def _loss(
    weights: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    ideal: torch.Tensor,
    top: int,
    scratch: Scratch,
    costs: "torch.Tensor | None",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search's loss and the mean code of each group, [rows, groups]; ideal is the scale that makes it unitless."""
    codes, error = scratch.codes, scratch.first
    torch.mul(weights, 1 / scale.view(-1), out=error).add_(zero.view(-1))
    torch.round(error, out=codes).clamp_(0, top)
    error.sub_(codes)
    mean = (codes.sum(0) / weights.shape[0]).view_as(scale)
    ratio = (scale / ideal).clamp(1e-12, 1e12)  # cubed below, within float32
    if costs is not None:
        error.mul_(error).mul_(costs)
        return scratch.fold().view_as(scale) * (ratio * ratio), mean
    torch.mul(error.abs_(), error, out=scratch.second)
    absolute, squares = scratch.fold_both()
    return (squares * absolute).view_as(scale) * (ratio * ratio * ratio), mean
