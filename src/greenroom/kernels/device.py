"""Experts and packed linears on a GPU, from records that lie in its memory.

Experts lie in an `arena` uint8 [buffers, record_nbytes] on the device, in the layout of the packed file; a *slot* is a
buffer's number, and −1 says that an expert is not there or that there is none (a router's sentinel). A *pair* is one of
a token's k experts. Nothing here waits for the device, and every call but `prompt` can be captured in a CUDA graph
once it has been made before.

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

import torch

from greenroom.buffers import sent
from greenroom.errors import first_line
from greenroom.kernels.gpu import MOST_TOKENS
from greenroom.kernels.reference import Activation
from greenroom.packed import RecordTensor
from greenroom.quant import Format

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
OLDEST = (7, 5)
"""Compute capability: a T4's."""
OLDEST_TRITON = (3, 4)
_absent = ""
try:
    import triton

    from greenroom.kernels.gpu import launch
    from greenroom.kernels.gpu import matrix as _tiles
    from greenroom.kernels.gpu import pairs as _pairs

    _interpreted = not isinstance(_pairs.lookup, triton.JITFunction)
except ModuleNotFoundError as error:
    _absent = f"{error.name} is not installed"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One expert at work in a prompt: its `slot`, and its pairs `start` to `start + count` (exclusive)."""

    slot: int
    start: int
    count: int


@functools.cache
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
    return _no_launcher()


def _no_launcher() -> str:
    """Triton compiles a small part of its own, in C, on the machine that it first runs on."""
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # of the compiler's process, of the linker, of the file system
        return f"triton cannot compile its launcher ({first_line(error)}): install a C compiler and Python's headers"
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
        table, top_k_index.contiguous(), slots, missing, len(table), count, BLOCK=triton.next_power_of_2(count),
        **launch.FUSED,
    )  # fmt: skip
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
    return launch.weighted_sum(rows, slots, weights, own=True)


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
    if tokens <= launch.FEW_TOKENS and all(launch.fits_vectors(matrix) for matrix in layout[:2]):
        _apart(x, arena, slots, layout, kind, out.view(count, -1))
    else:
        work = launch.Sharing(slots, tokens, top_k)
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
    block = launch.vectors_at_once(largest, x.device)
    tasks = [
        (span.slot, start, min(block, span.start + span.count - start))
        for span in spans
        for start in range(span.start, span.start + span.count, block)
    ]
    table = sent(torch.tensor(tasks, dtype=torch.int32), x.device)
    _several(x, arena, launch.Tasks(table, rows, block), layout, kind, out)


def combine(out: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: bool = False) -> torch.Tensor:
    """float32 [T, H]: Σ_j weights[t, j] · out[places[t, j]], j ascending.

    out: float32 [P, H], as `prompt` left it (or `pairs`, viewed so). places: int32 [T, k]; −1 adds nothing. weights:
    [T, k]. A caller who wants ascending order of expert sorts places and weights so. own: out is as `pairs` left it, a
    row for each pair, and `places` only says which to add: its slots do.
    """
    return launch.weighted_sum(out, places, weights, own)


def linear(
    x: torch.Tensor, packed: torch.Tensor, rows: int, cols: int, format: Format, bias: "torch.Tensor | None" = None
) -> torch.Tensor:
    """x [n, cols] times the packed [rows, cols] matrix, transposed: [n, rows] in x's dtype, plus `bias` [rows]."""
    matrix = _alone(rows, cols, format)
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    if len(x) <= launch.FEW_TOKENS and launch.fits_vectors(matrix):
        launch.vectors(launch.arranged(x, matrix), packed, None, 1, matrix, None, "identity", out, None)
    else:
        block = launch.vectors_at_once(len(x), x.device)
        work = launch.Tasks(_blocks(len(x), block, x.device), None, block)
        launch.matrices(launch.tiled(x, matrix), packed, work, 1, matrix, None, "identity", out, None, x.dtype)
    return out if bias is None else out.add_(bias)


@functools.lru_cache(maxsize=256)
def _alone(rows: int, cols: int, format: Format) -> RecordTensor:
    """A matrix that is a record of its own."""
    return RecordTensor(name="", rows=rows, cols=cols, offset=0, format=format)


@functools.lru_cache(maxsize=64)
def _blocks(vectors: int, block: int, place: torch.device) -> torch.Tensor:
    """A table of tasks for so many vectors of one matrix, which is sent once."""
    tasks = [(0, start, min(block, vectors - start)) for start in range(0, vectors, block)]
    return sent(torch.tensor(tasks, dtype=torch.int32), place)


def dequantised(packed: torch.Tensor, matrix: RecordTensor, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `start` to `start + count` of a packed matrix as [count, cols]; packed: its bytes alone."""
    if matrix.format.bits == 16:
        raw = packed.view(getattr(torch, matrix.format.dtype))[: matrix.rows * matrix.cols]
        return raw.view(matrix.rows, matrix.cols)[start : start + count].to(dtype)
    out = torch.empty((count, matrix.cols), dtype=dtype, device=packed.device)
    parts = {name: value for name, value in launch.parts_of(matrix).items() if name != "IS_FLOAT16"}
    grid = (triton.cdiv(count, launch.COLUMNS), triton.cdiv(parts["chunks"], launch.UNITS))
    _tiles.dequantised[grid](
        packed, out, start, start + count, matrix.cols, BN=launch.COLUMNS, UNITS=launch.UNITS, num_warps=4,
        **parts, **launch.FUSED,
    )  # fmt: skip
    return out


def multiplies(vectors: int, device: torch.device) -> bool:
    """Whether these kernels are the way for so many vectors of a matrix: without matrix units for few alone."""
    return vectors <= MOST_TOKENS or launch.has_matrix_units(device)


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
    middle = launch.room(len(out), second, x.dtype, x.device)
    launch.vectors(launch.arranged(x, first), arena, slots, slots.shape[1], first, inner, kind, middle, second)
    launch.vectors(middle, arena, slots, 1, second, outer, "identity", out, None)


def _several(
    x: torch.Tensor,
    arena: torch.Tensor,
    work: "launch.Sharing | launch.Tasks",
    layout: "Sequence[RecordTensor]",
    kind: str,
    out: torch.Tensor,
) -> None:
    """Pairs of several tokens, out [P, H]."""
    first, second, *biases = layout
    inner, outer = biases or (None, None)
    middle = launch.between(len(out), second, x.dtype, x.device)
    shared = work.top_k if isinstance(work, launch.Sharing) else 0
    launch.matrices(launch.tiled(x, first), arena, work, shared, first, inner, kind, middle, second, x.dtype)
    launch.matrices(middle, arena, work, 1, second, outer, "identity", out, None, x.dtype)
