"""Grids and codes chosen for what a matrix computes with the inputs that it gets, not for each weight by itself.

Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), after Hassibi & Stork 1993: with H = Σ x xᵀ over inputs x, rounding one
weight of a row by e costs least if the weights that are not rounded yet move by -e U[i, i+1:] / U[i, i], where
H⁻¹ = Uᵀ U with U upper triangular; what it costs then is (e / U[i, i])², and grids are chosen to keep that small.
Columns go in the order of H's diagonal, the largest first. Format, bytes and kernels know nothing of it.
"""

from typing import NamedTuple

import torch

from greenroom.errors import ConfigError
from greenroom.quant import bits as bitpack
from greenroom.quant.format import Format
from greenroom.quant.layout import Layout
from greenroom.quant.quantize import grids, quantize_into

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that were never seen together count as independent."""
BLOCK = 2048
"""Columns that make up for one another: bounds H, and the time, which grows with the cube."""
_CHUNK = 1 << 24
"""Weights handled at a time, in a few float32 buffers."""
_STEP = 128
"""Columns whose errors reach the later ones in one product."""


def quantize_for(
    weight: torch.Tensor,
    format: Format,
    out: torch.Tensor,
    inputs: torch.Tensor,
    prior: "torch.Tensor | None" = None,
) -> None:
    """As `quantize_into`, with grids and codes for the outputs on `inputs`: the same bytes in number and meaning.

    weight: float [rows, cols]; out: uint8 [Layout.nbytes]. inputs: float32 [n, cols], each times the root of what its
    error weighs. prior: float32 [cols, cols], Σ x xᵀ of others that are added to them.
    Raises ConfigError for 16 bits, which have no codes to choose, for weights or inputs that are not finite, and as
    `quantize_into` does.
    """
    if format.bits == 16:
        raise ConfigError("16-bit weights have no codes to choose")
    cols = weight.shape[1]
    blocks = [_Block.of(inputs, prior, slice(start, min(start + BLOCK, cols))) for start in range(0, cols, BLOCK)]
    quantize_into(weight, format, out, costs=torch.cat([block.costs for block in blocks]))
    layout = Layout(weight.shape[0], weight.shape[1], format)
    step = max(1, _CHUNK // layout.padded_cols)
    for block in blocks:
        for row in range(0, layout.rows, step):
            _recode(weight, layout, out, slice(row, min(row + step, layout.rows)), block)


class _Block(NamedTuple):
    """Columns that make up for one another."""

    cols: slice
    order: torch.Tensor
    """in which they are rounded, int64 [n]"""
    spread: torch.Tensor
    """U in that order, rows divided by the diagonal, [n, n]"""
    costs: torch.Tensor
    """1 / U[i, i]²: what an error in a column costs that later ones cannot make up for; in their own order, [n]"""

    @classmethod
    def of(cls, inputs: torch.Tensor, prior: "torch.Tensor | None", cols: slice) -> "_Block":
        """H = R Rᵀ with R upper triangular makes U = R⁻¹: one factorisation, from the last row to the first."""
        moments = inputs[:, cols].T @ inputs[:, cols]
        if prior is not None:
            moments += prior[cols, cols]
        mean = float(moments.diagonal().mean())
        if not mean < float("inf"):  # a NaN, too
            raise ConfigError("the inputs have values that are not finite")
        order = moments.diagonal().argsort(descending=True, stable=True)
        upper = _factor(moments[order.flip(0)][:, order.flip(0)], mean or 1.0).flip(0, 1)
        spread = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
        costs = torch.empty_like(spread[0]).index_copy_(0, order, upper.diagonal().square())
        return cls(cols, order, spread / spread.diagonal()[:, None], costs)


def _factor(moments: torch.Tensor, mean: float) -> torch.Tensor:
    """Cholesky's lower factor of the damped moments, more damped where float32 cannot tell them from singular ones:
    one direction may hold nearly all that the inputs are."""
    damped, factor = 0.0, moments
    for damping in (DAMPING, 0.1, 1.0):
        moments.diagonal().add_((damping - damped) * mean)
        damped = damping
        factor, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            break
    return factor


def _recode(weight: torch.Tensor, layout: Layout, packed: torch.Tensor, rows: slice, block: _Block) -> None:
    stored = layout.view(packed, "codes")[rows]
    codes = bitpack.unpack(stored, layout.format.bits)
    scale, zero = grids(packed, layout, rows.start, rows.stop)
    wanted = weight[rows, block.cols].to(torch.float32).T[block.order].contiguous()
    groups = (block.cols.start + block.order) // layout.format.group_size
    found = _round(wanted, scale.T.contiguous(), zero.T.contiguous(), groups, layout.format.top, block.spread)
    codes[:, block.cols] = found[block.order.argsort()].T.to(codes.dtype)
    bitpack.pack(codes, layout.format.bits, stored)


def _round(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    groups: torch.Tensor,
    top: int,
    spread: torch.Tensor,
) -> torch.Tensor:
    """Codes [cols, rows] of weight [cols, rows], which changes; scale and zero: [groups, rows]; groups: [cols]."""
    codes, errors = torch.empty_like(weight), weight.new_empty(_STEP, weight.shape[1])
    group_of, inverse = groups.tolist(), 1 / scale
    for start in range(0, len(weight), _STEP):
        end = min(start + _STEP, len(weight))
        for i in range(start, end):
            group, wanted, code = group_of[i], weight[i], codes[i]
            torch.addcmul(zero[group], wanted, inverse[group], out=code)
            code.round_().clamp_(0, top)
            error = torch.sub(code, zero[group], out=errors[i - start])
            error.mul_(scale[group]).sub_(wanted)
            weight[i + 1 : end].addr_(spread[i, i + 1 : end], error)
        weight[end:].addmm_(spread[start:end, end:].T, errors[: end - start])
    return codes
