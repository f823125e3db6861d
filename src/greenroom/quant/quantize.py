"""Float matrix to packed record and back."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from greenroom.errors import ConfigError
from greenroom.quant import bits as bitpack
from greenroom.quant.format import Format
from greenroom.quant.layout import Layout
from greenroom.quant.metadata import RowParams
from greenroom.quant.scratch import Scratch
from greenroom.quant.search import search
from greenroom.quant.settle import assign, settle

CHUNK = 1 << 19
"""Weights handled at a time: a few float32 buffers of 2 MiB stay in the cache. Results do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """How far a packed matrix is from the original.

    mse: mean squared error, in squared weight units. mae: mean absolute error.
    relative_error: Frobenius norm of the difference over that of the original (0 for a matrix of zeros).
    hqq_share: share of groups that kept HQQ's candidate over round to nearest and narrowed ranges; 0 at 16 bits.
    """

    mse: float
    mae: float
    relative_error: float
    hqq_share: float


class _Tally:
    """Sums over chunks, in float64."""

    def __init__(self) -> None:
        self.squares = self.absolute = self.original = 0.0
        self.hqq_groups = 0

    def add(self, error: torch.Tensor, weight: torch.Tensor) -> None:
        wide = error.to(torch.float64)
        self.squares += float(wide.square().sum())
        self.absolute += float(wide.abs().sum())
        self.original += float(weight.to(torch.float64).square().sum())

    def report(self, layout: Layout) -> QuantizeReport:
        count = layout.rows * layout.cols
        return QuantizeReport(
            mse=self.squares / count,
            mae=self.absolute / count,
            relative_error=(self.squares / self.original) ** 0.5 if self.original else 0.0,
            hqq_share=self.hqq_groups / max(1, layout.rows * layout.groups),
        )


def quantize(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """Pack a float [rows, cols] matrix (bfloat16, float16 or float32): uint8 [Layout(rows, cols, format).nbytes].

    The bytes depend on the weights and the format alone: not on threads, and a row's not on its neighbours.
    Many weights go fastest with one caller per core, each under torch.set_num_threads(1): the operations are short.
    Raises ConfigError for a weight that is not such a matrix or not finite.
    """
    layout = _layout_of(weight, format)
    out = torch.empty(layout.nbytes, dtype=torch.uint8, device=weight.device)
    quantize_into(weight, format, out)
    return out


def quantize_into(
    weight: torch.Tensor,
    format: Format,
    out: torch.Tensor,
    *,
    costs: "torch.Tensor | None" = None,
    report: bool = False,
) -> QuantizeReport | None:
    """As `quantize`, into a uint8 [Layout.nbytes] tensor; with report, also how large the error is.

    costs: what a squared error in each column costs, float32 [cols], ≥ 0: grids are chosen for it.

    Temporaries are some 30 MiB (for a single row: some 32 bytes a weight). Raises ConfigError as `quantize` does, and
    for an out of another size.
    """
    weight = weight.detach()
    layout = _layout_of(weight, format)
    codes = layout.view(out, "codes")
    _clear_gaps(layout, out)
    tally = _Tally() if report else None
    if format.bits == 16:
        _round(weight, codes.view(getattr(torch, format.dtype)), tally)
    else:
        for start, end in _chunks(layout):
            _pack_rows(weight[start:end], layout, out, start, end, costs, tally)
    return tally.report(layout) if tally else None


def dequantize(
    packed: torch.Tensor,
    rows: int,
    cols: int,
    format: Format,
    dtype: torch.dtype = torch.float32,
    row_start: int = 0,
    row_end: int | None = None,
) -> torch.Tensor:
    """Rows row_start to row_end (exclusive; None: all) of a packed [rows, cols] matrix, as dtype [n, cols].

    packed: uint8 [Layout.nbytes]. The arithmetic is float32, rounded to dtype at the end; a row comes out the same
    whatever the slice. Raises ConfigError for a packed tensor of another size and for rows outside the matrix.
    """
    layout = Layout(rows, cols, format)
    row_end = rows if row_end is None else row_end
    if not 0 <= row_start <= row_end <= rows:
        raise ConfigError(f"rows {row_start} to {row_end} are not within a matrix of {rows} rows")
    if format.bits == 16:
        raw = layout.view(packed, "codes").view(getattr(torch, format.dtype))
        return raw[row_start:row_end].to(dtype, copy=True)
    out = torch.empty((row_end - row_start, cols), dtype=dtype, device=packed.device)
    for start, end in _chunks(layout, row_start, row_end):
        _unpack_rows(packed, layout, start, end, out[start - row_start : end - row_start])
    return out


def grids(packed: torch.Tensor, layout: Layout, start: int, end: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Scales and zeros, float32 [end - start, groups], of rows start to end of a packed matrix of 2 to 8 bits."""
    params = layout.view(packed, "row_params")[start:end].to(torch.float32)
    scale = RowParams(params[:, 0:1], params[:, 1:2]).decode(layout.view(packed, "scale_codes")[start:end])
    zero = RowParams(params[:, 2:3], params[:, 3:4]).decode(layout.view(packed, "zero_codes")[start:end])
    return scale, zero


def _layout_of(weight: torch.Tensor, format: Format) -> Layout:
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"only float matrices can be packed, not {weight.dtype} {list(weight.shape)}")
    return Layout(weight.shape[0], weight.shape[1], format)


def _chunks(layout: Layout, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    end = layout.rows if end is None else end
    step = max(1, CHUNK // layout.padded_cols)
    for row in range(start, end, step):
        yield row, min(row + step, end)


def _clear_gaps(layout: Layout, out: torch.Tensor) -> None:
    """Zero the bytes between parts, so that equal weights make equal records."""
    ends = [start + length for start, length in layout.parts().values()]
    starts = [*(start for start, _ in layout.parts().values()), layout.nbytes][1:]
    for gap_start, gap_end in zip(ends, starts, strict=True):
        out[gap_start:gap_end] = 0


def _round(weight: torch.Tensor, target: torch.Tensor, tally: _Tally | None) -> None:
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows, kept = weight[start : start + step], target[start : start + step]
        kept.copy_(rows)
        if not kept.isfinite().all():
            raise ConfigError(f"the weight has values that {target.dtype} cannot hold, or that are not finite")
        if tally:
            tally.add(kept.to(torch.float32) - rows.to(torch.float32), rows)


def _pack_rows(
    weight: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    start: int,
    end: int,
    costs: "torch.Tensor | None",
    tally: _Tally | None,
) -> None:
    groups = _grouped(weight, layout)
    wide = None if costs is None else _grouped((costs / costs.mean()).expand(end - start, -1), layout)
    scratch = Scratch(groups.shape[0], groups.shape[1], groups.device)
    scale, zero, from_hqq = search(groups, layout.format.bits, scratch, wide)
    if not scale.isfinite().all():  # as any weight that is not makes its group's scale
        raise ConfigError("the weight has values that are not finite")
    kept = settle(groups, scale, zero, end - start, layout.format.top, scratch, wide)
    codes = assign(groups, kept.scale, kept.zero, layout.format.top, scratch.codes)
    rows = codes.to(torch.uint8).t().reshape(end - start, layout.padded_cols)
    bitpack.pack(rows, layout.format.bits, layout.view(out, "codes")[start:end])
    layout.view(out, "scale_codes")[start:end] = kept.scale_codes.to(torch.uint8)
    layout.view(out, "zero_codes")[start:end] = kept.zero_codes.to(torch.uint8)
    layout.view(out, "row_params")[start:end] = torch.cat((*kept.scales, *kept.zeros), dim=1).to(torch.bfloat16)
    if tally:
        error = codes.sub_(kept.zero).mul_(kept.scale).sub_(groups)
        tally.add(_ungrouped(error, layout), weight)
        tally.hqq_groups += int(from_hqq.sum())


def _grouped(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """float32 [group_size, rows * groups] of a [rows, cols] chunk; padding repeats the row's last weight."""
    missing = layout.padded_cols - layout.cols
    if missing:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, missing)), dim=1)
    groups = weight.reshape(-1, layout.format.group_size).to(torch.float32)
    return groups.t().contiguous()


def _ungrouped(groups: torch.Tensor, layout: Layout) -> torch.Tensor:
    return groups.t().reshape(-1, layout.padded_cols)[:, : layout.cols]


def _unpack_rows(packed: torch.Tensor, layout: Layout, start: int, end: int, out: torch.Tensor) -> None:
    """Rows start to end into out [end - start, cols] of any float dtype."""
    codes = bitpack.unpack(layout.view(packed, "codes")[start:end], layout.format.bits)
    scale, zero = grids(packed, layout, start, end)
    values = codes.to(torch.float32).view(end - start, layout.groups, layout.format.group_size)
    values.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    out.copy_(values.view(end - start, -1)[:, : layout.cols])
