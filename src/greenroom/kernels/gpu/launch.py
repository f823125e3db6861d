"""How the Triton kernels are launched: grids, the constants that tune them, and what they want to know of a matrix."""

import dataclasses
import functools
from typing import Any

import torch
import triton

from greenroom.kernels.gpu import MOST_TOKENS
from greenroom.kernels.gpu import matrix as _matrix
from greenroom.kernels.gpu import pairs as _pairs
from greenroom.kernels.gpu import tiles as _tiles
from greenroom.kernels.gpu import vector as _vector
from greenroom.kernels.gpu.bound import Bound
from greenroom.packed import RecordTensor
from greenroom.quant import Layout

FEW_TOKENS = 4
"""Up to so many, vectors are multiplied one by one: three or four cost the instructions of sixteen together."""
_ONE = 0x3F800000
"""1.0 as bits, handed over at run time so that compilers keep it in a register."""
ROWS = 8
"""Rows that a warp multiplies at once; half of them where that leaves multiprocessors idle."""
BLOCKS = (16, 32, 64)
"""Vectors that the matrix units take at once."""
COLUMNS = 64
"""Rows of a matrix, columns of its result, that one program of these computes."""
UNITS = 2
"""Units of 16 columns that it dequantises at a time."""
BLOCK = 256
"""Columns that one program of the small kernels handles."""
LAUNCHES = 4096
"""Of each kind that stay bound."""
MOST_PROGRAMS = 65535
"""Of a grid's second dimension."""
FUSED = {"enable_fp_fusion": True}
"""Multiply-adds are one operation, on which the kernels' speed is reckoned; Triton's own choice changes with its
version."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """Pairs of a few tokens, found out on the device: the pairs of a slot are computed together."""

    slots: torch.Tensor
    tokens: int
    top_k: int
    block: int = MOST_TOKENS

    def arguments(self, per_vector: int) -> "dict[str, Any]":
        """What `matrix.products` wants to know; per_vector: pairs that share a vector of its input."""
        return {
            "slots": self.slots, "tasks": None, "vectors": None, "tokens": self.tokens, "per_vector": per_vector,
            "K": self.top_k, "KS": triton.next_power_of_2(self.top_k), "BM": self.block,
        }  # fmt: skip

    @property
    def programs(self) -> int:
        """The second dimension of the grid."""
        return self.tokens * self.top_k


@dataclasses.dataclass(frozen=True, slots=True)
class Tasks:
    """Work cut on the host: int32 [n, 3], a slot and up to `block` pairs each; and each pair's vector, or its own."""

    table: torch.Tensor
    vectors: "torch.Tensor | None"
    block: int

    def arguments(self, per_vector: int) -> "dict[str, Any]":
        """As `Sharing`'s."""
        own = per_vector == 1
        return {
            "slots": None, "tasks": self.table, "vectors": None if own else self.vectors, "tokens": 0,
            "per_vector": 1, "K": 1, "KS": 1, "BM": self.block,
        }  # fmt: skip

    @property
    def programs(self) -> int:
        """The second dimension of the grid."""
        return len(self.table)


def room(count: int, matrix: RecordTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For `count` arranged vectors [count, width] that the matrix is multiplied with, of activations in `dtype`:
    float16 where `halves` multiplies them, else float32."""
    size = (count, width(matrix.cols, matrix.format.bits))
    return torch.empty(size, dtype=torch.float16 if in_halves(matrix, dtype, device) else torch.float32, device=device)


def in_halves(matrix: RecordTensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix units multiply single vectors: those of Ampere and later; the interpreter stands for them."""
    narrow = dtype != torch.float32 and matrix.format.bits != 16
    return narrow and (device.type != "cuda" or has_matrix_units(device))


def arranged(x: torch.Tensor, matrix: RecordTensor) -> torch.Tensor:
    """Vectors x [n, cols] as the vector kernel reads them: see `room`."""
    out = room(len(x), matrix, x.dtype, x.device)
    _arrangement(matrix, x.device, len(x), out.shape[1], x.dtype, out.dtype, False, BLOCK)(x.contiguous(), out)
    return out


def tiled(x: torch.Tensor, matrix: RecordTensor) -> torch.Tensor:
    """Vectors x [n, cols] as the matrix kernel reads them: [n, width] in float16 where `tiles` multiplies them."""
    if not in_halves(matrix, x.dtype, x.device):
        return multiplied(x)
    out = between(len(x), matrix, x.dtype, x.device)
    _arrangement(matrix, x.device, len(x), out.shape[1], x.dtype, out.dtype, True, BLOCK)(x.contiguous(), out)
    return out


@functools.lru_cache(maxsize=LAUNCHES)
def _arrangement(
    matrix: RecordTensor,
    device: torch.device,
    count: int,
    width: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    tiles: bool,
    block: int,
) -> Bound:
    """For vectors [count, cols] of `dtype` into [count, width] of `out_dtype`."""
    numbers = {"cols": matrix.cols, "width": width, "BITS": matrix.format.bits, "TILES": tiles, "BLOCK": block}
    return Bound(_vector.arrange, (count, ceil(width, block)), ("x", "out"), numbers, **FUSED)


def between(count: int, matrix: RecordTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For `count` vectors that the matrix kernel multiplies with `matrix`, of activations in `dtype`; 0 where no column
    is."""
    if not in_halves(matrix, dtype, device):
        return multiplied(torch.empty((count, matrix.cols), dtype=dtype, device=device))
    columns = 16 * _tiles.CHUNKS.value * {2: 4, 3: 4, 4: 2, 8: 1}[matrix.format.bits]
    size = ceil(matrix.cols, columns) * columns
    make = torch.empty if size == matrix.cols else torch.zeros
    return make((count, size), dtype=torch.float16, device=device)


def vectors(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: "torch.Tensor | None",
    per_vector: int,
    matrix: RecordTensor,
    bias: "RecordTensor | None",
    kind: str,
    out: torch.Tensor,
    after: "RecordTensor | None",
) -> None:
    """Arranged vectors x times each pair's matrix: out [pairs, …], arranged for the matrix `after` if there is one.

    kind: what comes after the product, see `gate_of`.
    """
    record_nbytes = 0 if slots is None else arena.stride(0)
    launch = _vectors(
        matrix, bias, kind, after, x.device, x.dtype, x.shape[1], per_vector, record_nbytes, out.dtype, *out.shape, ROWS
    )
    given = x.view(torch.int32) if x.dtype == torch.float16 else x
    launch(given, arena, None if slots is None else slots.contiguous(), out)


@functools.lru_cache(maxsize=LAUNCHES)
def _vectors(
    matrix: RecordTensor,
    bias: "RecordTensor | None",
    kind: str,
    after: "RecordTensor | None",
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    per_vector: int,
    record_nbytes: int,
    out_dtype: torch.dtype,
    pairs: int,
    out_width: int,
    most_rows: int,
) -> Bound:
    """For arranged vectors [n, width] of `dtype` into [pairs, out_width] of `out_dtype`; record_nbytes: 0 for a matrix
    alone."""
    halves, gate = dtype == torch.float16, gate_of(kind)
    warps = pairs * ceil(matrix.rows, most_rows)
    few_registers = matrix.format.bits != 3 or halves
    rows = most_rows if warps >= _enough(device) and few_registers else most_rows // 2
    if ceil(matrix.rows, rows) > MOST_PROGRAMS:  # a head of 262144 tokens
        rows = most_rows
    numbers = {
        "record_nbytes": record_nbytes,
        "offset": matrix.offset,
        "bias": bias.offset if bias else 0,
        "per_vector": per_vector,
        "width": width,
        "out_width": out_width,
        "matrix_rows": matrix.rows,
        "outputs": matrix.rows if gate["FORM"] == "alone" else matrix.rows // 2,
        **parts_of(matrix),
        "one": _ONE,
        "ROWS": rows,
        "HALVES": halves,
        "ASM": assembles(device),
        "BIAS": bias is not None,
        "BIAS_IS_FLOAT16": bias is not None and bias.format.dtype == "float16",
        "OUT_BITS": after.format.bits if after else 0,
        **gate,
    }
    grid = (pairs, ceil(matrix.rows, rows))
    return Bound(_vector.products, grid, ("x", "arena", "slots", "out"), numbers, num_warps=1, **FUSED)


def matrices(
    x: torch.Tensor,
    arena: torch.Tensor,
    work: "Sharing | Tasks",
    per_vector: int,
    matrix: RecordTensor,
    bias: "RecordTensor | None",
    kind: str,
    out: torch.Tensor,
    after: "RecordTensor | None",
    dtype: torch.dtype,
) -> None:
    """Vectors x, `tiled`, times each pair's matrix: out [pairs, outputs], or as the matrix `after` reads them if there
    is one; dtype: the activations'."""
    halves, gate = in_halves(matrix, dtype, x.device), gate_of(kind)
    after = after if after is not None and in_halves(after, dtype, x.device) else None
    outputs = matrix.rows if gate["FORM"] == "alone" else matrix.rows // 2
    _matrix.products[(ceil(matrix.rows, COLUMNS), work.programs)](
        x=x,
        arena=arena,
        out=out,
        record_nbytes=arena.stride(0) if arena.dim() == 2 else 0,
        offset=matrix.offset,
        bias=bias.offset if bias else 0,
        cols=matrix.cols,
        width=x.shape[1],
        out_width=out.shape[1],
        matrix_rows=matrix.rows,
        outputs=outputs,
        **work.arguments(per_vector),
        **parts_of(matrix),
        BIAS=bias is not None,
        BIAS_IS_FLOAT16=bias is not None and bias.format.dtype == "float16",
        HALVES=halves,
        ASM=assembles(x.device),
        OUT_BITS=after.format.bits if after else 0,
        BN=COLUMNS,
        UNITS=UNITS,
        **gate,
        **FUSED,
        num_warps=4,
        num_stages=1 if halves else 3,  # what is loaded ahead would not fit beside the planes of three stages
    )


def weighted_sum(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool) -> torch.Tensor:
    """float32 [T, H]: Σ_j weights[t, j] · a row of `rows` [P, H], where places [T, k] is not −1.

    own: the row is the pair's own, t·k + j; else the one that places[t, j] names.
    """
    tokens, top_k = places.shape
    out = torch.empty((tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    launch = _sum(rows.device, tokens, top_k, rows.shape[1], own, weights.dtype, BLOCK)
    launch(rows, places.contiguous(), weights.contiguous(), out)
    return out


@functools.lru_cache(maxsize=LAUNCHES)
def _sum(
    device: torch.device, tokens: int, top_k: int, width: int, own: bool, weights: torch.dtype, block: int
) -> Bound:
    """For weights [tokens, top_k] of that dtype and rows of so many columns."""
    numbers = {"width": width, "K": top_k, "OWN": own, "BLOCK": block}
    tensors = ("rows", "places", "weights", "out")
    return Bound(_pairs.combine, (tokens, ceil(width, block)), tensors, numbers, **FUSED)


def ceil(count: int, size: int) -> int:
    """Pieces of a size that hold so many."""
    return -(-count // size)


def multiplied(x: torch.Tensor) -> torch.Tensor:
    """x in a dtype that the device's matrix units take, or in float32."""
    if x.dtype == torch.bfloat16 and not has_matrix_units(x.device):
        return x.to(torch.float32)
    return x.contiguous()


def vectors_at_once(vectors: int, device: torch.device) -> int:
    """How many of so many vectors of an expert are multiplied at once."""
    sizes = BLOCKS if has_matrix_units(device) else BLOCKS[:1]
    return next((size for size in sizes if size >= vectors), sizes[-1])


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """That Triton multiplies bfloat16 with, too: not before Ampere, and not in the interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def assembles(device: torch.device) -> bool:
    """Whether a kernel's assembly is what runs, and not what stands for it in the interpreter."""
    return device.type == "cuda"


def fits_vectors(matrix: RecordTensor) -> bool:
    """Whether a warp's 16-byte reads meet whole rows."""
    return matrix.format.bits != 16 or matrix.cols % 8 == 0


@functools.lru_cache(maxsize=256)
def parts_of(matrix: RecordTensor) -> "dict[str, Any]":
    """Where the parts of a packed matrix lie, for the kernels."""
    shape = Layout(matrix.rows, matrix.cols, matrix.format)
    return {
        "scale_codes": shape.scale_codes,
        "zero_codes": shape.zero_codes,
        "row_params": shape.row_params,
        "groups": shape.groups,
        "chunks": shape.code_row_bytes // (24 if matrix.format.bits == 3 else 16),
        "BITS": matrix.format.bits,
        "GROUP": matrix.format.group_size,
        "IS_FLOAT16": matrix.format.dtype == "float16",
    }


def width(cols: int, bits: int) -> int:
    """Columns of an arranged vector: whole tiles of 32 chunks."""
    tile = 32 * {2: 64, 3: 64, 4: 32, 8: 16, 16: 8}[bits]
    return ceil(cols, tile) * tile


@functools.cache
def _enough(device: torch.device) -> int:
    """Warps that keep a device's multiprocessors busy."""
    if device.type == "cpu":
        return 0
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def gate_of(kind: str) -> "dict[str, Any]":
    """See `Activation.kind`; "identity" too."""
    name, *numbers = kind.split(":")
    made = {"FORM": "alone", "FUNCTION": name, "ALPHA": 1.0, "LIMIT": 0.0, "PLUS": 0.0}
    if name == "clamped_silu_and_mul":
        made |= {"FORM": "halves", "FUNCTION": "silu", "LIMIT": float(numbers[0])}
    elif name.startswith("swigluoai"):
        alpha, limit = map(float, numbers)
        form = "turns" if name.endswith("interleaved") else "halves"
        made |= {"FORM": form, "FUNCTION": "silu", "ALPHA": alpha, "LIMIT": limit, "PLUS": 1.0}
    elif name.endswith("_and_mul"):
        made |= {"FORM": "halves", "FUNCTION": name.removesuffix("_and_mul")}
    return made
