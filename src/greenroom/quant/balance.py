"""Scales for the columns of a gated MLP's second matrix, at no cost in bytes or time.

Mueller et al. 2025, "SINQ: Sinkhorn-Normalized Quantization" (arXiv:2509.22944), give a matrix a second scale t for
each column, beside those of its groups: W ~ Q diag(t). Dividing rows and columns in turns by their standard deviations
finds t; afterwards no column is small beside its neighbours in a group, all of which share one step. Between a gate and
the second matrix t needs no place of its own: with y = D (act(G x) * (U x)),

    D -> D diag(1/t)    U -> diag(t) U    computes the same y

and a row's factor vanishes in that row's scales, so that U is quantised as well as before.
"""

import torch

from greenroom.quant.format import Format
from greenroom.quant.quantize import dequantize, quantize

ITERATIONS = 16
_SAMPLE_ROWS = 64
_SMALLEST = 2.0**-10
"""Of the largest standard deviation: a column of next to nothing is not blown up further than this."""


def column_scales(weight: torch.Tensor) -> torch.Tensor:
    """t, float32 [cols] of geometric mean 1: columns of weight [rows, cols] / t have equal standard deviations, once
    rows are scaled to have them too."""
    values = weight.to(torch.float32)
    squares = values * values
    columns = values.new_ones(values.shape[1])
    for _ in range(ITERATIONS):
        rows = 1 / _deviations(values, squares, columns)
        columns = 1 / _deviations(values.T, squares.T, rows)
    logarithms = columns.log()
    return (logarithms.mean() - logarithms).exp()


def _deviations(values: torch.Tensor, squares: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Standard deviations [n] of the rows of values [n, m] * factors [m]."""
    count = values.shape[1]
    variance = squares @ (factors * factors) / count - (values @ factors / count).square()
    deviations = variance.clamp(min=0).sqrt()
    largest = deviations.max()
    return deviations.clamp(min=float(largest) * _SMALLEST) if largest > 0 else torch.ones_like(deviations)


def balance(up: torch.Tensor, down: torch.Tensor, format: Format) -> "tuple[torch.Tensor, torch.Tensor]":
    """up [inner, cols] and down [rows, inner] of a gated MLP, float32, with the column scales of down in up's rows.

    They stay as they are where that would more than double the error of down in `format`: then its weights lie on a
    grid of their own, which the format meets and scaling breaks. Errors are measured on some of the rows, with columns
    scaled.
    """
    up, down = up.to(torch.float32), down.to(torch.float32)
    scales = column_scales(down)
    if not bool((up.sum() + down.sum() + scales.sum()).isfinite()):
        return up, down  # for quantize to refuse
    some = down[:: max(1, down.shape[0] // _SAMPLE_ROWS)]
    plain, scaled = _error(some, format) / scales, _error(some / scales, format)
    if bool(scaled.square().sum() > 2 * plain.square().sum()):
        return up, down
    return up * scales[:, None], down / scales


def _error(weight: torch.Tensor, format: Format) -> torch.Tensor:
    return dequantize(quantize(weight.contiguous(), format), weight.shape[0], weight.shape[1], format) - weight
