"""The best grid for a group: round to nearest, HQQ and narrowed ranges compete, each group keeps its winner.

A grid is `weight ~ scale * (code - zero)`. Here groups are the columns of a [group_size, n] matrix, so that a group's
parameters broadcast along contiguous memory, and weights are in units of their round-to-nearest grid:

    unit = weight / scale0 + zero0          unit ~ step * code + offset

which makes every comparison independent of the weights' magnitude. Rows, cache sizes and threads do not enter: all
arithmetic is element-wise or folded in a fixed order, so a group's result depends on its weights alone.

The winner has the smallest (sum of squared errors) x (sum of absolute errors). On Gaussian, Laplace, Student-t and
real weights that lowers both at once; judged by the squared error alone, the absolute error came out 0.4 to 1 % larger
(4 bits, real weights: 6 %) and the squared error smaller by at most 0.5 % (there: 3 %). Where it is known what an error
in each column costs, the winner has the smallest sum of squared errors times that.
"""

from typing import NamedTuple

import torch

from greenroom.quant import hqq, rtn
from greenroom.quant.scratch import Scratch

SHRINKS: dict[int, tuple[float, ...]] = {
    2: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65),
    3: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    4: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    8: (0.98, 0.95),
}
"""Fractions of the full range to start from; fewer bits gain more by clipping the largest weights."""
REFITS = 2
_SMALLEST_SPREAD = 1e-5
"""Relative: below it the sums' last bits decide."""


class Grid(NamedTuple):
    """Step and offset, float32 [n], of n grids in units: unit ~ step * code + offset."""

    step: torch.Tensor
    offset: torch.Tensor


class Winner(NamedTuple):
    """The best grid of each group so far, its loss, and whether it came from HQQ; all [n]."""

    loss: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor
    from_hqq: torch.Tensor

    def against(self, loss: torch.Tensor, grid: Grid, from_hqq: torch.Tensor) -> "Winner":
        """The better of both in every group; the older one where they tie."""
        better = loss < self.loss
        return Winner(
            torch.where(better, loss, self.loss),
            torch.where(better, grid.step, self.step),
            torch.where(better, grid.offset, self.offset),
            torch.where(better, from_hqq, self.from_hqq),
        )


class Contest:
    """Candidate grids for groups float32 [group_size, n] in units, with codes 0..top. The scratch has their shape, and
    so has `costs` where it is given: what a squared error costs."""

    def __init__(self, units: torch.Tensor, top: int, scratch: Scratch, costs: "torch.Tensor | None" = None) -> None:
        self.units, self.top, self.scratch, self.costs = units, top, scratch, costs
        self.size = units.shape[0]
        scratch.first.copy_(units)
        self.sum_units = scratch.fold()
        if costs is not None:
            self.sum_costs, self.sum_cost_units = self._total(costs), self._total(costs, units)
        self.ones = torch.ones_like(self.sum_units)
        self.no = torch.zeros_like(self.ones, dtype=torch.bool)
        start = Grid(self.ones, torch.zeros_like(self.ones))
        self.winner = Winner(self._loss(start), *start, self.no)

    def enter(self, grid: Grid, from_hqq: torch.Tensor) -> None:
        """Let a grid compete."""
        self.winner = self.winner.against(self._loss(grid), grid, from_hqq)

    def enter_hqq(self) -> None:
        """Let the grid with HQQ's zero point compete."""
        zero = hqq.solve(self.units, self.top, self.scratch)
        self.enter(Grid(self.ones, -zero), ~self.no)

    def enter_shrunken(self, fraction: float) -> None:
        """Let a grid over a fraction of the range compete, refitted once to the codes it gives."""
        start = Grid(self.ones * fraction, self.ones * ((1 - fraction) / 2 * self.top))
        self.enter(self._refit(start), self.no)

    def enter_refit(self) -> None:
        """Let the winner compete with the grid that suits its codes best."""
        winner = self.winner
        self.enter(self._refit(Grid(winner.step, winner.offset)), winner.from_hqq)

    def _codes(self, grid: Grid) -> torch.Tensor:
        codes = torch.sub(self.units, grid.offset, out=self.scratch.codes)
        return codes.mul_(1 / grid.step).round_().clamp_(0, self.top)

    def _loss(self, grid: Grid) -> torch.Tensor:
        error = self._codes(grid).mul_(grid.step).add_(grid.offset).sub_(self.units)
        if self.costs is not None:
            torch.mul(error, error, out=self.scratch.first).mul_(self.costs)
            return self.scratch.fold()
        torch.abs(error, out=self.scratch.first)
        torch.mul(error, error, out=self.scratch.second)
        absolute, squares = self.scratch.fold_both()
        return squares * absolute

    def _refit(self, grid: Grid) -> Grid:
        """Least squares of the units on their codes; the grid itself where all codes are the same."""
        if self.costs is not None:
            return self._refit_to(self.costs, grid)
        codes, room = self._codes(grid), self.scratch.first
        total = codes.sum(0)  # integers below 2^24: exact in any order
        squares = torch.mul(codes, codes, out=room).sum(0)
        torch.mul(codes, self.units, out=room)
        mixed = self.scratch.fold()
        spread = squares * self.size - total * total
        slope = (mixed * self.size - total * self.sum_units) / spread.clamp(min=1)
        step = torch.where((spread > 0) & (slope > 0), slope, grid.step)
        return Grid(step, (self.sum_units - step * total) / self.size)

    def _refit_to(self, costs: torch.Tensor, grid: Grid) -> Grid:
        """Least squares where errors cost differently."""
        codes = self._codes(grid)
        total, squares = self._total(costs, codes), self._total(costs, codes, codes)
        mixed = self._total(costs, codes, self.units)
        spread = squares * self.sum_costs - total * total
        slope = (mixed * self.sum_costs - total * self.sum_cost_units) / spread
        usable = (spread > _SMALLEST_SPREAD * squares * self.sum_costs) & (slope > 0)
        step = torch.where(usable, slope, grid.step)
        offset = (self.sum_cost_units - step * total) / self.sum_costs
        return Grid(step, torch.where(self.sum_costs > 0, offset, grid.offset))

    def _total(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Sums [n] of the products of [group_size, n] factors."""
        room = self.scratch.first.copy_(first)
        for other in others:
            room.mul_(other)
        return self.scratch.fold()


def search(
    weights: torch.Tensor, bits: int, scratch: Scratch, costs: "torch.Tensor | None" = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and zero float32 [n], and where HQQ's candidate won bool [n], for groups float32 [group_size, n].

    bits is 2, 3, 4 or 8; the zero lies within -top..2 top. The scratch has the shape of weights, and so have `costs`:
    what a squared error of a weight costs, ≥ 0.
    """
    top = (1 << bits) - 1
    scale, zero = rtn.solve(weights, top)
    contest = Contest((weights * (1 / scale)).add_(zero), top, scratch, costs)
    contest.enter_hqq()
    for fraction in SHRINKS[bits]:
        contest.enter_shrunken(fraction)
    for _ in range(REFITS):
        contest.enter_refit()
    winner = contest.winner
    return scale * winner.step, ((zero - winner.offset) / winner.step).clamp_(-top, 2 * top), winner.from_hqq
