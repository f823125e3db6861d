"""Experts and packed linears on a GPU, from records that lie in its memory.

Experts lie in an `arena` uint8 [buffers, record_nbytes] on the device, in the layout of the packed file; a *slot* is a
buffer's number, and −1 says that an expert is not there or that there is none (a router's sentinel). A *pair* is one of
a token's k experts. Nothing here waits for the device, and every call but `prompt` can be captured in a CUDA graph.

    lookup      experts → slots, and what is missing, told to the host in pinned memory
    token       1 to 16 tokens whose experts are all there: the weighted sum
    pairs       the same without the sum, so that experts may come in turns: one row per pair
    prompt      many rows of a few experts, whoever is there: one row per pair
    combine     the weighted sum over a token's pairs, in their order
    linear      a dense packed matrix

Results have no atomics in them: a pair's row depends on its record and its token alone (and on which of the kernels
its number of tokens chooses), and the sum runs over a token's pairs in the order in which they are given. So bits do
not depend on slots, on the order of arrival, or on what was there.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from greenroom.kernels.reference import Activation
from greenroom.packed import RecordTensor
from greenroom.quant import Format, Layout

MOST_TOKENS = 16
"""What `token` and `pairs` take at once; more go through `prompt`."""

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
OLDEST = (7, 5)
"""Compute capability: a T4's."""

OLDEST_TRITON = (3, 4)
_ONE = 0x3F800000
"""1.0 as bits, handed over at run time so that compilers keep it in a register."""
_ROWS = 8
"""Rows that a warp multiplies at once; half of them where that leaves multiprocessors idle."""
_FEW_TOKENS = 4
"""Up to so many, vectors are multiplied one by one: three or four cost the instructions of sixteen together."""
_BLOCKS = (16, 32, 64)
"""Vectors that the matrix units take at once."""
_COLUMNS = 64
"""Rows of a matrix, columns of its result, that one program of these computes."""
_UNITS = 2
"""Units of 16 columns that it dequantises at a time."""
_BLOCK = 256
"""Columns that one program of the small kernels handles."""

_absent = ""
try:
    import triton

    from greenroom.kernels.gpu import matrix as _matrix
    from greenroom.kernels.gpu import pairs as _pairs
    from greenroom.kernels.gpu import vector as _vector

    _interpreted = not isinstance(_pairs.lookup, triton.JITFunction)
except ModuleNotFoundError as error:
    _absent = f"{error.name} is not installed"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One expert at work in a prompt: its `slot`, and its pairs `start` to `start + count` (exclusive)."""

    slot: int
    start: int
    count: int


def unusable(device: "torch.device | str" = "cuda") -> str:
    """Why these kernels do not serve on `device`, or nothing: no triton, no such device, one older than 7.5."""
    device = torch.device(device)
    if _absent:
        return _absent
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton {triton.__version__} does not compile these kernels; it takes 3.4"
    if device.type == "cpu":
        return "" if _interpreted else "a CPU runs these kernels in Triton's interpreter alone"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"there is no {device.type} device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return ""


def describe(device: "torch.device | str" = "cuda") -> str:
    """For people: "triton 3.6 (NVIDIA H100, 9.0)", or "reference (torch): …" with the reason."""
    if reason := unusable(device):
        return f"reference (torch): {reason}"
    if torch.device(device).type == "cpu":
        return f"triton {triton.__version__} (interpreter)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"triton {triton.__version__} ({torch.cuda.get_device_name(device)}, {major}.{minor})"


def declines(layout: "Sequence[RecordTensor]", activation: Activation) -> str:
    """Why these kernels do not compute such experts, or nothing: an activation without a kind, or with a norm after."""
    if not activation.kind:
        return "the family's own gate is Python"
    if activation.after is not None:
        return "a norm follows the experts"
    return ""


def lookup(table: torch.Tensor, top_k_index: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Slots int32 [T, k] of the experts top_k_index int64 [T, k], T ≤ 16; −1 where there is none.

    table: int32 [num_experts], one layer's row of the device table: an expert's slot, or −1. missing: int32 [1 + T·k],
    in pinned memory or on the device: [0] becomes the number of pairs whose expert has no slot, and [1 + p] the expert
    of pair p if it has none, else −1. An index outside the table (a sentinel) has slot −1 and is not missing.
    """
    slots = torch.empty(top_k_index.shape, dtype=torch.int32, device=top_k_index.device)
    count = top_k_index.numel()
    _pairs.lookup[(1,)](
        table, top_k_index.contiguous(), slots, missing, len(table), count, BLOCK=triton.next_power_of_2(count)
    )
    return slots


def token(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
) -> torch.Tensor:
    """The experts' weighted sum, float32 [T, H], of x [T ≤ 16, H] in float16, bfloat16 or float32.

    slots: int32 [T, k], distinct within a token but for −1, which adds nothing. weights: [T, k], any float dtype.
    Same bits as `combine` over `pairs`.
    """
    count, top_k = slots.shape
    rows = pairs(x, arena, slots, layout, kind).view(count * top_k, -1)
    return _sum(rows, slots, weights, own=True)


def pairs(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: "torch.Tensor | None" = None,
) -> torch.Tensor:
    """Each pair's expert applied to its token: out float32 [T, k, H] (made if None), unweighted.

    As `token` otherwise. Rows of slots that are −1 stay untouched, so that several calls fill one `out`: first who is
    there, then who has come.
    """
    tokens, top_k = slots.shape
    assert tokens <= MOST_TOKENS, f"{tokens} tokens are a prompt"
    count, second, slots = tokens * top_k, layout[1], slots.contiguous()
    if out is None:
        out = torch.empty((tokens, top_k, second.rows), dtype=torch.float32, device=x.device)
    if tokens <= _FEW_TOKENS and all(_fits_vectors(matrix) for matrix in layout[:2]):
        _apart(x, arena, slots, layout, kind, out.view(count, -1))
    else:
        work = _Sharing(slots, tokens, top_k)
        _several(x, arena, work, layout, kind, out.view(count, -1))
    return out


def prompt(
    x: torch.Tensor,
    arena: torch.Tensor,
    spans: "Sequence[Span]",
    rows: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: torch.Tensor,
) -> None:
    """The pairs of several experts in one go: out[p] becomes expert(x[rows[p]]) for every pair p of the spans.

    x [T, H]; rows int32 [P], the token of each pair, pairs sorted by expert; out float32 [P, H]. Pairs of other experts
    stay untouched: calls follow the experts as they cross the link, in any order.
    """
    largest = max(span.count for span in spans)
    block = _block(largest, x.device)
    tasks = [
        (span.slot, start, min(block, span.start + span.count - start))
        for span in spans
        for start in range(span.start, span.start + span.count, block)
    ]
    _several(x, arena, _Tasks(torch.tensor(tasks, dtype=torch.int32).to(x.device), rows, block), layout, kind, out)


def combine(out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]: Σ_j weights[t, j] · out[places[t, j]], j ascending.

    out: float32 [P, H], as `prompt` left it (or `pairs`, viewed so). places: int32 [T, k]; −1 adds nothing. weights:
    [T, k]. A caller who wants ascending order of expert sorts places and weights so.
    """
    return _sum(out, places, weights, own=False)


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """x [n, cols] times the packed [rows, cols] matrix, transposed: [n, rows] in x's dtype, plus `bias` [rows]."""
    matrix = RecordTensor(name="", rows=rows, cols=cols, offset=0, format=format)
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    if len(x) <= _FEW_TOKENS and _fits_vectors(matrix):
        _vectors(_arranged(x, matrix), packed, None, 1, matrix, None, _gate("identity"), out, None)
    else:
        block = _block(len(x), x.device)
        tasks = [(0, start, min(block, len(x) - start)) for start in range(0, len(x), block)]
        work = _Tasks(torch.tensor(tasks, dtype=torch.int32).to(x.device), None, block)
        _matrices(_multiplied(x), packed, work, 1, matrix, None, _gate("identity"), out)
    return out if bias is None else out.add_(bias)


def dequantised(packed: torch.Tensor, matrix: RecordTensor, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `start` to `start + count` of a packed matrix as [count, cols]; packed: its bytes alone."""
    if matrix.format.bits == 16:
        raw = packed.view(getattr(torch, matrix.format.dtype))[: matrix.rows * matrix.cols]
        return raw.view(matrix.rows, matrix.cols)[start : start + count].to(dtype)
    out = torch.empty((count, matrix.cols), dtype=dtype, device=packed.device)
    parts = {name: value for name, value in _parts(matrix).items() if name != "IS_FLOAT16"}
    grid = (triton.cdiv(count, _COLUMNS), triton.cdiv(parts["chunks"], _UNITS))
    _matrix.dequantised[grid](
        packed, out, start, start + count, matrix.cols, BN=_COLUMNS, UNITS=_UNITS, num_warps=4, **parts
    )
    return out


def multiplies(vectors: int, device: torch.device) -> bool:
    """Whether these kernels are the way for so many vectors of a matrix: without matrix units for few alone."""
    return vectors <= MOST_TOKENS or _has_matrix_units(device)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sharing:
    """Pairs of a few tokens, found out on the device: the pairs of a slot are computed together."""

    slots: torch.Tensor
    tokens: int
    top_k: int

    def arguments(self, per_vector: int) -> "dict[str, Any]":
        """What `matrix.products` wants to know; per_vector: pairs that share a vector of its input."""
        return {
            "slots": self.slots, "tasks": None, "vectors": None, "tokens": self.tokens, "per_vector": per_vector,
            "K": self.top_k, "KS": triton.next_power_of_2(self.top_k), "BM": MOST_TOKENS,
        }  # fmt: skip

    @property
    def programs(self) -> int:
        """The second dimension of the grid."""
        return self.tokens * self.top_k


@dataclasses.dataclass(frozen=True, slots=True)
class _Tasks:
    """Work cut on the host: int32 [n, 3], a slot and up to `block` pairs each; and each pair's vector, or its own."""

    table: torch.Tensor
    vectors: "torch.Tensor | None"
    block: int

    def arguments(self, per_vector: int) -> "dict[str, Any]":
        """As `_Sharing`'s."""
        own = per_vector == 1
        return {
            "slots": None, "tasks": self.table, "vectors": None if own else self.vectors, "tokens": 0,
            "per_vector": 1, "K": 1, "KS": 1, "BM": self.block,
        }  # fmt: skip

    @property
    def programs(self) -> int:
        """The second dimension of the grid."""
        return len(self.table)


def _apart(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: torch.Tensor,
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: torch.Tensor,
) -> None:
    """Pairs one by one, out [P, H]; experts that tokens share come out of the cache again."""
    first, second, *biases = layout
    inner, outer = biases or (None, None)
    width = _width(second.cols, second.format.bits)
    middle = torch.empty((len(out), width), dtype=torch.float32, device=x.device)
    _vectors(_arranged(x, first), arena, slots, slots.shape[1], first, inner, _gate(kind), middle, second)
    _vectors(middle, arena, slots, 1, second, outer, _gate("identity"), out, None)


def _several(
    x: torch.Tensor,
    arena: torch.Tensor,
    work: "_Sharing | _Tasks",
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: torch.Tensor,
) -> None:
    """Pairs of several tokens, out [P, H]."""
    first, second, *biases = layout
    inner, outer = biases or (None, None)
    x = _multiplied(x)
    middle = torch.empty((len(out), second.cols), dtype=x.dtype, device=x.device)
    shared = work.top_k if isinstance(work, _Sharing) else 0
    _matrices(x, arena, work, shared, first, inner, _gate(kind), middle)
    _matrices(middle, arena, work, 1, second, outer, _gate("identity"), out)


def _sum(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool) -> torch.Tensor:
    tokens, top_k = places.shape
    out = torch.empty((tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    grid = (tokens, triton.cdiv(rows.shape[1], _BLOCK))
    _pairs.combine[grid](
        rows, places.contiguous(), weights.contiguous(), out, rows.shape[1], K=top_k, OWN=own, BLOCK=_BLOCK
    )
    return out


def _arranged(x: torch.Tensor, matrix: RecordTensor) -> torch.Tensor:
    """float32 [n, width]: vectors x [n, cols] as the vector kernel reads them."""
    bits = matrix.format.bits
    out = torch.empty((len(x), _width(matrix.cols, bits)), dtype=torch.float32, device=x.device)
    grid = (len(x), triton.cdiv(out.shape[1], _BLOCK))
    _vector.arrange[grid](x.contiguous(), out, matrix.cols, out.shape[1], BITS=bits, BLOCK=_BLOCK)
    return out


def _vectors(
    x: torch.Tensor,
    arena: torch.Tensor,
    slots: "torch.Tensor | None",
    per_vector: int,
    matrix: RecordTensor,
    bias: "RecordTensor | None",
    gate: "dict[str, Any]",
    out: torch.Tensor,
    after: "RecordTensor | None",
) -> None:
    """Arranged vectors x times each pair's matrix: out [pairs, …], arranged for the matrix `after` if there is one."""
    outputs = matrix.rows if gate["FORM"] == "alone" else matrix.rows // 2
    warps = len(out) * triton.cdiv(matrix.rows, _ROWS)
    few_registers = matrix.format.bits != 3
    rows = _ROWS if warps >= _enough(x.device) and few_registers else _ROWS // 2
    _vector.products[(len(out), triton.cdiv(matrix.rows, rows))](
        x,
        arena,
        None if slots is None else slots.contiguous(),
        out,
        arena.stride(0) if slots is not None else 0,
        matrix.offset,
        bias.offset if bias else 0,
        per_vector,
        x.shape[1],
        out.shape[1],
        matrix.rows,
        outputs,
        **_parts(matrix),
        one=_ONE,
        ROWS=rows,
        BIAS=bias is not None,
        BIAS_IS_FLOAT16=bias is not None and bias.format.dtype == "float16",
        OUT_BITS=after.format.bits if after else 0,
        **gate,
        num_warps=1,
    )


def _matrices(
    x: torch.Tensor,
    arena: torch.Tensor,
    work: "_Sharing | _Tasks",
    per_vector: int,
    matrix: RecordTensor,
    bias: "RecordTensor | None",
    gate: "dict[str, Any]",
    out: torch.Tensor,
) -> None:
    """Vectors x [n, cols] times each pair's matrix: out [pairs, outputs]."""
    _matrix.products[(triton.cdiv(matrix.rows, _COLUMNS), work.programs)](
        x=x,
        arena=arena,
        out=out,
        record_nbytes=arena.stride(0) if arena.dim() == 2 else 0,
        offset=matrix.offset,
        bias=bias.offset if bias else 0,
        cols=matrix.cols,
        matrix_rows=matrix.rows,
        outputs=out.shape[1],
        **work.arguments(per_vector),
        **_parts(matrix),
        BIAS=bias is not None,
        BIAS_IS_FLOAT16=bias is not None and bias.format.dtype == "float16",
        BN=_COLUMNS,
        UNITS=_UNITS,
        **gate,
        num_warps=4,
    )


def _multiplied(x: torch.Tensor) -> torch.Tensor:
    """x in a dtype that the device's matrix units take, or in float32."""
    if x.dtype == torch.bfloat16 and not _has_matrix_units(x.device):
        return x.to(torch.float32)
    return x.contiguous()


def _block(vectors: int, device: torch.device) -> int:
    """How many of so many vectors of an expert are multiplied at once."""
    sizes = _BLOCKS if _has_matrix_units(device) else _BLOCKS[:1]
    return next((size for size in sizes if size >= vectors), sizes[-1])


@functools.cache
def _has_matrix_units(device: torch.device) -> bool:
    """That Triton multiplies bfloat16 with, too: not before Ampere, and not in the interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _fits_vectors(matrix: RecordTensor) -> bool:
    """Whether a warp's 16-byte reads meet whole rows."""
    return matrix.format.bits != 16 or matrix.cols % 8 == 0


@functools.lru_cache(maxsize=256)
def _parts(matrix: RecordTensor) -> "dict[str, Any]":
    """Where the parts of a packed matrix lie, for the kernels."""
    shape = Layout(matrix.rows, matrix.cols, matrix.format)
    return {
        "scale_codes": shape.scale_codes,
        "zero_codes": shape.zero_codes,
        "params": shape.row_params,
        "groups": shape.groups,
        "chunks": shape.code_row_bytes // (24 if matrix.format.bits == 3 else 16),
        "BITS": matrix.format.bits,
        "GROUP": matrix.format.group_size,
        "IS_FLOAT16": matrix.format.dtype == "float16",
    }


def _width(cols: int, bits: int) -> int:
    """Columns of an arranged vector: whole tiles of 32 chunks."""
    tile = 32 * {2: 64, 3: 64, 4: 32, 8: 16, 16: 8}[bits]
    return -(-cols // tile) * tile


@functools.cache
def _enough(device: torch.device) -> int:
    """Warps that keep a device's multiprocessors busy."""
    if device.type == "cpu":
        return 0
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _gate(kind: str) -> "dict[str, Any]":
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
