"""Codes chosen for what a matrix computes with the inputs that it gets, not for each weight by itself.

Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), after Hassibi & Stork 1993: with H = Σ x xᵀ over inputs x, rounding one
weight of a row by e costs least if the weights that are not rounded yet move by -e U[i, i+1:] / U[i, i], where
H⁻¹ = Uᵀ U with U upper triangular. Columns go in the order of H's diagonal, the largest first. Grids stay those that
`quantize` stored, so that format, bytes and kernels know nothing of it.
"""

import torch

from greenroom.errors import ConfigError
from greenroom.quant import bits as bitpack
from greenroom.quant.format import Format
from greenroom.quant.layout import Layout
from greenroom.quant.quantize import grids

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that were never seen together count as independent."""
BLOCK = 2048
"""Columns that make up for one another: bounds H, and the time, which grows with the cube."""
_CHUNK = 1 << 24
"""Weights handled at a time, in a few float32 buffers."""
_STEP = 128
"""Columns whose errors reach the later ones in one product."""


def recode(
    weight: torch.Tensor,
    format: Format,
    packed: torch.Tensor,
    inputs: torch.Tensor,
    prior: "torch.Tensor | None" = None,
) -> None:
    """Choose the codes of a packed matrix anew, for the outputs on `inputs`.

    weight: float [rows, cols], as `quantize` took it; packed: what it gave, uint8 [Layout.nbytes], changed in place.
    inputs: float32 [n, cols], each times the root of what its error weighs; with no inputs codes are the nearest.
    prior: float32 [cols, cols], Σ x xᵀ of others that are added to them.
    Raises ConfigError for 16 bits, which have no codes, and for inputs that are not finite.
    """
    if format.bits == 16:
        raise ConfigError("16-bit weights have no codes to choose")
    layout = Layout(weight.shape[0], weight.shape[1], format)
    steps = max(1, _CHUNK // layout.padded_cols)
    for start in range(0, layout.cols, BLOCK):
        cols = slice(start, min(start + BLOCK, layout.cols))
        moments = inputs[:, cols].T @ inputs[:, cols]
        order, spread = _spread(moments if prior is None else moments.add_(prior[cols, cols]))
        for row in range(0, layout.rows, steps):
            _recode_rows(weight, layout, packed, slice(row, min(row + steps, layout.rows)), cols, order, spread)


def _spread(moments: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
    """The order of columns, int64 [n], and U of H⁻¹ = Uᵀ U in that order with rows divided by the diagonal, [n, n].

    `moments` [n, n] becomes H. H = R Rᵀ with R upper triangular makes U = R⁻¹: one factorisation, from the last row to
    the first.
    """
    mean = float(moments.diagonal().mean())
    if not mean < float("inf"):  # a NaN, too
        raise ConfigError("the inputs have values that are not finite")
    moments.diagonal().add_(DAMPING * mean if mean else 1.0)
    order = moments.diagonal().argsort(descending=True, stable=True)
    lower = torch.linalg.cholesky(moments[order.flip(0)][:, order.flip(0)])
    upper = lower.flip(0, 1)
    spread = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
    return order, spread / spread.diagonal()[:, None]


def _recode_rows(
    weight: torch.Tensor,
    layout: Layout,
    packed: torch.Tensor,
    rows: slice,
    cols: slice,
    order: torch.Tensor,
    spread: torch.Tensor,
) -> None:
    stored = layout.view(packed, "codes")[rows]
    codes = bitpack.unpack(stored, layout.format.bits)
    scale, zero = grids(packed, layout, rows.start, rows.stop)
    groups = (torch.arange(cols.start, cols.stop) // layout.format.group_size)[order]
    wanted = weight[rows, cols].to(torch.float32).T[order]
    found = _round(wanted.contiguous(), scale.T.contiguous(), zero.T.contiguous(), groups, layout.format.top, spread)
    codes[:, cols] = found[order.argsort()].T.to(codes.dtype)
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
